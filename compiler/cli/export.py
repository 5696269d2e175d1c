"""`planish export`: a checkpoint to a float ONNX model."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from planish.compiler.cli.app import JsonFlag, Output

__all__ = ["run_export"]


def run_export(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, GGUF file, Hub id, or smollm2.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write: new or empty.")],
    num_layers: Annotated[int | None, typer.Option(min=1, help="Keep only the first decoder blocks.")] = None,
    json: JsonFlag = False,
) -> None:
    """Export a checkpoint as a float32 ONNX model with its tokenizer, for plain ONNX Runtime."""
    from planish.compiler.bundle.float_bundle import export_bundle
    from planish.compiler.progress import progress_for

    out, started = Output(json), time.perf_counter()
    with progress_for(sys.stderr) as progress:
        bundle = export_bundle(model, output, num_layers=num_layers, progress=progress)
    seconds, path = round(time.perf_counter() - started, 1), bundle.model_path("portable")
    out.line(f"{path}: float32, {seconds} s")
    out.result({"output": str(output), "model": str(path), "seconds": seconds})
