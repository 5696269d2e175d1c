"""`planish eval`: perplexity, divergence from the float model and task scores of a bundle or a checkpoint."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from planish.compiler.cli import measured_on as options
from planish.compiler.cli.app import JsonFlag, Output
from planish.compiler.runtime.provider import Provider
from planish.compiler.runtime.runnable import ENGINES

if TYPE_CHECKING:
    from planish.compiler.harness.tasks import Score, TaskScores
    from planish.compiler.measure.evaluation import Evaluation
    from planish.compiler.measure.subject import Subject

__all__ = ["run_eval"]


def run_eval(
    model: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle, or a checkpoint to run in float32.")],
    text: options.TextOption = None,
    dataset: options.DatasetOption = None,
    seqlen: options.SeqlenOption = None,
    windows: options.WindowsOption = None,
    kl: Annotated[bool, typer.Option("--kl", help="Measure the divergence from the bundle's float model too.")] = False,
    against: options.AgainstOption = None,
    tasks: options.TasksOption = None,
    task_data: options.TaskDataOption = None,
    limit: options.LimitOption = None,
    answers: options.AnswersOption = None,
    target: options.TargetOption = None,
    provider: options.ProviderOption = Provider.CPU,
    threads: options.ThreadsOption = None,
    json: JsonFlag = False,
) -> None:
    """Measure perplexity and divergence on windows of a text, and zero-shot scores on tasks."""
    from planish.compiler.harness.tasks import load_tasks, mean_score, score_tasks
    from planish.compiler.measure.evaluation import evaluate_windows
    from planish.compiler.measure.subject import check_same_tokens, check_same_vocabulary, open_subject
    from planish.compiler.measure.texts import cut_windows
    from planish.compiler.progress import progress_for

    names = options.task_names(tasks)
    if text is None and dataset is None and (not names or kl or against is not None):
        wanted = "divergence is measured on --text or --dataset" if names else "give --text or --dataset, or --tasks"
        raise typer.BadParameter(wanted, param_hint="--text")
    if text is None and dataset is None:
        options.check_without("--text or --dataset", seqlen=seqlen, windows=windows)
    if not names:
        options.check_without("--tasks", task_data=task_data, limit=limit, answers=answers)
    options.check_run(target, provider)
    out, found = Output(json), None
    scores: dict[str, TaskScores] = {}
    with progress_for(sys.stderr) as progress:
        # What is wrong with texts or tasks is said before a model is read into memory.
        read = options.open_text(text, dataset, progress)
        loaded = load_tasks(names, task_data, progress) if names else None
        subject = open_subject(model, target=target, threads=threads, provider=provider)
        if read is not None:
            reference = _reference(subject, kl, against, threads)
            readers = [subject, *([reference] if reference else [])]
            check_same_tokens(readers, read)
            check_same_vocabulary(readers)
            context = min(each.max_context for each in readers)
            cut = cut_windows(subject.tokenizer, read, *read.sizes(seqlen, windows, context))
            (found,) = evaluate_windows([subject.model], cut, reference.model if reference else None, progress)
        if loaded is not None:
            scores = score_tasks(subject, loaded, progress, limit=limit, answers=answers)
    if target in ENGINES or provider is not Provider.CPU:
        out.line(f"run by {subject.model.runs_on}")
    if found is not None:
        _show_evaluation(out, found)
    if scores:
        _show_scores(out, scores)
    out.result(
        {
            "runs_on": subject.model.runs_on,
            **(dataclasses.asdict(found) if found else {}),
            **({"tasks": {name: dataclasses.asdict(each) for name, each in scores.items()}} if scores else {}),
            **({"mean_score": dataclasses.asdict(mean)} if (mean := mean_score(scores)) else {}),
        }
    )


def _reference(subject: "Subject", kl: bool, against: str | None, threads: int | None) -> "Subject | None":
    from planish.compiler.bundle.bundle import Bundle
    from planish.compiler.measure.subject import float_subject, open_subject

    if against is not None:
        return open_subject(against, threads=threads)
    if not kl:
        return None
    if not isinstance(subject.origin, Bundle):
        raise typer.BadParameter(
            f"{subject.name} is a float model itself: name another by --against", param_hint="--kl"
        )
    return float_subject(subject.origin, threads)


def _show_evaluation(out: Output, found: "Evaluation") -> None:
    out.line(
        f"perplexity {found.perplexity:.4f} ({found.tokens} predicted tokens in {found.windows} windows of "
        f"{found.seqlen}, {found.seconds:.1f} s)"
    )
    if found.kl is not None and found.agreement is not None:
        out.line(f"KL divergence {found.kl:.6f} nats per token; the same likeliest token in {found.agreement:.2%}")


def _show_scores(out: Output, scores: "dict[str, TaskScores]") -> None:
    from planish.compiler.harness.tasks import mean_score

    rows = [
        [name, str(each.examples), metric, *_cells(score)]
        for name, each in scores.items()
        for metric, score in each.metrics.items()
    ]
    if len(scores) > 1 and (mean := mean_score(scores)):
        rows.append(["mean", "", "acc_norm, or acc", *_cells(mean)])
    out.table("", ["task", "examples", "metric", "value", "stderr"], rows)


def _cells(score: "Score") -> list[str]:
    return [f"{score.value:.4f}", "" if score.stderr is None else f"{score.stderr:.4f}"]
