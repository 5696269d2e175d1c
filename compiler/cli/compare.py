"""`planish compare`: size, accuracy and speed of bundles and checkpoints side by side."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from planish.compiler.cli import measured_on as options
from planish.compiler.cli.app import JsonFlag, Output
from planish.compiler.runtime.provider import Provider

__all__ = ["run_compare"]


def run_compare(
    models: Annotated[list[str], typer.Argument(metavar="A B [C ...]", help="Bundles, and checkpoints in float32.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Evaluate on a UTF-8 text, or on the fields 'text' of a .jsonl; may be repeated."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Evaluate on wikitext2 or c4, or owner/name:config:split of the Hub; may be repeated."),
    ] = None,
    seqlen: options.SeqlenOption = None,
    windows: options.WindowsOption = None,
    kl: Annotated[bool, typer.Option(help="Measure the divergence from the float model.")] = True,
    against: options.AgainstOption = None,
    tasks: options.TasksOption = None,
    task_data: options.TaskDataOption = None,
    limit: options.LimitOption = None,
    answers: options.AnswersOption = None,
    speed: Annotated[bool, typer.Option(help="Measure prefill and decode, each model in a process of its own.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw the comparison into this file, .svg or .png.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write tables and plots into this page, .html.")] = None,
    target: options.TargetOption = None,
    provider: options.ProviderOption = Provider.CPU,
    threads: options.ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Measure models on the same text and tasks in one run, and print them side by side."""
    from planish.compiler.compare.comparison import TaskSettings, compare_models
    from planish.compiler.compare.page import write_page
    from planish.compiler.compare.plot import FORMATS, plot_comparison
    from planish.compiler.compare.table import figures, labels
    from planish.compiler.measure.texts import dataset as hub_text
    from planish.compiler.measure.texts import text_file
    from planish.compiler.progress import progress_for

    if not text and not dataset:
        raise typer.BadParameter("give --text or --dataset", param_hint="--text")
    names = options.task_names(tasks)
    if not names:
        options.check_without("--tasks", task_data=task_data, limit=limit, answers=answers)
    if not kl:
        options.check_without("--kl", against=against)
    options.check_run(target, provider)
    if plot is not None and plot.suffix not in FORMATS:
        raise typer.BadParameter(f"{plot} ends in none of {', '.join(FORMATS)}", param_hint="--plot")
    if report is not None and report.suffix != ".html":
        raise typer.BadParameter(f"{report} does not end in .html", param_hint="--report")
    for option, path in (("--plot", plot), ("--report", report)):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"there is no folder {path.parent}", param_hint=option)
    out = Output(json)
    with progress_for(sys.stderr) as progress:
        read = [*map(text_file, text or ()), *(hub_text(name, progress) for name in dataset or ())]
        found = compare_models(
            models,
            read,
            progress,
            seqlen=seqlen,
            windows=windows,
            divergence=kl,
            against=against,
            tasks=TaskSettings(names, task_data, limit, answers) if names else None,
            speed=speed,
            threads=threads,
            target=target,
            provider=provider,
        )
    rows = [[f"{row.name} ({row.better} is better)", *row.shown] for row in figures(found)]
    out.table(f"on {', '.join(found.texts)}", ["", *labels(found.models)], rows)
    if found.reference:
        out.line(f"divergence is measured from {found.reference}")
    if plot is not None:
        plot_comparison(found, plot)
        out.line(f"drawn in {plot}")
    if report is not None:
        write_page(found, report)
        out.line(f"report in {report}")
    out.result(found.to_dict())
