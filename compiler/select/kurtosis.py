"""Selection by the kurtosis of weights: heavy tails in attention ask for affine maps, in the FFN for rotations.

The rule is that of arXiv 2511.17809: per group of linears, a robust z-score of the excess kurtosis across the layers is
held against a threshold, with opposite directions for attention and FFN. Whether the published thresholds, 2.0 and 0.2,
are meant for the z-score or for the kurtosis itself is not said, nor how the linears of a group are joined, so both are
part of the rule here.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from planish.compiler.calibrate.power_sums import PowerSums
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import SelectionError
from planish.passes.transforms import Kind

__all__ = [
    "GROUPS",
    "KINDS",
    "Aggregate",
    "Group",
    "KurtosisChoice",
    "KurtosisRule",
    "Mode",
    "excess_kurtosis",
    "group_kurtosis",
    "read_kurtosis",
    "robust_z",
    "select_by_kurtosis",
    "weight_sums",
]

Group = Literal["attn", "ffn"]
Mode = Literal["z", "raw", "topm"]
Aggregate = Literal["mean", "max", "concat"]
Values = npt.NDArray[np.float64]

GROUPS: tuple[Group, ...] = ("attn", "ffn")
#: The kind that a group gets where its statistic is high, and where it is low.
KINDS: dict[Group, tuple[Kind, Kind]] = {"attn": ("affine", "rotation"), "ffn": ("rotation", "affine")}

_MEMBERS: dict[Group, tuple[str, ...]] = {
    "attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "ffn": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
_ATTENTION_OUTPUT = "self_attn.o_proj"
#: Entries of a weight that are held in float64 at a time.
_ENTRIES = 1 << 20
#: The standard deviation of a normal distribution over its median, and over its mean, absolute deviation.
_OVER_MAD, _OVER_MEAN_DEVIATION = 1.4826, 1.2533


@dataclasses.dataclass(frozen=True)
class KurtosisRule:
    """How kinds follow from kurtosis.

    Attributes:
        mode: what is compared: `z`, the robust z-score across the layers; `raw`, the excess kurtosis; `topm`, the rank.
        attn: an attention group is affine above this; for `topm`, this many groups are affine.
        ffn: an FFN group is rotated above this; for `topm`, this many groups are rotated.
        aggregate: how the linears of a group are joined: the mean or the largest of their kurtoses, or that of all
            their entries together.
        with_output: whether o_proj counts in the attention group.
    """

    mode: Mode = "z"
    attn: float = 2.0
    ffn: float = 0.2
    aggregate: Aggregate = "mean"
    with_output: bool = False


@dataclasses.dataclass(frozen=True)
class KurtosisChoice:
    """What one group of linears in one layer gets, and the evidence: its excess kurtosis and its robust z-score."""

    layer: int
    group: Group
    kind: Kind
    kurtosis: float
    z: float


def select_by_kurtosis(
    statistics: Mapping[Group, npt.ArrayLike], rule: KurtosisRule | None = None
) -> list[KurtosisChoice]:
    """Return a choice per layer and group, layer after layer.

    Args:
        statistics: excess kurtosis per layer, [layers], of both groups.
        rule: None is the z-score with the thresholds of the paper.

    Raises:
        SelectionError: if `topm` asks for more layers than there are.
        ValueError: if a statistic is not finite, or the groups differ in length.
    """
    rule = rule or KurtosisRule()
    columns = {}
    for group in GROUPS:
        kurtosis = np.asarray(statistics[group], np.float64)
        z = robust_z(kurtosis)
        high = _high(kurtosis, z, rule, group)
        kinds = [KINDS[group][0 if is_high else 1] for is_high in high]
        columns[group] = list(zip(kinds, kurtosis.tolist(), z.tolist(), strict=True))
    layers = zip(*(columns[group] for group in GROUPS), strict=True)
    return [
        KurtosisChoice(layer, group, *found)
        for layer, row in enumerate(layers)
        for group, found in zip(GROUPS, row, strict=True)
    ]


def _high(kurtosis: Values, z: Values, rule: KurtosisRule, group: Group) -> npt.NDArray[np.bool_]:
    limit = rule.attn if group == "attn" else rule.ffn
    if rule.mode != "topm":
        return np.asarray((z if rule.mode == "z" else kurtosis) > limit)
    if limit != int(limit) or not 0 <= limit <= len(kurtosis):
        raise SelectionError(
            f"kurtosis:topm asks for the {limit:g} layers of the heaviest tails in {group}; "
            f"ask for 0 to {len(kurtosis)}, as many as the model has."
        )
    high = np.zeros(len(kurtosis), np.bool_)
    high[np.argsort(-kurtosis, kind="stable")[: int(limit)]] = True
    return high


def robust_z(values: npt.ArrayLike, floor: float = 1e-6) -> Values:
    """Return (x - median) / scale, float64 like `values` [n].

    The scale is 1.4826 times the median absolute deviation, which is the standard deviation of normal values. Where
    that is below `floor`, because more than half of the values are equal, it is 1.2533 times the mean absolute
    deviation, and `floor` at the least: all z-scores of equal values are 0.

    Raises:
        ValueError: if there are no values, or one is not finite.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"robust z-scores need a vector of finite values, not {x}")
    off = x - np.median(x)
    scale = _OVER_MAD * np.median(np.abs(off))
    if scale < floor:
        scale = max(_OVER_MEAN_DEVIATION * np.abs(off).mean(), floor)
    return np.asarray(off / scale)


def read_kurtosis(
    checkpoint: Checkpoint, rule: KurtosisRule, progress: Callable[[int, int], None]
) -> dict[Group, Values]:
    """Return the excess kurtosis of both groups per layer, float64 [layers], of the weights as they are stored.

    Args:
        checkpoint: read one tensor at a time.
        rule: which linears are in a group, and how they are joined.
        progress: is told how many layers are done, of how many.

    Raises:
        NonFiniteWeightError: if a weight holds NaN or infinity.
    """
    layers = checkpoint.config.num_hidden_layers
    found: dict[Group, list[float]] = {group: [] for group in GROUPS}
    for layer in range(layers):
        for group in GROUPS:
            members = _MEMBERS[group] + ((_ATTENTION_OUTPUT,) if group == "attn" and rule.with_output else ())
            sums = [weight_sums(checkpoint.tensor(f"model.layers.{layer}.{member}.weight")) for member in members]
            found[group].append(group_kurtosis(sums, rule.aggregate))
        progress(layer + 1, layers)
    return {group: np.array(values) for group, values in found.items()}


def group_kurtosis(sums: Sequence[PowerSums], aggregate: Aggregate) -> float:
    """Return the excess kurtosis of several weights as one; see `KurtosisRule.aggregate`."""
    if aggregate == "concat":
        return excess_kurtosis(_joined(sums))
    kurtoses = [excess_kurtosis(each) for each in sums]
    return max(kurtoses) if aggregate == "max" else sum(kurtoses) / len(kurtoses)


def weight_sums(weight: npt.NDArray[Any]) -> PowerSums:
    """Return the power sums of all entries of a weight [out, in] of any float type, in float64, some rows at a time."""
    step = max(1, _ENTRIES // weight.shape[1])
    parts = (weight[start : start + step] for start in range(0, len(weight), step))
    return _joined([PowerSums.of(torch.from_numpy(part.astype(np.float64))) for part in parts])


def excess_kurtosis(sums: PowerSums) -> float:
    """Return mean(((w - mean) / std)^4) - 3, and 0 for a weight whose entries are all equal.

    Blocks that were added to a model and never trained have such weights, and no outliers.
    """
    if sums.second <= sums.count * (1e-12 * sums.mean) ** 2:
        return 0.0
    return sums.excess_kurtosis


def _joined(parts: Sequence[PowerSums]) -> PowerSums:
    whole = PowerSums()
    for part in parts:
        whole = whole.joined(part)
    return whole
