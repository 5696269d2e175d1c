"""The options that `compile` and `build` share: for what engines are built."""

from typing import Annotated

import typer

__all__ = [
    "MaxBatchSizeOption",
    "MaxContextOption",
    "MaxInputLenOption",
    "PluginsOption",
    "SmOption",
    "TensorrtVersionOption",
]

MaxContextOption = Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer together.")]
MaxBatchSizeOption = Annotated[int | None, typer.Option(min=1, help="Sequences that an engine takes at once.")]
MaxInputLenOption = Annotated[int | None, typer.Option(min=1, help="Prompt tokens an engine takes at once.")]
SmOption = Annotated[list[int] | None, typer.Option(help="GPU generation of an engine, such as 89; repeatable.")]
PluginsOption = Annotated[
    str | None, typer.Option(help="Plugins in engines of TensorRT: auto, none or require. [auto]")
]
TensorrtVersionOption = Annotated[
    str | None,
    typer.Option(help="Lower for the TensorRT of another machine, such as 10.3, and build no engine here."),
]
