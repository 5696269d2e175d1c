"""`planish build`: a further target for a bundle, without compiling again."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from planish.compiler.cli import engine_options as engine
from planish.compiler.cli.app import JsonFlag, Output

__all__ = ["run_build"]


def run_build(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    target: Annotated[list[str], typer.Option(help="ort, rtx or tensorrt; what the bundle has for it is replaced.")],
    max_context: engine.MaxContextOption = None,
    max_batch_size: engine.MaxBatchSizeOption = None,
    max_input_len: engine.MaxInputLenOption = None,
    sm: engine.SmOption = None,
    plugins: engine.PluginsOption = None,
    tensorrt_version: engine.TensorrtVersionOption = None,
    json: JsonFlag = False,
) -> None:
    """Lower a compiled bundle to a further target, or build its engine anew for another GPU or other limits."""
    from planish.compiler.pipeline.build import build_target
    from planish.compiler.progress import progress_for

    if len(target) > 1:
        raise typer.BadParameter("a build is for one target; run one after the other", param_hint="--target")
    (target_name,) = target
    out, started = Output(json), time.perf_counter()
    with progress_for(sys.stderr) as progress:
        made = build_target(
            bundle,
            target_name,
            max_context=max_context,
            max_batch_size=max_batch_size,
            max_input_len=max_input_len,
            sms=sm or None,
            plugins=plugins,
            tensorrt_version=tensorrt_version,
            progress=progress,
        )
    seconds = round(time.perf_counter() - started, 1)
    size = sum(path.stat().st_size for path in made.model_path(target_name).parent.iterdir())
    out.line(
        f"{bundle}: {target_name} added, {size / 1e6:.1f} MB, {seconds} s; targets {', '.join(made.manifest.targets)}"
    )
    out.result(
        {
            "bundle": str(bundle),
            "target": target_name,
            "bytes": size,
            "seconds": seconds,
            "targets": list(made.manifest.targets),
        }
    )
