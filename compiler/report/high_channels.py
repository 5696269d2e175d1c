"""What a report says of high-impact channels: how many there are, the bits they take, and the losses that chose."""

import itertools
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from planish.passes.scheme import LinearFormat
from planish.passes.transforms import SITE_MODULES, Site

__all__ = ["high_facts"]


def high_facts(
    linears: Sequence[Mapping[str, Any]], stored: Mapping[tuple[int, Site], int], evidence: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Return what report.json has under `high_impact`; None where a bundle has no such channels.

    `bits` are those that such channels have; `policy` is how they were chosen, None where they were given; `widths` are
    the channels of each site. `layers` has for every block `counts`, how many are high by site; `low_bits`, stored bits
    per weight if none were; `added_bits`, what they add to that by site, the order of the channels counted; and
    `stored_bits`, both together. `losses` has for every block that was measured, relative errors of its output:
    `weight` is what they count by, `counts` the numbers tried by site, `alone` the error with each of them,
    `interactions` what every two sites at the chosen numbers add to the sum of theirs, and `none` and `chosen` the
    error with no high channel and with the chosen numbers, by that sum.

    Args:
        linears: of plan.json.
        stored: bits of every block and site; see `stored_bits`.
        evidence: `high_impact` of plan.json; None where channels were given.
    """
    found = {linear["module"]: linear for linear in linears}
    bits = sorted({linear["high"]["bits"] for linear in linears if "high" in linear})
    if not bits:
        return None
    layers = sorted({layer for layer, _ in stored})
    return {
        "bits": bits,
        "policy": None if evidence is None else _policy(evidence),
        "widths": {
            site: found[f"model.layers.{layers[0]}.{modules[0]}"]["shape"][1] for site, modules in SITE_MODULES.items()
        },
        "layers": [_layer(layer, found, stored) for layer in layers],
        "losses": [] if evidence is None else _losses(evidence),
    }


def _policy(evidence: Mapping[str, Any]) -> dict[str, Any]:
    return {name: evidence[name] for name in evidence if name not in ("bits", "block_weights", "counts", "losses")}


def _layer(layer: int, found: Mapping[str, Any], stored: Mapping[tuple[int, Site], int]) -> dict[str, Any]:
    counts, low, added, weights = {}, 0, {}, 0
    for site, modules in SITE_MODULES.items():
        here = [found[f"model.layers.{layer}.{module}"] for module in modules]
        counts[site] = here[0].get("high", {"count": 0})["count"]
        without = sum(_without_high(linear) for linear in here)
        added[site], low = stored[layer, site] - without, low + without
        weights += sum(prod(linear["shape"]) for linear in here)
    return {
        "layer": layer,
        "counts": counts,
        "low_bits": low / weights,
        "added_bits": {site: bits / weights for site, bits in added.items()},
        "stored_bits": (low + sum(added.values())) / weights,
    }


def _without_high(linear: Mapping[str, Any]) -> int:
    """Return the bits of a linear all of whose channels have the format of most of them."""
    form = LinearFormat(linear["weight_bits"], linear["activation_bits"], linear["group"])
    rows, width = linear["shape"]
    return int(rows * (width * form.weight_bits + form.groups(width) * form.scale_bits))


def _losses(evidence: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for layer, measured in enumerate(evidence["losses"]):
        tried, alone = measured["counts"], measured["alone"]
        none = dict.fromkeys(tried, 0)
        chosen = {site: counts.index(evidence["counts"][layer][site]) for site, counts in tried.items()}
        acting = _interactions(measured, chosen)
        rows.append(
            {
                "layer": layer,
                "weight": evidence["block_weights"][layer],
                "counts": tried,
                "alone": alone,
                "interactions": acting,
                "none": _alone(alone, none) + sum(_interactions(measured, none).values()),
                "chosen": _alone(alone, chosen) + sum(acting.values()),
            }
        )
    return rows


def _alone(alone: Mapping[str, Sequence[float]], taken: Mapping[str, int]) -> float:
    return sum(alone[site][place] for site, place in taken.items())


def _interactions(measured: Mapping[str, Any], taken: Mapping[str, int]) -> dict[str, float]:
    """Return C of every two sites where each takes the candidate that `taken` says; see `PairLosses`."""
    alone, together = measured["alone"], measured["together"]
    return {
        f"{first} and {second}": together[first][second][taken[first]][taken[second]]
        - alone[first][taken[first]]
        - alone[second][taken[second]]
        for first, second in itertools.combinations(measured["counts"], 2)
    }
