"""Plots of high-impact channels: how many there are in every layer, the bits they take, and what their numbers cost."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planish.compiler.report.drawing import FILLED, HATCHED, Plot, layers_across
from planish.compiler.report.svg import AFTER, CARD, INK, MARK, inline_svg, new_figure
from planish.compiler.report.words import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["high_plots"]

#: The sites of a stack, from below.
_STACKED: dict[str, dict[str, Any]] = {
    "attn_in": FILLED,
    "attn_out": HATCHED,
    "ffn_in": {"color": MARK, "edgecolor": CARD, "hatch": "xxx", "linewidth": 0},
    "ffn_out": {"color": "none", "edgecolor": INK, "hatch": "\\\\\\\\", "linewidth": 1.2},
}
_BAR = 0.78


def high_plots(high: Mapping[str, Any] | None) -> list[Plot]:
    """Return the plots of what `high_facts` says, within `drawing_style`; none where there are no such channels."""
    if high is None:
        return []
    return [_counts(high), _bits(high), *_losses(high)]


def _counts(high: Mapping[str, Any]) -> Plot:
    title, widths = "High-impact channels by layer", high["widths"]
    figure, (axes,) = new_figure(2.5)
    layers = high["layers"]
    _stack(axes, [each["counts"] for each in layers])
    layers_across(axes)
    axes.set_ylabel("channels")
    figure.legend(loc="outside upper left", ncols=2)
    means = {site: sum(each["counts"][site] for each in layers) / len(layers) for site in widths}
    said = "; ".join(f"{site} {short(means[site])} of {width}" for site, width in widths.items())
    return Plot(
        title,
        inline_svg(figure, "high-counts", title, f"Stacked bars, a part for each site. In the mean {said}."),
        f"Of {', '.join(f'{width} at {site}' for site, width in widths.items())}.",
        ("layer", *(f"{site}, of {width}" for site, width in widths.items())),
        [(each["layer"], *(each["counts"][site] for site in widths)) for each in layers],
    )


def _bits(high: Mapping[str, Any]) -> Plot:
    title, layers, sites = "Bits that they add, by layer", high["layers"], [*high["widths"]]
    figure, (axes,) = new_figure(2.5)
    _stack(axes, [each["added_bits"] for each in layers])
    low = sum(each["low_bits"] for each in layers) / len(layers)
    note = (
        f"To {low:.3f} bits per weight without them: codes, scales, and the order of the channels where it is stored."
    )
    budget = (high["policy"] or {}).get("average")
    if budget:
        axes.axhline(budget - low, color=MARK, linestyle="--", linewidth=1.4)
        note += f" The dashed line is what the budget of {budget:g} leaves to a layer if all share alike."
    layers_across(axes)
    axes.set_ylabel("bits per weight")
    figure.legend(loc="outside upper left", ncols=2)
    stored = [each["stored_bits"] for each in layers]
    return Plot(
        title,
        inline_svg(
            figure,
            "high-bits",
            title,
            f"Stacked bars, a part for each site. Layers store {min(stored):.3f} to {max(stored):.3f} bits per weight.",
        ),
        note,
        ("layer", "stored", "without", *(f"added at {site}" for site in sites)),
        [
            (each["layer"], each["stored_bits"], each["low_bits"], *(each["added_bits"][site] for site in sites))
            for each in layers
        ],
    )


def _losses(high: Mapping[str, Any]) -> list[Plot]:
    rows = high["losses"]
    if not rows:
        return []
    chosen = {each["layer"]: each["counts"] for each in high["layers"]}
    return [_whole_blocks(rows), *(_alone(site, rows, chosen) for site in high["widths"])]


def _whole_blocks(rows: Sequence[Mapping[str, Any]]) -> Plot:
    title = "Error of each block, by the numbers chosen"
    figure, (axes,) = new_figure(2.3)
    layers = [each["layer"] for each in rows]
    axes.bar(layers, [each["none"] for each in rows], width=_BAR, label="no high channels", **HATCHED)
    axes.bar(layers, [each["chosen"] for each in rows], width=0.5 * _BAR, label="as chosen", **FILLED)
    layers_across(axes)
    axes.set_ylabel("relative error")
    figure.legend(loc="outside upper left", ncols=2)
    saved = 1 - sum(each["weight"] * each["chosen"] for each in rows) / sum(
        each["weight"] * each["none"] for each in rows
    )
    return Plot(
        title,
        inline_svg(
            figure, "high-loss", title, f"Pairs of bars. Over all blocks, each by its weight, {saved:.0%} less error."
        ),
        "What was minimised: the errors of all sites alone and what every two of them add, weights rounded to nearest. "
        f"Over all blocks, each by its weight, it is {saved:.0%} less than without high channels.",
        ("layer", "weight", "no high channels", "as chosen", *(f"added by {pair}" for pair in rows[0]["interactions"])),
        [
            (each["layer"], each["weight"], each["none"], each["chosen"], *each["interactions"].values())
            for each in rows
        ],
    )


def _alone(site: str, rows: Sequence[Mapping[str, Any]], chosen: Mapping[int, Mapping[str, int]]) -> Plot:
    title = f"Error by number of high channels: {site}"
    figure, (axes,) = new_figure(2.3)
    numbers = sorted({count for each in rows for count in each["counts"][site]})
    layers = [each["layer"] for each in rows]
    errors = [dict(zip(each["counts"][site], each["alone"][site], strict=True)) for each in rows]
    taken = [chosen[layer][site] for layer in layers]
    marks = [(layer, error) for layer, here in zip(layers, errors, strict=True) for error in here.values()]
    axes.set_yscale("log")
    axes.vlines(layers, [min(here.values()) for here in errors], [max(here.values()) for here in errors], INK, lw=0.8)
    axes.plot(*zip(*marks, strict=True), linestyle="none", marker="_", color=INK, markersize=5)
    none: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": INK, "markersize": 4.5}
    axes.plot(layers, [here[0] for here in errors], linestyle="none", **none)
    found = [here[count] for here, count in zip(errors, taken, strict=True)]
    axes.plot(layers, found, linestyle="none", marker="D", color=AFTER, markersize=4)
    layers_across(axes)
    axes.set_ylabel("relative error")
    return Plot(
        title,
        inline_svg(
            figure,
            f"high-alone-{site.replace('_', '-')}",
            title,
            f"A mark for each number tried, layer by layer; the numbers are {', '.join(map(str, numbers))}.",
        ),
        "Of the block's output with only that site rounded. A mark for each number tried: a ring is no high channel, a "
        "filled diamond the number chosen.",
        ("layer", "chosen", *(f"error with {number}" for number in numbers)),
        [
            (layer, count, *(here.get(number) for number in numbers))
            for layer, count, here in zip(layers, taken, errors, strict=True)
        ],
    )


def _stack(axes: "Axes", layers: Sequence[Mapping[str, float]]) -> None:
    """Draw what each site has in every layer, one on the other; what is nothing has no outline either."""
    below = [0.0] * len(layers)
    for site, style in _STACKED.items():
        there = [layer for layer, each in enumerate(layers) if each[site]]
        heights = [layers[layer][site] for layer in there]
        axes.bar(there, heights, width=_BAR, bottom=[below[layer] for layer in there], label=site, **style)
        below = [low + each[site] for low, each in zip(below, layers, strict=True)]
    axes.set_xlim(-0.5, len(layers) - 0.5)
