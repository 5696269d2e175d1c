"""What `planish inspect` draws of high-impact channels: how many there are, layer by layer, and what chose them."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from planish.compiler.cli.app import plain_table
from planish.compiler.report.words import short

__all__ = ["high_of_layer", "high_table"]


def high_table(high: Mapping[str, Any]) -> Table:
    """Return a row for each site, as `high_facts` has them, with a digit for each layer."""
    table = plain_table(
        f"high-impact channels of {' and '.join(map(str, high['bits']))} bits; tenths of the channels, layer by layer",
        ("site", "mean", "from", "to", "of", "bits added", "layers"),
    )
    layers = high["layers"]
    for site, width in high["widths"].items():
        counts = [each["counts"][site] for each in layers]
        added = sum(each["added_bits"][site] for each in layers) / len(layers)
        table.add_row(
            site,
            short(sum(counts) / len(counts)),
            *(f"{count:,}" for count in (min(counts), max(counts), width)),
            f"{added:.3f}",
            # A part of a tenth is 0, so that nothing at all has a mark of its own.
            "".join(str(10 * count // width) if count else "." for count in counts),
        )
    return table


def high_of_layer(high: Mapping[str, Any], layer: int) -> Iterator[str]:
    """Yield what there is at one layer, and the errors of the numbers that were tried, a sentence each."""
    here = high["layers"][layer]
    counts = ", ".join(f"{site} {count} of {high['widths'][site]}" for site, count in here["counts"].items())
    yield f"high-impact channels: {counts}; {here['stored_bits']:.3f} bits per weight, {here['low_bits']:.3f} without"
    for each in high["losses"]:
        if each["layer"] != layer:
            continue
        yield (
            f"error of the block, weights rounded to nearest: {each['none']:.3g} without them, {each['chosen']:.3g} "
            f"with them; weight {short(each['weight'])}"
        )
        for site, numbers in each["counts"].items():
            errors = ", ".join(
                f"{number}: {error:.3g}" + (" (chosen)" if number == here["counts"][site] else "")
                for number, error in zip(numbers, each["alone"][site], strict=True)
            )
            yield f"{site} alone, error by number of high channels: {errors}"
        acting = ", ".join(f"{pair}: {added:+.2g}" for pair, added in each["interactions"].items())
        yield f"added by every two sites: {acting}"
