"""Sums of the powers of many numbers about their mean, joined from those of parts of them."""

import dataclasses
import math

from torch import Tensor

__all__ = ["PowerSums"]


@dataclasses.dataclass(frozen=True)
class PowerSums:
    """Of some numbers: how many, their mean, and the sums of (x - mean)^2, ^3 and ^4.

    Sums of plain powers would cancel where the mean is large; these are joined by the formulas of Pébay, "Formulas for
    robust, one-pass parallel computation of covariances and arbitrary-order statistical moments" (SAND2008-6212).
    """

    count: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    @classmethod
    def of(cls, x: Tensor) -> "PowerSums":
        """Return the sums over all entries of `x`, float64."""
        if not x.numel():
            return cls()
        mean = x.mean()
        off = x - mean
        square = off * off
        return cls(
            x.numel(), mean.item(), square.sum().item(), (square * off).sum().item(), (square * square).sum().item()
        )

    def joined(self, other: "PowerSums") -> "PowerSums":
        """Return the sums over the numbers of both."""
        if not self.count or not other.count:
            return self if self.count else other
        a, b = self.count, other.count
        n, delta = a + b, other.mean - self.mean
        return PowerSums(
            n,
            self.mean + delta * b / n,
            self.second + other.second + delta**2 * a * b / n,
            self.third
            + other.third
            + delta**3 * a * b * (a - b) / n**2
            + 3 * delta * (a * other.second - b * self.second) / n,
            self.fourth
            + other.fourth
            + delta**4 * a * b * (a**2 - a * b + b**2) / n**3
            + 6 * delta**2 * (a**2 * other.second + b**2 * self.second) / n**2
            + 4 * delta * (a * other.third - b * self.third) / n,
        )

    @property
    def excess_kurtosis(self) -> float:
        """mean(((x - mean) / std)^4) - 3: 0 for a normal distribution, NaN if all numbers are equal."""
        return self.count * self.fourth / self.second**2 - 3 if self.second else math.nan
