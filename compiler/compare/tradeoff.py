"""Perplexity, on the first text, against stored bits: a point for each model, with its name beside it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from planish.compiler.compare.comparison import Comparison
from planish.compiler.compare.table import labels
from planish.compiler.report.words import elided, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

__all__ = ["draw_tradeoff", "tradeoff"]

#: Above this ratio of the largest number to the smallest, points of a linear axis would lie on each other.
_LINEAR = 4.0
#: Above this one, a tick at every power of ten is enough.
_FAR = 100.0
#: Letters of a name that fit beside its point.
_LETTERS = 26


def tradeoff(comparison: Comparison) -> list[tuple[str, float, float]]:
    """Return name, bits per weight and perplexity of the models that have a perplexity, fewest bits first."""
    found = [
        (name, model.average_bits, model.evaluations[0].perplexity)
        for name, model in zip(labels(comparison.models), comparison.models, strict=True)
    ]
    return sorted((each for each in found if math.isfinite(each[2])), key=lambda each: each[1:])


def draw_tradeoff(axes: "Axes", comparison: Comparison, colour: str, ink: str) -> None:
    """Draw the points of `tradeoff`; axes whose numbers span much are logarithmic.

    Args:
        axes: empty, of a figure whose size is final.
        comparison: what was measured; one perplexity at least is finite.
        colour: of the points.
        ink: of the names.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    names, bits, perplexities = zip(*tradeoff(comparison), strict=True)
    axes.plot(bits, perplexities, linestyle="none", marker="o", color=colour, markersize=6)
    spans = (
        (axes.set_xscale, axes.xaxis, bits, LogLocator(base=2, subs=(1, 1.5))),
        (axes.set_yscale, axes.yaxis, perplexities, LogLocator(base=10, subs=(1, 2, 5))),
    )
    for set_scale, axis, values, close in spans:
        if max(values) > _LINEAR * min(values):
            set_scale("log")
            if max(values) < _FAR * min(values):
                axis.set_major_locator(close)
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda number, _: short(number)))
    scales = [" (logarithmic)" if axis.get_scale() == "log" else "" for _, axis, *_ in spans]
    axes.set_xlabel(f"bits per weight{scales[0]}")
    axes.set_ylabel(f"perplexity{scales[1]}")
    axes.margins(x=0.12, y=0.14)
    _name(axes, [elided(name, _LETTERS) for name in names], bits, perplexities, ink)


def _name(axes: "Axes", names: Sequence[str], bits: Sequence[float], perplexities: Sequence[float], ink: str) -> None:
    """Write names beside points, to the side where there is room, and one above the other where they would touch."""
    # The root, of which a panel may be a part.
    figure = axes.figure.canvas.figure
    figure.draw_without_rendering()
    left, right = axes.get_window_extent().intervalx
    placed: list[Annotation] = []
    for name, point in sorted(
        zip(names, zip(bits, perplexities, strict=True), strict=True), key=lambda each: each[1][1]
    ):
        to_left = axes.transData.transform(point)[0] > (left + right) / 2
        text = axes.annotate(
            name,
            point,
            (-8 if to_left else 8, 0),
            textcoords="offset points",
            ha="right" if to_left else "left",
            va="center",
            color=ink,
        )
        # What was placed stays where it is when the figure is laid out again.
        text.set_in_layout(False)
        box = text.get_window_extent()
        while hit := next((other for other in placed if other.get_window_extent().overlaps(box)), None):
            over = hit.get_window_extent().y1 - box.y0 + 1
            text.xyann = (text.xyann[0], text.xyann[1] + over * 72 / figure.dpi)
            box = text.get_window_extent()
        placed.append(text)
        if text.xyann[1] > 0:
            line = {"arrowstyle": "-", "color": ink, "linewidth": 0.5}
            axes.annotate("", point, text.xyann, textcoords="offset points", arrowprops=line).set_in_layout(False)
