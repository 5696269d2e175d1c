"""The plots of a report, each with the table that says the same."""

from collections.abc import Mapping, Sequence
from typing import Any

from planish.compiler.report.drawing import EMPTY, FILLED, HATCHED, Plot, Row, bars, layers_across
from planish.compiler.report.high_plots import high_plots
from planish.compiler.report.svg import AFTER, BEFORE, INK, MARK, drawing_style, inline_svg, new_figure

__all__ = ["draw_plots"]

_SITE_NAMES = {
    "attn_in": "attn_in: input of q, k, v",
    "attn_out": "attn_out: input of o",
    "ffn_in": "ffn_in: input of gate, up",
    "ffn_out": "ffn_out: input of down",
    "key": "key: cached keys",
    "value": "value: cached values",
}


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
            "high": high_plots(facts["high_impact"]),
            "time": _stages(facts["stages"]),
        }


def _accuracy(held_out: Sequence[Mapping[str, Any]]) -> list[Plot]:
    values = {row["model"]: row["perplexity"] for row in held_out if row["perplexity"]}
    if not values:
        return []
    title = "Perplexity on held-out text"
    styles = [FILLED if "flattened" in label else EMPTY for label in values]
    return [
        Plot(
            title,
            bars("accuracy", title, values, "perplexity", styles),
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
        bars("sizes", title, values, "MB", [EMPTY, *[FILLED] * len(parts)]),
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
        bars("cache", title, values, "MB", [EMPTY, FILLED]),
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
        axes.bar(layers, [each["sqnr_db"] for each in here], width=0.78, label="flattened", **FILLED)
        if None not in before:
            axes.step(layers, before, where="mid", color=INK, linewidth=1.4, label="not flattened")
            axes.plot(layers, before, linestyle="none", marker="_", color=INK, markersize=5)
        layers_across(axes)
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
            style = FILLED if each["kind"] == "affine" else HATCHED
            axes.bar(each["layer"], each["evidence"][compared], width=0.78, **style)
        layers_across(axes)
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
            bars("time", title, values, "seconds", [FILLED]),
            "Of all runs together, where one was killed and resumed.",
            ("stage", "seconds", "peak memory, MB"),
            figure_rows,
        )
    ]
