"""`planish compile`: a checkpoint to a bundle."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from planish.compiler.cli import engine_options as engine
from planish.compiler.cli.app import JsonFlag, Output

__all__ = ["run_compile"]


def run_compile(
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle to write: a new or empty folder.")],
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, GGUF file, Hub id, or smollm2.", show_default=False)
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="Bits per tensor role, such as w4a4k4v4 or w2a16g128.")] = None,
    lm_head: Annotated[
        str | None, typer.Option(help="Format of the output projection, such as w8a8 or w16a16.")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="How transforms are chosen: none, fixed:KIND, kurtosis, search, measured[:BUDGET], auto. [auto]"
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan.json, made or edited, to take the transforms from instead of choosing.")
    ] = None,
    high_impact: Annotated[
        Path | None,
        typer.Option(help="A bundle or folder with a plan.safetensors whose high-impact channels keep more bits."),
    ] = None,
    avg_bits: Annotated[
        float | None, typer.Option(help="Stored bits per weight that high-impact channels may use up, such as 3.25.")
    ] = None,
    hic_policy: Annotated[
        str | None, typer.Option(help="How their numbers are chosen: solved per layer, or fixed. [solved]")
    ] = None,
    hic_ratio: Annotated[
        float | None, typer.Option(help="Share of the channels that are high-impact ones, instead of a budget.")
    ] = None,
    hic_bits: Annotated[
        int | None, typer.Option(help="Their bits: 3, 4 or 8. [4; 8 for 4-bit schemes, 3 for w2a16 below 2.5]")
    ] = None,
    hic_score: Annotated[
        str | None, typer.Option(help="What ranks channels: damage, moment, or fisher, which is the paper's. [damage]")
    ] = None,
    hic_candidates: Annotated[
        str | None,
        typer.Option(help="Shares of the channels that are tried, such as 0,0.05,0.1. [some around the budget]"),
    ] = None,
    hic_weighting: Annotated[
        bool | None,
        typer.Option(
            "--hic-weighting/--no-hic-weighting",
            help="Count the error of a block by how much the model's loss depends on it. [on]",
        ),
    ] = None,
    rounding: Annotated[
        str | None, typer.Option("--round", help="How weights are rounded: gptq, adaround, nearest. [gptq]")
    ] = None,
    residual_rotation: Annotated[
        bool | None,
        typer.Option("--residual-rotation/--no-residual-rotation", help="Rotate the residual stream first. [off]"),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Calibration text: a .txt or .jsonl file, a Hub data set, or self. [self]")
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration sequences. [16]")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a calibration sequence. [512, or the context]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random choices. [0]")] = None,
    refine: Annotated[
        int | None, typer.Option(min=0, help="Epochs of learning the transforms of each block by gradient descent. [0]")
    ] = None,
    polish: Annotated[
        int | None, typer.Option(min=0, help="Epochs of learning norms, scales and clips. [4 if the model is small]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="What learns: cpu, cuda, or cuda:N. [cpu]")] = None,
    verify_passes: Annotated[
        bool | None,
        typer.Option("--verify-passes/--no-verify-passes", help="Check the logits after every pass. [on]"),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="ort, rtx or tensorrt; may be repeated. [ort]")] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="Keep only the first decoder blocks.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe.yaml; flags win over it.")] = None,
    max_context: engine.MaxContextOption = None,
    max_batch_size: engine.MaxBatchSizeOption = None,
    max_input_len: engine.MaxInputLenOption = None,
    sm: engine.SmOption = None,
    plugins: engine.PluginsOption = None,
    tensorrt_version: engine.TensorrtVersionOption = None,
    json: JsonFlag = False,
) -> None:
    """Compile a checkpoint to a bundle that runs.

    A run that was killed goes on where it was when the same command is given again.
    """
    from planish.compiler.bundle.inspection import inspect
    from planish.compiler.pipeline.compile import compile_model
    from planish.compiler.progress import progress_for

    out, started = Output(json), time.perf_counter()
    try:
        with progress_for(sys.stderr) as progress:
            bundle = compile_model(
                model,
                output,
                scheme=scheme,
                lm_head=lm_head,
                select=select,
                plan=plan,
                high_impact=high_impact,
                avg_bits=avg_bits,
                hic_policy=hic_policy,
                hic_ratio=hic_ratio,
                hic_bits=hic_bits,
                hic_score=hic_score,
                hic_candidates=None if hic_candidates is None else hic_candidates.split(","),
                hic_weighting=hic_weighting,
                round=rounding,
                residual_rotation=residual_rotation,
                dataset=dataset,
                nsamples=nsamples,
                seqlen=seqlen,
                seed=seed,
                refine=refine,
                polish=polish,
                device=device,
                verify_passes=verify_passes,
                targets=target or None,
                num_layers=num_layers,
                max_context=max_context,
                max_batch_size=max_batch_size,
                max_input_len=max_input_len,
                sms=sm or None,
                plugins=plugins,
                tensorrt_version=tensorrt_version,
                recipe=recipe,
                progress=progress,
            )
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        raise typer.Exit(130) from None
    seconds = round(time.perf_counter() - started, 1)
    found = inspect(bundle)
    out.line(
        f"{output}: {found.model} in {found.scheme}, {found.average_bits:.3f} bits per weight, "
        f"{found.sizes['total'] / 1e6:.1f} MB, {seconds} s; report in {output}/report/report.html"
    )
    out.result({"output": str(output), "seconds": seconds, **found.to_dict()})
