"""A comparison as a picture: perplexity against bits, and a panel of bars for each figure, its numbers beside them."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from planish.compiler.compare.comparison import Comparison
from planish.compiler.compare.table import Figure, figures, labels
from planish.compiler.compare.tradeoff import draw_tradeoff, tradeoff
from planish.compiler.errors import OutputFolderError
from planish.compiler.report.words import elided

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMATS", "plot_comparison"]

#: What a plot can be written as, by the end of its name.
FORMATS = (".svg", ".png")

_COLUMNS, _WIDTH, _BAR, _TITLE, _TRADEOFF = 2, 11.0, 0.32, 0.75, 4.0
_COLOUR, _INK = "#33628d", "#1d2126"
#: How much wider than its longest bar a panel is, for the number behind it.
_ROOM = 1.5
#: Letters of a name that leave more than half of a panel to its bar.
_LETTERS = 26


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Write the picture to `path`, an SVG or PNG file by its name.

    Raises:
        OutputFolderError: if the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure as Picture

    shown, names = figures(comparison), labels(comparison.models)
    rows = -(-len(shown) // _COLUMNS)
    heights = [_TRADEOFF if tradeoff(comparison) else 0.01, rows * (_TITLE + _BAR * len(names))]
    # Text stays text in SVG, so that it can be read aloud, searched and copied.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        picture = Picture(figsize=(_WIDTH, sum(heights)), layout="constrained")
        above, below = picture.subfigures(2, 1, height_ratios=heights, squeeze=False).flat
        for place, figure in enumerate(shown, 1):
            _draw(below.add_subplot(rows, _COLUMNS, place), figure, names)
        picture.suptitle("On " + ", ".join(Path(text).name for text in comparison.texts))
        if tradeoff(comparison):
            axes = above.add_subplot()
            axes.set_title("perplexity against stored bits (lower left is better)", loc="left", fontsize="medium")
            axes.spines[["top", "right"]].set_visible(False)
            draw_tradeoff(axes, comparison, _COLOUR, _INK)
        try:
            picture.savefig(path, dpi=150)
        except OSError as error:
            raise OutputFolderError(f"The plot {path} cannot be written ({error.strerror}). Name another.") from error


def _draw(axes: "Axes", figure: Figure, names: list[str]) -> None:
    finite = [value if value is not None and math.isfinite(value) else 0.0 for value in figure.values]
    errors = [error or 0.0 for error in figure.errors]
    bars = axes.barh(range(len(names)), finite, color=_COLOUR, xerr=errors if any(errors) else None, ecolor=_INK)
    axes.bar_label(bars, labels=figure.shown, padding=3)
    axes.set_yticks(range(len(names)), [elided(name, _LETTERS) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, _ROOM * (max(finite) or 1.0))
    axes.set_title(f"{figure.name} ({figure.better} is better)", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
