"""What is kept of activations that are seen once, some tokens at a time: quantiles per channel, and magnitudes.

Both grow by `update` with float tensors [tokens, width], and depend on how the tokens were split in nothing but the
rounding of float64 sums.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from planish.compiler.calibrate.power_sums import PowerSums
from planish.compiler.errors import CalibrationError

__all__ = ["Magnitudes", "QuantileSketch"]

#: Bins of a sketch: the first for what is below 1e-8, the others 256 per factor of 10 from there on.
_BINS, _PER_DECADE, _LOWEST = 4096, 256, -8

#: Entries of x that are worked on at a time; bounds the memory of what is computed from them.
_ENTRIES = 1 << 22


class QuantileSketch:
    """Quantiles of |x| per channel, from a histogram of 4096 bins per channel on a logarithmic scale.

    `quantile` is within 0.46 % of torch.quantile of all |x| (with linear interpolation), relative: a bin is a factor of
    10^(1/256) wide, and what falls into it is taken for its geometric middle. Values below 1e-8 count as 0, those
    above 9.9e7 as that; the largest value of a channel is kept as it is.

    It takes 16 KiB per channel, and counts up to 2^31 tokens.

    Attributes:
        width: how many channels.
        tokens: how many tokens were seen.
        max_abs: the largest |x| of each channel, float32 [width]; 0 before any token.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.tokens = 0
        self.max_abs = torch.zeros(width)
        self._counts = torch.zeros(width, _BINS, dtype=torch.int32)

    def update(self, x: Tensor) -> None:
        """Count the tokens `x`, float [tokens, width].

        Raises:
            CalibrationError: if a value is NaN or infinite.
            ValueError: if the shape is not [tokens, width].
        """
        for part in _parts(x, self.width):
            magnitude = part.float().abs()
            self.max_abs = torch.maximum(self.max_abs, _largest(magnitude))
            bins = ((magnitude.log10_() - _LOWEST) * _PER_DECADE).floor_().add_(1).clamp_(0, _BINS - 1)
            flat = (bins.to(torch.int64) + torch.arange(self.width) * _BINS).flatten()
            self._counts.view(-1).index_add_(0, flat, torch.ones((), dtype=torch.int32).expand(len(flat)))
            self.tokens += len(part)

    def quantile(self, q: float) -> Tensor:
        """Return the `q`-quantile of |x| of each channel, float32 [width]; that of q = 1 is exact.

        Raises:
            ValueError: if `q` is not in [0, 1], or no token was seen.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q must be from 0 to 1, not {q}")
        if not self.tokens:
            raise ValueError("no token was seen yet")
        rank = q * (self.tokens - 1)
        low, high = self._ranked(math.floor(rank)), self._ranked(math.ceil(rank))
        return torch.lerp(low, high, rank - math.floor(rank))

    def _ranked(self, rank: int) -> Tensor:
        """Return the value of each channel that `rank` others are below, float32 [width]."""
        if rank == self.tokens - 1:
            return self.max_abs
        # The first bin up to which more than `rank` values lie.
        ranks = torch.full((self.width, 1), rank, dtype=torch.int32)
        bins = torch.searchsorted(self._counts.cumsum(1, dtype=torch.int32), ranks, right=True)[:, 0]
        middle = 10 ** ((bins.double() - 0.5) / _PER_DECADE + _LOWEST)
        return torch.minimum(torch.where(bins == 0, 0.0, middle).float(), self.max_abs)


class Magnitudes:
    """How large activations are: per channel, per token, and how heavy the tails of all entries are.

    Attributes:
        width: how many channels, n.
        tokens: how many tokens were seen.
        max_abs: the largest |x| of each channel, float32 [n]; 0 before any token.
        max_abs_rest: the same without the first token of each sequence, whose activations are unlike all others.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.tokens = 0
        self.max_abs, self.max_abs_rest = torch.zeros(width), torch.zeros(width)
        self._crests, self._loud = 0.0, 0
        self._entries = PowerSums()

    def update(self, x: Tensor, *, first: Tensor | None = None) -> None:
        """Add the tokens `x`.

        Args:
            x: float [tokens, width].
            first: bool [tokens], True at the first token of a sequence; None means that none is one.

        Raises:
            CalibrationError: if a value of `x` is NaN or infinite.
            ValueError: if a shape is wrong.
        """
        first = torch.zeros(len(x), dtype=torch.bool) if first is None else first
        if first.shape != x.shape[:1]:
            raise ValueError(f"first {tuple(first.shape)} for {len(x)} tokens")
        start = 0
        for part in _parts(x, self.width):
            here = slice(start, start + len(part))
            start += len(part)
            magnitude = part.float().abs()
            self.max_abs = torch.maximum(self.max_abs, _largest(magnitude))
            self.max_abs_rest = torch.maximum(self.max_abs_rest, _largest(magnitude[~first[here]]))
            exact = part.double()
            rms = exact.square().mean(1).sqrt()
            loud = rms > 0
            self._crests += float((magnitude.amax(1)[loud] / rms[loud]).sum())
            self._loud += int(loud.sum())
            self._entries = self._entries.joined(PowerSums.of(exact))
            self.tokens += len(part)

    @property
    def crest(self) -> float:
        """Mean over tokens of max|x| / rms(x): how many times its RMS the grid of a token has to span.

        Tokens of zeros do not count; NaN where there are no others. It is 1 for entries of equal magnitude, and about
        sqrt(2 ln n) for normal ones.
        """
        return self._crests / self._loud if self._loud else math.nan

    @property
    def rms(self) -> float:
        """Root mean square of all entries; NaN where there are none."""
        entries = self._entries
        return math.sqrt(entries.second / entries.count + entries.mean**2) if entries.count else math.nan

    @property
    def excess_kurtosis(self) -> float:
        """Excess kurtosis of all entries of x together: 0 for normal ones, NaN if all are equal or there are none."""
        return self._entries.excess_kurtosis


def _parts(x: Tensor, width: int) -> Iterator[Tensor]:
    """Yield `x` some tokens at a time."""
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"activations have shape {tuple(x.shape)}, not [tokens, {width}]")
    step = max(1, _ENTRIES // width)
    yield from (x[start : start + step] for start in range(0, len(x), step))


def _largest(magnitude: Tensor) -> Tensor:
    """Return the largest of each column, [width]; 0 where there are no rows."""
    if not len(magnitude):
        return magnitude.new_zeros(magnitude.shape[1])
    largest = magnitude.amax(0)
    bad = int((~largest.isfinite()).sum())
    if bad:
        raise CalibrationError(
            f"The activations of {bad} of {len(largest)} channels are not finite. "
            "The model overflows on this text; check its weights, or calibrate on another text."
        )
    return largest
