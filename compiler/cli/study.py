"""`planish study`: what a choice of the compiler is worth on a model."""

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planish.compiler.cli import measured_on as options
from planish.compiler.cli.app import JsonFlag, Output, plain_table

if TYPE_CHECKING:
    from planish.compiler.select.study import SelectionStudy

__all__ = ["study_app"]

#: Of the text that policies are compared on.
_WINDOWS = 20

study_app = typer.Typer(
    help="Measure what a choice of the compiler is worth on a model.", no_args_is_help=True, rich_markup_mode=None
)


@study_app.callback()
def study() -> None:
    """Measure what a choice of the compiler is worth on a model."""


@study_app.command("selection", short_help="Compare the selection policies on a model.")
def run_study_selection(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file, Hub id, or smollm2.")],
    scheme: Annotated[str, typer.Option(help="Bits per tensor role, such as w4a4k4v4.")],
    lm_head: Annotated[str | None, typer.Option(help="Format of the output projection.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Calibration text: a .txt or .jsonl file, a Hub data set, or self. [self]")
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration sequences. [16]")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a calibration sequence. [512, or the context]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random choices. [0]")] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Keep only the first decoder blocks.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to keep measurements in, to go on after a kill.")
    ] = None,
    perplexity: Annotated[
        Path | None, typer.Option(help="A text: compile with every policy into OUTPUT, and evaluate on it. Long.")
    ] = None,
    polish: Annotated[int | None, typer.Option(min=0, help="Epochs of polishing each bundle; see compile.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Include the policy search, which learns. Long.")] = False,
    device: Annotated[str | None, typer.Option(help="What measures and learns: cpu, cuda, or cuda:N. [cpu]")] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of the text, as long as calibration sequences. [20]")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Compare the selection policies, and say whether the kurtosis rule holds on this model."""
    from planish.compiler.measure.texts import read_text
    from planish.compiler.pipeline.recipe import Recipe
    from planish.compiler.pipeline.study import measure_perplexities, study_checkpoint
    from planish.compiler.progress import progress_for

    if perplexity is not None and output is None:
        raise typer.BadParameter("--perplexity keeps a bundle for every policy: give --output", param_hint="--output")
    if perplexity is None:
        options.check_without("--perplexity", windows=windows, polish=polish is not None)
    else:
        # What is wrong with it is said before hours of work.
        read_text(perplexity)
    out = Output(json)
    recipe = Recipe.read(
        model=model,
        scheme=scheme,
        lm_head=lm_head,
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        polish=polish,
        device=device,
        num_layers=num_layers,
    )
    with tempfile.TemporaryDirectory(prefix="planish-study-") as scratch, progress_for(sys.stderr) as progress:
        folder = output or Path(scratch)
        found, perplexities = study_checkpoint(recipe, folder, progress, search), {}
        if perplexity is not None:
            perplexities = measure_perplexities(recipe, found, perplexity, windows or _WINDOWS, folder, progress)
    _show(out, found, perplexities)
    out.result({**found.to_dict(), "perplexity": perplexities})


def _show(out: Output, found: "SelectionStudy", perplexities: dict[str, float]) -> None:
    groups = list(found.groups)
    table = plain_table("", ["policy", *groups, "error", "regret", "cost", *(["perplexity"] if perplexities else [])])
    for each in found.policies:
        counts = (Counter(each.kinds[group]).most_common() for group in groups)
        shown = (", ".join(f"{number} {kind}" for kind, number in of_group) for of_group in counts)
        ppl = [f"{perplexities[each.policy]:.2f}"] if each.policy in perplexities else []
        table.add_row(each.policy, *shown, f"{each.error:.5g}", f"{each.regret:+.1%}", f"{each.cost:.1%}", *ppl)
    out.show(table)
    if "none" in perplexities:
        out.line(f"without transforms, rounded to nearest: perplexity {perplexities['none']:.2f}")
    for each in found.policies:
        for group, kinds in each.kinds.items():
            out.line(f"{each.policy} {group}: {''.join(kind[0] for kind in kinds)}")
    out.line("(a letter per layer: a affine, r rotation, i identity, m mixed)")
    for group, of_group in found.groups.items():
        calibration = of_group.calibration
        out.line(
            f"{group}: tau of kurtosis {calibration.tau:+.2f}, of rho {of_group.rho_tau:+.2f}; best threshold of z "
            f"{calibration.threshold:.2f}, regret {calibration.regret:.1%}"
        )
    for sentence in found.verdict:
        out.line(sentence)
