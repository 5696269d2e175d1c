"""`planish inspect`: what is in a bundle and why, or what will be hard to round in a checkpoint."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.cli.app import JsonFlag, Output
from planish.compiler.errors import EngineMismatchError, MissingExtraError

__all__ = ["run_inspect"]

#: Text on which outliers are looked for: they show in little.
_SEQUENCES, _SEQLEN = 4, 256


def run_inspect(
    model: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle; with --outliers, a checkpoint.")],
    layer: Annotated[int | None, typer.Option(min=0, help="Show one layer, site by site.")] = None,
    outliers: Annotated[
        bool, typer.Option("--outliers", help="Look for outliers in the weights and activations of a checkpoint.")
    ] = False,
    dataset: Annotated[
        str | None, typer.Option(help="With --outliers, the text: a .txt or .jsonl file, a Hub data set, self. [self]")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Check the files of a bundle and say what is in it, or look at a checkpoint before it is compiled."""
    out = Output(json)
    if outliers:
        _outliers(model, dataset, layer, out)
        return
    if dataset is not None:
        raise typer.BadParameter("a text is read with --outliers only", param_hint="--dataset")
    from planish.compiler.cli.inspect_view import show_bundle, show_layer
    from planish.compiler.report.facts import gather
    from planish.compiler.report.run_record import RunRecord

    opened = Bundle.open(Path(model))
    facts = gather(opened, RunRecord.read(opened))
    if layer is None:
        states = _engines(opened)
        show_bundle(facts, states, out)
        out.result({**facts, "runs_here": states})
        return
    _check_layer(layer, facts["layers"])
    sites = [each for each in facts["sites"] if each["layer"] == layer]
    prefix = f"model.layers.{layer}."
    linears = [each for each in facts["linears_by_module"] if each["module"].startswith(prefix)]
    show_layer(layer, sites, linears, facts["high_impact"], out)
    out.result({"layer": layer, "sites": sites, "linears": linears, "high_impact": _of_layer(facts, layer)})


def _outliers(model: str, dataset: str | None, layer: int | None, out: Output) -> None:
    from planish.compiler.calibrate.settings import SELF, CalibrationSettings
    from planish.compiler.calibrate.text import calibration_tokens
    from planish.compiler.checkpoint import open_checkpoint
    from planish.compiler.cli.inspect_view import show_outliers
    from planish.compiler.measure.outliers import find_outliers
    from planish.compiler.progress import progress_for

    # A text that does not exist is named before the checkpoint is fetched.
    text = CalibrationSettings(dataset=dataset or SELF).dataset
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    if layer is not None:
        _check_layer(layer, config.num_hidden_layers)
    with progress_for(sys.stderr) as progress:
        tokens = calibration_tokens(
            text, checkpoint, nsamples=_SEQUENCES, seqlen=min(_SEQLEN, config.max_context), progress=progress
        )
        found = find_outliers(checkpoint, tokens, lambda done, total: progress.step("outliers", done, total))
    shown = found if layer is None else [found[layer]]
    show_outliers(checkpoint.name, shown, tokens.size, out)
    out.result({"model": checkpoint.name, "tokens": int(tokens.size), "outliers": [each.to_dict() for each in shown]})


def _check_layer(layer: int, layers: int) -> None:
    if layer >= layers:
        raise typer.BadParameter(f"the model has {layers} layers, numbered from 0", param_hint="--layer")


def _of_layer(facts: dict[str, Any], layer: int) -> dict[str, Any] | None:
    """Return what the facts say of high-impact channels in one layer, `losses` only where they were measured."""
    high = facts["high_impact"]
    if high is None:
        return None
    here = {name: each for name in ("layers", "losses") for each in high[name] if each["layer"] == layer}
    return {**here.pop("layers"), **here}


def _engines(bundle: Bundle) -> dict[str, str]:
    """Return target -> whether its engine runs on this machine, in words."""
    engines = {}
    for target in bundle.manifest.targets:
        if target == "ort":
            continue
        try:
            record = bundle.engine(target)
        except (EngineMismatchError, MissingExtraError) as error:
            engines[target] = str(error)
        else:
            engines[target] = f"runs here; up to {record.max_batch} sequences of {record.max_context} tokens"
    return engines
