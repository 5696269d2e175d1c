"""A comparison as one page in the style of a bundle's report: a table of all figures, and plots of them."""

import math
from pathlib import Path

from planish.compiler.checkpoint.files import write_text
from planish.compiler.compare.comparison import Comparison
from planish.compiler.compare.table import Figure, Topic, figures, labels
from planish.compiler.compare.tradeoff import draw_tradeoff, tradeoff
from planish.compiler.errors import OutputFolderError
from planish.compiler.report.drawing import FILLED, Plot, bars
from planish.compiler.report.page import fill
from planish.compiler.report.svg import AFTER, INK, drawing_style, inline_svg, new_figure

__all__ = ["comparison_page", "write_page"]

#: The parts of the page, by what their figures tell.
_PARTS: dict[Topic, str] = {
    "accuracy": "How well they predict",
    "tasks": "Tasks",
    "size": "What they take",
    "speed": "How fast they run",
}


def write_page(comparison: Comparison, path: Path) -> None:
    """Write the page to `path`; it needs no other file.

    Raises:
        OutputFolderError: if it cannot be written.
    """
    try:
        write_text(path, comparison_page(comparison))
    except OSError as error:
        raise OutputFolderError(f"The report {path} cannot be written ({error.strerror}). Name another.") from error


def comparison_page(comparison: Comparison) -> str:
    """Return the page."""
    shown, names = figures(comparison), labels(comparison.models)
    with drawing_style():
        plots = {
            topic: [_bars(each, names) for each in shown if each.topic == topic and any(_drawn(each, names))]
            for topic in _PARTS
        }
        if tradeoff(comparison):
            plots["accuracy"].insert(0, _tradeoff(comparison))
    measured = list(zip(comparison.texts, comparison.models[0].evaluations, strict=True))
    return fill(
        "comparison.html.jinja",
        comparison=comparison,
        measured=measured,
        figures=shown,
        names=names,
        parts=[(topic, title, plots[topic]) for topic, title in _PARTS.items() if plots[topic]],
    )


def _tradeoff(comparison: Comparison) -> Plot:
    title, found = "Perplexity against stored bits", tradeoff(comparison)
    figure, (axes,) = new_figure(3.2)
    draw_tradeoff(axes, comparison, AFTER, INK)
    said = "; ".join(f"{name}: {bits:.3f} bits, perplexity {perplexity:.4g}" for name, bits, perplexity in found)
    return Plot(
        title,
        inline_svg(figure, "tradeoff", title, f"Points. {said}."),
        "Lower left is better. Bits are those of the decoder blocks' linears, scales counted.",
        ("model", "bits per weight", "perplexity"),
        [*found],
    )


def _bars(figure: Figure, names: list[str]) -> Plot:
    values = _drawn(figure, names)
    errors = {name: error for name, error in zip(names, figure.errors, strict=True) if name in values and error}
    title = figure.name[0].upper() + figure.name[1:]
    note = f"{figure.better.capitalize()} is better."
    return Plot(
        title,
        bars(
            "".join(letter if letter.isalnum() else "-" for letter in figure.name),
            title,
            values,
            figure.name.rpartition(", ")[2],
            [FILLED],
            errors,
            # What is better the higher it is has a zero that means something: a share, a score, a speed.
            may_be_logarithmic=figure.better == "lower",
        ),
        f"{note} Whiskers are standard errors." if errors else note,
        ("model", figure.name),
        [(name, words or None) for name, words in zip(names, figure.shown, strict=True)],
    )


def _drawn(figure: Figure, names: list[str]) -> dict[str, float]:
    """Return what can be drawn, by model; a number that is not finite is in the tables alone."""
    return {
        name: value
        for name, value in zip(names, figure.values, strict=True)
        if value is not None and math.isfinite(value)
    }
