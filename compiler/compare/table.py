"""A comparison as rows of a table: one for each figure, one column for each model."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from planish.compiler.compare.comparison import Compared, Comparison
from planish.compiler.harness.tasks import Score, mean_score

__all__ = ["Figure", "figures", "label", "score_text"]

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
    """

    name: str
    better: str
    values: list[float | None]
    shown: list[str]


def figures(comparison: Comparison) -> list[Figure]:
    """Return what was measured of at least one model, in the order of size, accuracy, speed."""
    models = comparison.models
    rows = [
        _figure("weights, MB", "lower", models, lambda each: each.weight_bytes / 1e6, "{:.1f}"),
        _figure("bits per weight", "lower", models, lambda each: each.average_bits, "{:.3f}"),
        _figure("perplexity", "lower", models, lambda each: each.evaluation.perplexity, "{:.3f}"),
        _figure("KL from the reference, nats", "lower", models, lambda each: each.evaluation.kl, "{:.5f}"),
        _figure("same likeliest token", "higher", models, lambda each: each.evaluation.agreement, "{:.2%}"),
    ]
    for task in models[0].scores:
        metric = models[0].scores[task].main
        rows.append(_scores(f"{task}, {metric}", [each.scores[task].metrics[metric] for each in models]))
    if len(models[0].scores) > 1:
        rows.append(_scores("mean of the tasks", [mean_score(each.scores) for each in models]))
    for name, better, field, form in _SPEEDS:
        rows.append(_figure(name, better, models, functools.partial(_speed, field), form))
    return [row for row in rows if any(value is not None for value in row.values)]


def label(model: Compared) -> str:
    """Return a short name of a model: the last part of its path, and its format unless that is the same."""
    name = Path(model.name).name
    return name if name == model.format else f"{name} ({model.format})"


def score_text(score: Score) -> str:
    """Return a score and its standard error."""
    return f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")


def _figure(
    name: str, better: str, models: list[Compared], value_of: Callable[[Compared], float | None], form: str
) -> Figure:
    values = [value_of(model) for model in models]
    return Figure(name, better, values, ["" if value is None else form.format(value) for value in values])


def _speed(field: str, model: Compared) -> float | None:
    return None if model.speed is None else float(getattr(model.speed, field))


def _scores(name: str, scores: list[Score]) -> Figure:
    better = "lower" if "perplexity" in name else "higher"
    return Figure(name, better, [score.value for score in scores], [score_text(score) for score in scores])
