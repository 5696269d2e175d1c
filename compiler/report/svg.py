"""Turn matplotlib figures into SVG that stands inside a page: themed by its CSS, named for screen readers."""

import contextlib
import io
import re
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AFTER", "BEFORE", "CARD", "INK", "LINES", "MARK", "PLOT_WIDTH", "drawing_style", "inline_svg", "new_figure"]

# Colours that no plot would use by itself; each stands for a variable of the page, which has two sets of them.
INK, LINES, CARD, BEFORE, AFTER, MARK = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f", "#101112"
_VARIABLES = {INK: "ink", LINES: "lines", CARD: "card", BEFORE: "before", AFTER: "after", MARK: "mark"}

#: Inches; a plot is scaled to its card, and on the narrowest phones text stays about as large as it is drawn.
PLOT_WIDTH = 4.4
_FONT_SIZE = 11.0

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": _FONT_SIZE,
    "axes.titlesize": _FONT_SIZE,
    "legend.fontsize": _FONT_SIZE,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINES,
    "axes.titlecolor": INK,
    "xtick.color": LINES,
    "ytick.color": LINES,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": LINES,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
}


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Draw in the colours and sizes of the page meanwhile."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(height: float, columns: int = 1) -> tuple["Figure", list["Axes"]]:
    """Return a figure, `height` inches high, and its axes side by side, which share what is up."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PLOT_WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharey=True)
    return figure, list(axes.flat)


def inline_svg(figure: "Figure", name: str, title: str, description: str) -> str:
    """Return the figure as an svg element without a size of its own, the same for the same figure.

    Args:
        figure: made by `new_figure`, within `drawing_style`, as this is.
        name: of the figure within its page; ids begin with it.
        title: what a screen reader calls it.
        description: what it shows, in a sentence or two.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    (box,) = re.findall(r'viewBox="([^"]+)"', text)
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    # Styles of a drawing would hold for the whole page.
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = _own_ids(body.replace("xlink:href", "href"), name)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    # Fonts are those of the page; sizes are in units of the drawing, and matplotlib writes them in pixels.
    body = re.sub(r"font(?:-family)?: ?([0-9.]+px)?[^;\"]*(?=[;\"])", _font, body)
    # What matplotlib indents by is a fifth of a plot.
    body = re.sub(r"\n +", "\n", body)
    labels = f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>'
    return (
        f'<svg viewBox="{box}" role="img" aria-labelledby="{name}-t {name}-d" data-plot="{name}">{labels}{body}</svg>'
    )


def _own_ids(body: str, name: str) -> str:
    """Return the drawing with only the ids that something in it refers to, each beginning with the figure's name."""
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))

    def rename(match: re.Match[str]) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    body = re.sub(r'\s+id="([^"]+)"', rename, body)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)


def _font(match: re.Match[str]) -> str:
    return f"font-size: {match[1]}" if match[1] else "font-family: inherit"
