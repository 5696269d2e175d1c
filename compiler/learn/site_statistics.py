"""What flows through a block: how large activations are at every site before it is flattened and after."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish.compiler.calibrate.statistics import Magnitudes, QuantileSketch
from planish.compiler.learn.block import Angles, Block, FloatHooks, run_block
from planish.compiler.learn.low_bit import LowBitHooks
from planish.passes.transforms import Site

__all__ = ["PROFILE", "SiteStatistics", "WatchedFloat", "WatchedLowBit", "float_statistics"]

#: What is kept per channel, over tokens, of |x| as a multiple of the token's RMS: the largest with the first token of
#: every sequence and without it, and two quantiles without it.
PROFILE = ("max", "max_rest", "q99", "median")
#: Tokens that the quantiles of a profile are of: a histogram per channel would take as much memory as a block.
_SAMPLE = 256


class SiteStatistics:
    """Statistics of the activations at one site; cached heads are rounded each for itself, all others whole."""

    def __init__(self, width: int, grids: int = 1) -> None:
        """Expect `grids` vectors of `width` channels per token, each with a grid of its own."""
        self._magnitudes = [Magnitudes(width) for _ in range(grids)]
        self._entries = QuantileSketch(1)
        self._largest, self._largest_rest = torch.zeros(grids * width), torch.zeros(grids * width)
        self._sample = torch.zeros(0, grids * width)

    def update(self, x: Tensor) -> None:
        """Add activations [batch, seq, grids * width]; the first token of every sequence is one unlike the others.

        Raises:
            CalibrationError: if one is NaN or infinite.
        """
        batch, length, _ = x.shape
        rows = x.detach().float().cpu().flatten(0, 1)
        first = (torch.arange(length) == 0).repeat(batch)
        parts = rows.chunk(len(self._magnitudes), 1)
        for magnitudes, part in zip(self._magnitudes, parts, strict=True):
            magnitudes.update(part, first=first)
        self._entries.update(rows.reshape(-1, 1))
        relative = torch.cat([part / part.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30) for part in parts], 1)
        relative.abs_()
        self._largest = torch.maximum(self._largest, relative.amax(0))
        if length > 1:
            rest = relative[~first]
            self._largest_rest = torch.maximum(self._largest_rest, rest.amax(0))
            self._sample = torch.cat([self._sample, rest[: _SAMPLE - len(self._sample)]])

    def numbers(self) -> dict[str, float]:
        """Return statistics of all entries, those that are defined.

        `absmax` and `absmax_rest` are the largest |x| with and without first tokens; `median`, `q99` and `q999` are
        quantiles of |x|; `rms`; `crest` is the mean over tokens (and heads) of max|x| / rms(x), which is how far a grid
        reaches beyond what it mostly holds; `kurtosis` is the excess kurtosis of all entries, of heads their mean.
        """
        found = {
            "absmax": max(float(each.max_abs.max()) for each in self._magnitudes),
            "absmax_rest": max(float(each.max_abs_rest.max()) for each in self._magnitudes),
            "rms": math.sqrt(_mean([each.rms**2 for each in self._magnitudes])),
            "median": float(self._entries.quantile(0.5)),
            "q99": float(self._entries.quantile(0.99)),
            "q999": float(self._entries.quantile(0.999)),
            "crest": _mean([each.crest for each in self._magnitudes]),
            "kurtosis": _mean([each.excess_kurtosis for each in self._magnitudes]),
        }
        return {name: number for name, number in found.items() if math.isfinite(number)}

    def profile(self) -> npt.NDArray[np.float32]:
        """Return `PROFILE` of every channel, float32 [4, channels]."""
        sample = self._sample if len(self._sample) else self._largest[None]
        rows = (self._largest, self._largest_rest, sample.quantile(0.99, dim=0), sample.quantile(0.5, dim=0))
        return torch.stack(rows).numpy()


class WatchedFloat(FloatHooks):
    """The block as the checkpoint has it, with statistics of what flows."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.statistics: dict[Site, SiteStatistics] = _empty(block)

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Return `x`."""
        self.statistics[site].update(x)
        return x

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the arguments."""
        self.statistics["key"].update(_side_by_side(key))
        self.statistics["value"].update(_side_by_side(value))
        return query, key, value


class WatchedLowBit:
    """A flattened block on its grids, with statistics of what comes to them, transformed and not yet rounded."""

    def __init__(self, block: Block, hooks: LowBitHooks) -> None:
        self.statistics: dict[Site, SiteStatistics] = _empty(block)
        self.gain, self.linear = hooks.gain, hooks.linear
        self._hooks = hooks

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Return the transformed input on its grid."""
        self.statistics[site].update(self._hooks.transform(site, x))
        return self._hooks.site(site, x)

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, and keys and values as the cache gives them back."""
        self.statistics["key"].update(_side_by_side(self._hooks.map_keys(query, key)[1]))
        self.statistics["value"].update(_side_by_side(value))
        return self._hooks.heads(query, key, value)


def float_statistics(block: Block, x: Tensor, angles: Angles) -> tuple[dict[Site, SiteStatistics], Tensor]:
    """Return the statistics of a float block for `x` [batch, seq, hidden], taken one by one, and its outputs."""
    hooks = WatchedFloat(block)
    outputs = torch.cat([run_block(block.config, hooks, part, angles) for part in torch.split(x, 1)])
    return hooks.statistics, outputs


def _empty(block: Block) -> dict[Site, SiteStatistics]:
    config = block.config
    key, value = (SiteStatistics(config.head_dim, config.num_key_value_heads) for _ in range(2))
    return {
        "attn_in": SiteStatistics(config.hidden_size),
        "attn_out": SiteStatistics(config.q_size),
        "ffn_in": SiteStatistics(config.hidden_size),
        "ffn_out": SiteStatistics(config.intermediate_size),
        "key": key,
        "value": value,
    }


def _side_by_side(heads: Tensor) -> Tensor:
    """Return heads [batch, heads, seq, d] as [batch, seq, heads * d]."""
    return heads.transpose(1, 2).flatten(2)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)
