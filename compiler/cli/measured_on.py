"""The options that commands share which run models: text, windows, tasks, and what runs a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planish.compiler.runtime.provider import Provider
from planish.compiler.runtime.runnable import ENGINES

if TYPE_CHECKING:
    from planish.compiler.measure.texts import Text
    from planish.compiler.progress import Progress

__all__ = [
    "AgainstOption",
    "AnswersOption",
    "DatasetOption",
    "LimitOption",
    "ProviderOption",
    "SeqlenOption",
    "TargetOption",
    "TaskDataOption",
    "TasksOption",
    "TextOption",
    "ThreadsOption",
    "WindowsOption",
    "check_run",
    "check_without",
    "open_text",
    "task_names",
]

TextOption = Annotated[
    Path | None,
    typer.Option(help="Measure perplexity on a UTF-8 text, or on the fields 'text' of a .jsonl."),
]
DatasetOption = Annotated[
    str | None,
    typer.Option(help="Measure it on wikitext2 or c4, or owner/name:config:split of the Hub."),
]
SeqlenOption = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a window. [512; 2048 with --dataset; the context, if shorter]")
]
WindowsOption = Annotated[
    int | None, typer.Option(min=1, help="How many windows, from the start of the text. [20; all with --dataset]")
]
AgainstOption = Annotated[str | None, typer.Option(help="Bundle or checkpoint to measure the divergence from.")]
TasksOption = Annotated[
    str | None, typer.Option(help="Tasks of lm-evaluation-harness, such as piqa,arc_easy: zero-shot scores.")
]
TaskDataOption = Annotated[
    Path | None, typer.Option(help="Folder with the examples of each task in TASK.jsonl. [the Hub]")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="How many examples of each task. [all]")]
AnswersOption = Annotated[
    Path | None, typer.Option(help="Folder that keeps answers to tasks, to go on after a kill. [~/.cache/planish]")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads of the model. [one per core]")]

TargetOption = Annotated[
    str | None,
    typer.Option(
        help="What to run of a bundle: ort or portable, in ONNX Runtime; rtx or tensorrt, the engine, on an NVIDIA "
        "GPU. [ort, if it was compiled for it]"
    ),
]
ProviderOption = Annotated[
    Provider, typer.Option(help="Where ONNX Runtime runs a bundle: cpu, or cuda with onnxruntime-gpu.")
]


def check_run(target: str | None, provider: Provider) -> None:
    """Check what --target and --provider ask for together.

    Raises:
        BadParameter: if there is no such target, or it is an engine and the provider not the usual one.
    """
    if target not in (None, "ort", "portable", *ENGINES):
        raise typer.BadParameter(f"'{target}' is none of ort, portable, {', '.join(ENGINES)}", param_hint="--target")
    if target in ENGINES and provider is not Provider.CPU:
        raise typer.BadParameter(
            f"an engine runs on the GPU by itself: leave it out beside --target {target}", param_hint="--provider"
        )


def check_without(missing: str, **given: object) -> None:
    """Check that no option is given that has no effect without the one that is missing.

    Args:
        missing: the option that is not there, such as --tasks.
        given: the others by their names as parameters; None, False and empty ones are not given.

    Raises:
        BadParameter: naming the first that is given.
    """
    for name, value in given.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"it does nothing without {missing}: leave it out", param_hint=option)


def open_text(text: Path | None, name: str | None, progress: "Progress") -> "Text | None":
    """Read the text of --text, or of --dataset; return None if neither is given.

    Raises:
        BadParameter: if both are.
        TextError: if it cannot be read.
    """
    from planish.compiler.measure.texts import dataset, text_file

    if text is not None and name is not None:
        raise typer.BadParameter("give --text or --dataset, not both", param_hint="--text")
    if text is not None:
        return text_file(text)
    return None if name is None else dataset(name, progress)


def task_names(tasks: str | None) -> list[str]:
    """Return the names in a list that commas separate, each once."""
    return list(dict.fromkeys(name.strip() for name in (tasks or "").split(",") if name.strip()))
