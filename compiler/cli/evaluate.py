"""`planish eval`: perplexity of a bundle, or of a checkpoint in float."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import MANIFEST_FILE
from planish.compiler.cli.app import JsonFlag, Output

__all__ = ["run_eval"]


def run_eval(
    model: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle, or a checkpoint to run in float32.")],
    text: Annotated[Path, typer.Option(help="UTF-8 text file, or .jsonl whose lines have a field 'text'.")],
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="How many windows, from the start of the text.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime. [one per core]")] = None,
    json: JsonFlag = False,
) -> None:
    """Measure perplexity on non-overlapping windows of a text."""
    from planish.compiler.measure.evaluation import evaluate

    out = Output(json)
    with _opened(model) as bundle:
        session = bundle.session(threads=threads)
        found = evaluate(session, bundle.tokenizer, text, seqlen=seqlen, windows=windows)
    out.line(
        f"perplexity {found.perplexity:.4f} ({found.tokens} predicted tokens in {found.windows} windows of "
        f"{found.seqlen}, {found.seconds:.1f} s)"
    )
    out.result(dataclasses.asdict(found))


@contextlib.contextmanager
def _opened(model: str) -> Iterator[Bundle]:
    """Open a bundle; or export a checkpoint for as long as it is needed."""
    path = Path(model)
    if (path / MANIFEST_FILE).is_file() or path.suffix == ".onnx":
        yield Bundle.open(path)
        return
    from planish.compiler.bundle.float_bundle import export_bundle

    with tempfile.TemporaryDirectory(prefix="planish-eval-") as scratch:
        yield export_bundle(model, Path(scratch) / "float")
