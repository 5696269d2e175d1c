"""What plots of a page share: a plot with the table that says the same, fillings, bars, and layers across."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planish.compiler.report.svg import AFTER, BEFORE, INK, LINES, inline_svg, new_figure
from planish.compiler.report.words import elided, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EMPTY", "FILLED", "HATCHED", "Plot", "Row", "bars", "layers_across"]

Row = tuple[str | int | float | None, ...]

#: Fillings differ in pattern and outline, not in colour alone.
EMPTY: dict[str, Any] = {"color": "none", "edgecolor": BEFORE, "linewidth": 1.2}
HATCHED: dict[str, Any] = {**EMPTY, "hatch": "////"}
FILLED: dict[str, Any] = {"color": AFTER}
#: Above this ratio of the largest bar to the smallest, bars would hide each other on a linear axis.
_LINEAR = 20.0
#: Letters of a label that leave half of a plot to its bar.
_LETTERS = 28


@dataclasses.dataclass(frozen=True)
class Plot:
    """One plot and its numbers.

    Attributes:
        title: what it shows, in some words.
        svg: an svg element.
        note: how to read it, in a sentence or two.
        header: of the table.
        rows: of the table; None is a number that there is none of.
    """

    title: str
    svg: str
    note: str
    header: tuple[str, ...]
    rows: list[Row]


def bars(
    name: str,
    title: str,
    values: Mapping[str, float],
    unit: str,
    styles: Sequence[Mapping[str, Any]],
    errors: Mapping[str, float] | None = None,
    may_be_logarithmic: bool = True,
) -> str:
    """Return the svg of a bar across for each of `values`, its number behind it.

    Args:
        name: of the figure within its page.
        title: what a screen reader calls it.
        values: by label.
        unit: of the values.
        styles: of the bars, over again where there are more bars.
        errors: how far the whiskers of a bar reach to either side, by label.
        may_be_logarithmic: use a logarithmic axis where a linear one would leave bars too short to see.
    """
    errors = errors or {}
    figure, (axes,) = new_figure(0.55 + 0.3 * len(values))
    wide = may_be_logarithmic and max(values.values()) > _LINEAR * min(values.values()) > 0
    for place, ((label, value), style) in enumerate(zip(values.items(), itertools.cycle(styles))):
        axes.barh(place, value, height=0.62, **style)
        if label in errors:
            axes.errorbar(value, place, xerr=errors[label], color=INK, linewidth=1, capsize=3)
        end = value + errors.get(label, 0.0)
        axes.annotate(short(value), (end, place), (4, 0), textcoords="offset points", va="center", color=INK)
    if wide:
        axes.set_xscale("log")
    axes.margins(x=0.16)
    axes.set_yticks(range(len(values)), [elided(label, _LETTERS) for label in values])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{unit} (logarithmic)" if wide else unit, loc="right")
    said = "; ".join(f"{label}: {short(value)} {unit}" for label, value in values.items())
    return inline_svg(figure, name, title, f"Bars. {said}.")


def layers_across(axes: "Axes") -> None:
    """Give `axes` the layers of a model across, and a line at zero unless what is up is logarithmic."""
    from matplotlib.ticker import MaxNLocator

    if axes.get_yscale() == "linear":
        axes.axhline(0, color=LINES, linewidth=0.8)
    axes.margins(x=0.01)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False, axis="x")
