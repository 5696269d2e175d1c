"""The plots of a report, each with the table that says the same."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from planish.compiler.report.svg import AFTER, BEFORE, INK, LINES, MARK, drawing_style, inline_svg, new_figure
from planish.compiler.report.words import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Plot", "draw_plots"]

Row = tuple[str | int | float | None, ...]

#: What stands before and after flattening: they differ in filling and outline, not in colour alone.
_BEFORE: dict[str, Any] = {"color": "none", "edgecolor": BEFORE, "linewidth": 1.2, "hatch": "////"}
_AFTER: dict[str, Any] = {"color": AFTER}
#: Above this ratio of the largest bar to the smallest, bars would hide each other on a linear axis.
_LINEAR = 20.0

_SITE_NAMES = {
    "attn_in": "attn_in: input of q, k, v",
    "attn_out": "attn_out: input of o",
    "ffn_in": "ffn_in: input of gate, up",
    "ffn_out": "ffn_out: input of down",
    "key": "key: cached keys",
    "value": "value: cached values",
}


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


def draw_plots(facts: Mapping[str, Any]) -> dict[str, list[Plot]]:
    """Return the plots of each part of a report, by the name of the part; parts without numbers have none.

    Args:
        facts: what `gather` returns.
    """
    with drawing_style():
        return {
            "accuracy": _accuracy(facts["held_out"]),
            "size": [_sizes(facts), _cache(facts["cache"])],
            "outliers": [_channels(number, each) for number, each in enumerate(facts["loud"])],
            "errors": _errors(facts["sites"]),
            "kurtosis": _kurtosis(facts),
            "time": _stages(facts["stages"]),
        }


def _bars(name: str, title: str, values: Mapping[str, float], unit: str, styles: Sequence[Mapping[str, Any]]) -> str:
    """Draw a bar across for each of `values`, its number behind it."""
    figure, (axes,) = new_figure(0.55 + 0.3 * len(values))
    wide = max(values.values()) > _LINEAR * min(values.values()) > 0
    for place, (value, style) in enumerate(zip(values.values(), itertools.cycle(styles))):
        axes.barh(place, value, height=0.62, **style)
        axes.annotate(short(value), (value, place), (4, 0), textcoords="offset points", va="center", color=INK)
    if wide:
        axes.set_xscale("log")
    axes.margins(x=0.16)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"{unit} (logarithmic)" if wide else unit)
    said = "; ".join(f"{label}: {short(value)} {unit}" for label, value in values.items())
    return inline_svg(figure, name, title, f"Bars. {said}.")


def _accuracy(held_out: Sequence[Mapping[str, Any]]) -> list[Plot]:
    values = {row["model"]: row["perplexity"] for row in held_out if row["perplexity"]}
    if not values:
        return []
    title = "Perplexity on held-out text"
    styles = [_AFTER if "flattened" in label else {**_BEFORE, "hatch": ""} for label in values]
    return [
        Plot(
            title,
            _bars("accuracy", title, values, "perplexity", styles),
            "Lower is better. The text is the part of the calibration text that nothing was fitted to.",
            ("model", "perplexity", "cross entropy, nats", "KL divergence from float, nats"),
            [tuple(row[name] for name in ("model", "perplexity", "cross_entropy", "divergence")) for row in held_out],
        )
    ]


def _sizes(facts: Mapping[str, Any]) -> Plot:
    title = "Size on disk"
    parts = {name: size for name, size in facts["sizes"].items() if name != "total"}
    values = {"float16 checkpoint": facts["float16_bytes"] / 1e6, **{name: size / 1e6 for name, size in parts.items()}}
    return Plot(
        title,
        _bars("sizes", title, values, "MB", [{**_BEFORE, "hatch": ""}, *[_AFTER] * len(parts)]),
        "What one form of the model takes; a deployment needs one of the filled bars.",
        ("part", "MB"),
        [*values.items(), ("the whole bundle", facts["sizes"]["total"] / 1e6)],
    )


def _cache(cache: Sequence[Mapping[str, int]]) -> Plot:
    title = "KV cache of one sequence"
    values = {}
    for each in cache:
        values[f"{each['tokens']:,} tokens, float16"] = each["float16_bytes"] / 1e6
        values[f"{each['tokens']:,} tokens, here"] = each["bytes"] / 1e6
    return Plot(
        title,
        _bars("cache", title, values, "MB", [{**_BEFORE, "hatch": ""}, _AFTER]),
        "Grows with every token of context, and with every sequence that is served at once.",
        ("tokens", "float16, MB", "here, MB"),
        [(each["tokens"], each["float16_bytes"] / 1e6, each["bytes"] / 1e6) for each in cache],
    )


def _channels(number: int, site: Mapping[str, Any]) -> Plot:
    title = f"{_SITE_NAMES[site['site']]}, layer {site['layer']}"
    figure, sides = new_figure(2.3, columns=2)
    for axes, side, style in zip(sides, ("before", "after"), (BEFORE, AFTER), strict=True):
        found = site[side]
        channels = [place * site["pooled"] for place in range(len(found["max"]))]
        axes.fill_between(channels, found["max_rest"], color=style, linewidth=0, label="largest")
        axes.plot(channels, found["median"], color=INK, linewidth=0.8, label="median")
        axes.set_title(f"{side}: up to {max(found['max_rest']):.3g}")
        axes.set_xlabel("channel")
        axes.margins(x=0)
    sides[0].set_ylim(0)
    sides[0].set_ylabel("|x| / RMS of its token")
    # Where flattening has made room.
    sides[1].legend(loc="upper right")
    largest = {side: max(site[side]["max_rest"]) for side in ("before", "after")}
    neighbours = f" Each point is the largest of {site['pooled']} neighbours." if site["pooled"] > 1 else ""
    return Plot(
        title,
        inline_svg(
            figure,
            f"loud{number}",
            f"Outliers at {title}",
            f"Magnitudes by channel. Before flattening up to {largest['before']:.3g} times the RMS of a token, after "
            f"it up to {largest['after']:.3g} times.",
        ),
        f"The grid of a token has to reach its largest channel.{neighbours} Without the first token of each sequence.",
        ("", "largest", "largest without first tokens", "99 % quantile, loudest channel", "median, middle channel"),
        [
            (
                f"{side} flattening",
                max(site[side]["max"]),
                max(site[side]["max_rest"]),
                max(site[side]["q99"]),
                sorted(site[side]["median"])[len(site[side]["median"]) // 2],
            )
            for side in ("before", "after")
        ],
    )


def _errors(sites: Sequence[Mapping[str, Any]]) -> list[Plot]:
    plots = []
    for site, title in _SITE_NAMES.items():
        here = [each for each in sites if each["site"] == site and each["sqnr_db"] is not None]
        if not here:
            continue
        figure, (axes,) = new_figure(2.0)
        layers = [each["layer"] for each in here]
        before = [each["sqnr_unflattened_db"] for each in here]
        axes.bar(layers, [each["sqnr_db"] for each in here], width=0.78, label="flattened", **_AFTER)
        if None not in before:
            axes.step(layers, before, where="mid", color=INK, linewidth=1.4, label="not flattened")
            axes.plot(layers, before, linestyle="none", marker="_", color=INK, markersize=5)
        _layers_across(axes)
        axes.set_ylabel("SQNR, dB")
        figure.legend(loc="outside upper left", ncols=2)
        worst = min(here, key=lambda each: each["sqnr_db"])
        plots.append(
            Plot(
                title,
                inline_svg(
                    figure,
                    f"error-{site.replace('_', '-')}",
                    f"Errors at {title}, layer by layer",
                    f"Bars of SQNR in decibels, higher is better. The worst is layer {worst['layer']} with "
                    f"{worst['sqnr_db']:.1f} dB.",
                ),
                "",
                ("layer", "form", "SQNR flattened, dB", "SQNR not flattened, dB", "relative error"),
                [
                    (each["layer"], each["form"], each["sqnr_db"], each["sqnr_unflattened_db"], each["error"])
                    for each in here
                ],
            )
        )
    return plots


def _kurtosis(facts: Mapping[str, Any]) -> list[Plot]:
    """Draw what the kurtosis rule compared with its thresholds, for the attention groups and the FFN groups."""
    rule = facts["choice"] and facts["choice"]["rule"]
    if not rule:
        return []
    plots = []
    compared = "kurtosis" if rule["mode"] == "raw" else "z"
    for group, site, words in (("attn", "attn_in", "affine"), ("ffn", "ffn_in", "rotated")):
        here = [each for each in facts["sites"] if each["site"] == site and "z" in each["evidence"]]
        figure, (axes,) = new_figure(2.0)
        for each in here:
            style = _AFTER if each["kind"] == "affine" else _BEFORE
            axes.bar(each["layer"], each["evidence"][compared], width=0.78, **style)
        _layers_across(axes)
        note = "Filled bars are affine, hatched ones rotations."
        if rule["mode"] != "topm":
            axes.axhline(rule[group], color=MARK, linestyle="--", linewidth=1.4)
            note += f" The dashed line is the threshold, {rule[group]:g}: above it a group is {words}."
        axes.set_ylabel("robust z" if compared == "z" else "excess kurtosis")
        title = {"attn": "Kurtosis of q, k, v", "ffn": "Kurtosis of gate, up, down"}[group]
        plots.append(
            Plot(
                title,
                inline_svg(figure, f"kurtosis-{group}", title, f"Bars, layer by layer. {note}"),
                note,
                ("layer", "excess kurtosis", "robust z", "kind"),
                [(each["layer"], each["evidence"]["kurtosis"], each["evidence"]["z"], each["kind"]) for each in here],
            )
        )
    return plots


def _stages(stages: Sequence[Mapping[str, Any]]) -> list[Plot]:
    values = {each["stage"]: each["seconds"] for each in stages if each["seconds"] >= 0.05}
    if not values:
        return []
    title = "Time by stage"
    figure_rows: list[Row] = [(each["stage"], each["seconds"], each["peak_bytes"] / 1e6) for each in stages]
    return [
        Plot(
            title,
            _bars("time", title, values, "seconds", [_AFTER]),
            "Of all runs together, where one was killed and resumed.",
            ("stage", "seconds", "peak memory, MB"),
            figure_rows,
        )
    ]


def _layers_across(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.axhline(0, color=LINES, linewidth=0.8)
    axes.margins(x=0.01)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False, axis="x")
