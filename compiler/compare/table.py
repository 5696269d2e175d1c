"""A comparison as rows of a table: one for each figure, one column for each model."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from planish.compiler.compare.comparison import Compared, Comparison
from planish.compiler.harness.tasks import Score, mean_score

__all__ = ["Figure", "Topic", "figures", "labels", "score_text"]

#: What a figure tells of a model.
Topic = Literal["size", "accuracy", "tasks", "speed"]

#: Name with a place for the text, which is better, the field of `Evaluation`, and how it is shown.
_ACCURACIES = (
    ("perplexity{}", "lower", "perplexity", "{:.3f}"),
    ("KL from the reference{}, nats", "lower", "kl", "{:.5f}"),
    ("same likeliest token{}", "higher", "agreement", "{:.2%}"),
)
#: Name, which is better, the field of `Side`, and how it is shown.
_SPEEDS = (
    ("prefill, tokens/s", "higher", "prefill", "{:.1f}"),
    ("decode, tokens/s", "higher", "decode", "{:.1f}"),
    ("resident, MiB", "lower", "resident_mib", "{:.0f}"),
)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One thing that was measured of all models.

    Attributes:
        name: what it is, with its unit.
        better: `lower` or `higher`; empty where neither is.
        values: of each model, NaN-free; None where it was not measured.
        shown: the same in words, with standard errors.
        topic: what it tells of them.
        errors: standard errors of the values; None where there is none.
    """

    name: str
    better: str
    values: list[float | None]
    shown: list[str]
    topic: Topic
    errors: list[float | None]


def figures(comparison: Comparison) -> list[Figure]:
    """Return what was measured of at least one model, in the order of size, accuracy, speed."""
    models = comparison.models
    rows = [
        _figure("weights, MB", "lower", "size", models, lambda each: each.weight_bytes / 1e6, "{:.1f}"),
        _figure("bits per weight", "lower", "size", models, lambda each: each.average_bits, "{:.3f}"),
    ]
    for place, text in enumerate(comparison.texts):
        where = f" on {_short(text, comparison.texts)}" if len(comparison.texts) > 1 else ""
        for name, better, field, form in _ACCURACIES:
            value_of = functools.partial(_accuracy, place, field)
            rows.append(_figure(name.format(where), better, "accuracy", models, value_of, form))
    for task in models[0].scores:
        metric = models[0].scores[task].main
        rows.append(_scores(f"{task}, {metric}", [each.scores[task].metrics[metric] for each in models]))
    means = [mean for each in models if (mean := mean_score(each.scores)) is not None]
    if len(models[0].scores) > 1 and means:
        rows.append(_scores("mean of the tasks", means))
    for name, better, field, form in _SPEEDS:
        rows.append(_figure(name, better, "speed", models, functools.partial(_speed, field), form))
    return [row for row in rows if any(value is not None for value in row.values)]


def labels(models: Sequence[Compared]) -> list[str]:
    """Return a short name of each model, no two alike.

    It is the last part of its path, and its format unless that is the same; the whole path where others have the same
    name, and a number behind it where a model was given twice.
    """
    # The current folder has a name too, which its path does not show.
    names = [_label(Path(model.name).name or Path(model.name).resolve().name, model.format) for model in models]
    names = [
        name if names.count(name) == 1 else _label(model.name, model.format)
        for name, model in zip(names, models, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{name} #{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]


def score_text(score: Score) -> str:
    """Return a score and its standard error."""
    return f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")


def _label(name: str, form: str) -> str:
    return name if name == form else f"{name} ({form})"


def _figure(
    name: str,
    better: str,
    topic: Topic,
    models: list[Compared],
    value_of: Callable[[Compared], float | None],
    form: str,
) -> Figure:
    values = [value_of(model) for model in models]
    shown = ["" if value is None else form.format(value) for value in values]
    return Figure(name, better, values, shown, topic, [None] * len(values))


def _short(text: str, texts: Sequence[str]) -> str:
    """Return the last part of a text's path, or all of it where another has the same."""
    name = Path(text).name
    return name if [Path(each).name for each in texts].count(name) == 1 else text


def _accuracy(place: int, field: str, model: Compared) -> float | None:
    value: float | None = getattr(model.evaluations[place], field)
    return value


def _speed(field: str, model: Compared) -> float | None:
    return None if model.speed is None else float(getattr(model.speed, field))


def _scores(name: str, scores: list[Score]) -> Figure:
    values: list[float | None] = [score.value for score in scores]
    return Figure(
        name, scores[0].better, values, [score_text(each) for each in scores], "tasks", [each.stderr for each in scores]
    )
