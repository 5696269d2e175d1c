"""Thresholds of the kurtosis rule from errors that were measured, and how good the rule is against them.

The paper sets its thresholds by hand. Here the errors of both kinds on held-out sequences decide, and the same numbers
say whether kurtosis tells anything about a model: whether its order agrees with the order of what is gained.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau

from planish.compiler.select.kurtosis import KINDS, Group

__all__ = ["Calibration", "calibrate_threshold", "kendall_tau"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A threshold, what it costs, and what it is to be compared with. Errors are sums over the layers.

    Attributes:
        group: attn or ffn.
        threshold: groups whose statistic is above it get the kind that the rule gives to high ones.
        affine: how many layers get an affine transform.
        error: of the rule with this threshold.
        oracle: of the better kind in each layer.
        all_affine: of affine transforms everywhere.
        all_rotation: of rotations everywhere.
        tau: Kendall's tau-b between the statistic and the gain of affine transforms, rotation error less affine error;
            NaN where either is constant.
        p_value: how probable a tau as far from 0 is where the two have nothing to do with each other; NaN like tau.
        agrees: whether tau has the sign that the rule assumes: positive for attn, negative for ffn.
    """

    group: Group
    threshold: float
    affine: int
    error: float
    oracle: float
    all_affine: float
    all_rotation: float
    tau: float
    p_value: float
    agrees: bool

    @property
    def regret(self) -> float:
        """How much worse than the oracle the rule is, relative; infinite where the oracle is without error."""
        if self.error == self.oracle:
            return 0.0
        return (self.error - self.oracle) / self.oracle if self.oracle else math.inf


def calibrate_threshold(
    group: Group, statistic: npt.ArrayLike, affine_errors: npt.ArrayLike, rotation_errors: npt.ArrayLike
) -> Calibration:
    """Return the threshold of least error: halfway between two neighbouring values, or outside of all of them.

    Of several that are equally good it is the lowest. Outside means by 1, so that the threshold stays finite.

    Args:
        group: attn or ffn; decides which kind is for high values.
        statistic: kurtosis or z-score of each layer, [layers].
        affine_errors: error on held-out sequences where the layer's group has an affine transform, [layers].
        rotation_errors: the same with a rotation, [layers].

    Raises:
        ValueError: if the lengths differ, there are no layers, or a number is not finite.
    """
    s, affine, rotation = (np.asarray(each, np.float64) for each in (statistic, affine_errors, rotation_errors))
    if not (s.ndim == 1 and s.size and s.shape == affine.shape == rotation.shape):
        raise ValueError(f"a threshold needs as many errors as layers, not {s.shape}, {affine.shape}, {rotation.shape}")
    if not np.isfinite([s, affine, rotation]).all():
        raise ValueError("a threshold needs finite statistics and errors")
    sign = 1 if KINDS[group][0] == "affine" else -1
    above, below = (affine, rotation) if sign > 0 else (rotation, affine)
    values = np.unique(s)
    thresholds = np.concatenate([[values[0] - 1], (values[1:] + values[:-1]) / 2, [values[-1] + 1]])
    errors = np.array([np.where(s > threshold, above, below).sum() for threshold in thresholds])
    best = int(errors.argmin())
    high = int((s > thresholds[best]).sum())
    tau, p_value = kendall_tau(s, rotation - affine)
    return Calibration(
        group=group,
        threshold=float(thresholds[best]),
        affine=high if sign > 0 else len(s) - high,
        error=float(errors[best]),
        oracle=float(np.minimum(affine, rotation).sum()),
        all_affine=float(affine.sum()),
        all_rotation=float(rotation.sum()),
        tau=tau,
        p_value=p_value,
        agrees=bool(sign * tau > 0),
    )


def kendall_tau(one: npt.ArrayLike, other: npt.ArrayLike) -> tuple[float, float]:
    """Return Kendall's tau-b of two series and its p-value, both NaN where one is constant or there is one layer."""
    if np.size(one) < 2:
        return math.nan, math.nan
    found = kendalltau(one, other)
    return float(found.statistic), float(found.pvalue)
