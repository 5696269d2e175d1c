"""A comparison as a picture: a panel of bars for each figure, a bar for each model, its number written beside it."""

import math
from pathlib import Path

from planish.compiler.compare.comparison import Comparison
from planish.compiler.compare.table import Figure, figures, label
from planish.compiler.errors import OutputFolderError
from planish.compiler.optional import require

__all__ = ["FORMATS", "plot_comparison"]

#: What a plot can be written as, by the end of its name.
FORMATS = (".svg", ".png")

_COLUMNS, _WIDTH, _BAR, _TITLE = 2, 11.0, 0.32, 0.75
_COLOUR = "#33628d"
#: How much wider than its longest bar a panel is, for the number behind it.
_ROOM = 1.5


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Write the picture to `path`, an SVG or PNG file by its name.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        OutputFolderError: if the file cannot be written.
    """
    matplotlib = require("matplotlib")
    shown = figures(comparison)
    names = [label(model) for model in comparison.models]
    rows = -(-len(shown) // _COLUMNS)
    # Text stays text in SVG, so that it can be read aloud, searched and copied.
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        picture = require("matplotlib.figure").Figure(
            figsize=(_WIDTH, rows * (_TITLE + _BAR * len(names))), layout="constrained"
        )
        for place, figure in enumerate(shown, 1):
            _draw(picture.add_subplot(rows, _COLUMNS, place), figure, names)
        picture.suptitle(f"On {Path(comparison.text).name}")
        try:
            picture.savefig(path, dpi=150)
        except OSError as error:
            raise OutputFolderError(f"The plot {path} cannot be written ({error.strerror}). Name another.") from error


def _draw(axes: object, figure: Figure, names: list[str]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    finite = [value if value is not None and math.isfinite(value) else 0.0 for value in figure.values]
    bars = axes.barh(range(len(names)), finite, color=_COLOUR)
    axes.bar_label(bars, labels=figure.shown, padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, _ROOM * (max(finite) or 1.0))
    axes.set_title(f"{figure.name} ({figure.better} is better)", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
