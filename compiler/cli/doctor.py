"""`planish doctor`: what this machine has, what it lacks, and what a compile of a named model would take."""

from pathlib import Path
from typing import Annotated, Any

import typer

from planish.compiler.cli.app import JsonFlag, Output
from planish.compiler.report.words import size

__all__ = ["run_doctor"]


def run_doctor(
    model: Annotated[
        str | None,
        typer.Option("--for", help="A model: say what its compile takes. Of a Hub id, reads the config only."),
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="With --for, the scheme.")] = None,
    select: Annotated[str | None, typer.Option(help="With --for, how transforms are chosen. [auto]")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="With --for, ort, rtx or tensorrt; repeatable. [ort]")
    ] = None,
    avg_bits: Annotated[
        float | None, typer.Option(help="With --for, bits per weight that high-impact channels may use up.")
    ] = None,
    refine: Annotated[int | None, typer.Option(min=0, help="With --for, epochs of refining transforms. [0]")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Say what a compile of this recipe.yaml takes; flags win over it.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Print versions, the processor's integer instructions, GPUs, native parts, disk and missing extras."""
    from planish.compiler.doctor import diagnose

    if recipe is None and (model is None) != (scheme is None):
        raise typer.BadParameter("give a model and a scheme together", param_hint="--for, --scheme")
    out, found = Output(json), diagnose()
    cpu = found["cpu"]
    out.rows(
        {
            "python": f"{found['python']} on {found['platform']}",
            **{name: version or "not installed" for name, version in found["packages"].items()},
            "cpu": f"{cpu['cores']} cores, {cpu['threads']} threads; {' '.join(cpu['flags']) or 'no known flags'}",
            "memory": f"{found['memory_gb']} GB",
            "gpu": "; ".join(found["gpus"]) or "none",
            **found["plugins"],
            "disk": f"{found['disk_free_gb']} GB free here",
        }
    )
    for sentence in found["advice"]:
        out.line(f"- {sentence}")
    if model is not None or recipe is not None:
        given = {"model": model, "scheme": scheme, "select": select, "avg_bits": avg_bits, "refine": refine}
        found["forecast"] = _forecast(recipe, {**given, "targets": tuple(target) if target else None}, out)
    out.result(found)


def _forecast(recipe: Path | None, given: dict[str, Any], out: Output) -> dict[str, Any]:
    from planish.compiler.pipeline.forecast import forecast
    from planish.compiler.pipeline.recipe import Recipe

    found = forecast(Recipe.read(recipe, **given))
    parts = ", ".join(f"{part} {size(count)}" for part, count in found["sizes"].items())
    out.line("")
    out.line(f"A compile of {found['model']} in {found['scheme']} (--select {found['select']}) takes about")
    out.rows(
        {
            "bundle": f"{size(found['bundle'])}: {parts}",
            "disk": f"{size(found['disk'])} until it is done; {size(found['disk_free'])} are free here",
            "memory": f"{size(found['memory'])}; this machine has {size(found['memory_total'])}",
            "time": f"{_duration(found['seconds'])} at the speed that this processor has now",
        }
    )
    for sentence in found["lacks"]:
        out.line(f"- {sentence}")
    if not found["lacks"]:
        out.line("- disk and memory suffice")
    return found


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
