"""What `planish inspect` draws in a terminal: the facts of a report in one screen, or one layer, or outliers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from planish.compiler.cli.app import Output, plain_table
from planish.compiler.cli.high_view import high_of_layer, high_table
from planish.compiler.report.words import ratio, runs, short, size
from planish.passes.transforms import SITES

if TYPE_CHECKING:
    from planish.compiler.measure.outliers import LayerOutliers

__all__ = ["show_bundle", "show_layer", "show_outliers"]

_LOUDEST = 10


def show_bundle(facts: Mapping[str, Any], engines: Mapping[str, str], out: Output) -> None:
    """Show what is in a bundle, whether it works, and what it cost; `engines` says which run on this machine."""
    verdict = facts["verdict"]
    if facts["verification"]:
        out.line(f"{verdict['title']}.")
        for sentence in verdict["sentences"]:
            out.line(sentence)
        out.line("")
    sizes = ", ".join(f"{part} {size(count)}" for part, count in facts["sizes"].items())
    cache = "".join(f"; {size(each['bytes'])} at {each['tokens']:,} tokens" for each in facts["cache"])
    out.rows(
        {
            "model": f"{facts['model']}, {facts['layers']} layers",
            "scheme": f"{facts['scheme']}, lm_head {facts['lm_head']}",
            **_overrides(facts),
            "linears": f"{facts['linears']} quantised, {facts['skipped']} in floating point",
            "bits per weight": (
                f"{facts['average_bits']:.3f} linears, {facts['lm_head_bits']:.3f} lm_head; scales counted"
            ),
            "KV cache": (
                f"{facts['kv_bytes_per_token']} bytes per token, {ratio(facts['kv_saving'])} than float16{cache}"
            ),
            "context": f"{facts['max_context']} tokens",
            "targets": ", ".join(facts["targets"]) or "none: the portable model alone",
            "sizes": sizes,
            **{f"engine {target}": state for target, state in engines.items()},
            **_effort(facts["stages"]),
        }
    )
    if facts["held_out"]:
        out.show(_accuracy(facts["held_out"]))
    if facts["choice"]:
        out.show(_sites(facts))
    if facts["high_impact"]:
        out.show(high_table(facts["high_impact"]))
    for notice in facts["notices"]:
        out.line(f"- {notice}")
    if facts["choice"]:
        out.line("One layer: --layer N. Everything: report/report.html in the bundle.")


def show_layer(
    layer: int,
    sites: Sequence[Mapping[str, Any]],
    linears: Sequence[Mapping[str, Any]],
    high: Mapping[str, Any] | None,
    out: Output,
) -> None:
    """Show the sites, the linears and the high-impact channels of one layer, as the facts of a report have them."""
    if sites:
        table = plain_table(
            f"layer {layer}: sites, before -> after flattening",
            ("site", "form", "clip", "SQNR, dB", "crest", "kurtosis", "max |x|", "MFLOPs"),
        )
        for each in sites:
            found = each["evidence"]
            form = each["form"] if each["form"] == each["kind"] else f"{each['form']}, {each['kind']}"
            more = f", {each['high']['count']} at {each['high']['bits']} bits" if "high" in each else ""
            table.add_row(
                each["site"],
                f"{form}{more}",
                _number(found.get("clip")),
                _arrow(each["sqnr_unflattened_db"], each["sqnr_db"]),
                *(
                    _arrow(found.get(f"{name}_before"), found.get(f"{name}_after"))
                    for name in ("crest", "kurtosis", "absmax")
                ),
                f"{each['cost_flops'] / 1e6:.3g}",
            )
        out.show(table)
        for each in sites:
            if each["measured"]:
                errors = ", ".join(f"{form} {error:.3g}" for form, error in each["measured"].items())
                out.line(f"{each['site']}: measured errors {errors}")
    if high:
        for line in high_of_layer(high, layer):
            out.line(line)
    if linears:
        table = plain_table(f"layer {layer}: linears", ("module", "format", "bits", "weight SQNR, dB"))
        for each in linears:
            sqnr = each["weight_sqnr_db"]
            table.add_row(
                each["module"].partition(f"layers.{layer}.")[2],
                each["format"],
                f"{each['average_bits']:.3f}",
                "exact" if sqnr is None else f"{sqnr:.2f}",
            )
        out.show(table)
    if not sites and not linears:
        out.line(f"layer {layer}: in floating point, nothing is flattened")


def show_outliers(model: str, found: Sequence["LayerOutliers"], tokens: int, out: Output) -> None:
    """Show heavy tails of weights and crests of activations by layer, and the loudest sites in detail."""
    out.line(f"{model}: {tokens} tokens")
    table = plain_table(
        "kurtosis of weights (robust z), and crest of activations: largest |x| of a token / RMS",
        ("layer", "q, k, v", "gate, up, down", *SITES),
    )
    for each in found:
        groups = (f"{of['kurtosis']:.2f} ({of['z']:+.1f})" for of in each.groups.values())
        table.add_row(str(each.layer), *groups, *(_number(each.sites[site].get("crest")) for site in SITES))
    out.show(table)
    places = [(each, site) for each in found for site in SITES]
    loudest = sorted(places, key=lambda place: -place[0].sites[place[1]].get("crest", 0.0))[:_LOUDEST]
    table = plain_table(
        "the loudest sites",
        ("layer", "site", "crest", "max |x|", "but first tokens", "/ median", "99.9 %", "kurtosis"),
    )
    for each, site in loudest:
        names = ("crest", "absmax", "absmax_rest", "peak", "q999", "kurtosis")
        table.add_row(str(each.layer), site, *(_number(each.sites[site].get(name)) for name in names))
    out.show(table)


def _overrides(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return what the overrides of the recipe say, and what they made of the scheme."""
    asked = [
        f"{expression}: {', '.join(f'{name} {value}' for name, value in override.items() if value is not None)}"
        for expression, override in facts["recipe"].get("overrides", {}).items()
    ]
    made = [
        f"{each['format']} at {each['site']} of {'layer' if len(each['layers']) == 1 else 'layers'} "
        f"{runs(each['layers'])}"
        for each in facts["formats"]
    ]
    named = {"but for": made, "overrides": asked}
    return {name: "; ".join(each) for name, each in named.items() if each}


def _effort(stages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    if not stages:
        return {}
    longest = sorted(stages, key=lambda each: -each["seconds"])[:3]
    named = ", ".join(f"{each['stage']} {each['seconds']:.0f} s" for each in longest)
    total, peak = sum(each["seconds"] for each in stages), max(each["peak_bytes"] for each in stages)
    return {"compiled in": f"{total:.0f} s ({named}), at most {size(peak)} of memory"}


def _accuracy(held_out: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table("held-out text", ("model", "perplexity", "KL from float, nats"))
    for row in held_out:
        table.add_row(row["model"], _number(row["perplexity"]), _number(row["divergence"]))
    return table


def _sites(facts: Mapping[str, Any]) -> Table:
    """Return a row per site: its forms, and its errors before and after, in the mean over layers and at the worst."""
    table = plain_table(
        f"sites ({facts['choice']['policy']}): before -> after flattening, mean of layers",
        ("site", "forms", "SQNR, dB", "worst layer", "crest"),
    )
    for site in SITES:
        here = [each for each in facts["sites"] if each["site"] == site]
        forms = ", ".join(f"{count} {form}" for form, count in Counter(each["form"] for each in here).most_common())
        rounded = [each for each in here if each["sqnr_db"] is not None]
        worst = min(rounded, key=lambda each: each["sqnr_db"], default=None)
        table.add_row(
            site,
            forms,
            _arrow(_mean(each["sqnr_unflattened_db"] for each in here), _mean(each["sqnr_db"] for each in here)),
            "" if worst is None else f"{worst['sqnr_db']:.1f} in {worst['layer']}",
            _arrow(
                _mean(each["evidence"].get("crest_before") for each in here),
                _mean(each["evidence"].get("crest_after") for each in here),
            ),
        )
    return table


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _arrow(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return _number(after)
    return f"{_number(before)} -> {_number(after)}"


def _number(value: float | None) -> str:
    return "-" if value is None else short(value)
