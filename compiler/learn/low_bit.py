"""A decoder block on the grids of a scheme, computed in floating point: what the compiled model will compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

from planish.compiler.learn.block import Block
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.quantize.arithmetic import channels_of, dequantize_kv, quantize_kv
from planish.passes.high_impact import HighImpact, Segment, segments
from planish.passes.scheme import FLOAT_BITS, Scheme
from planish.passes.transforms import Site
from planish.plugins.ops.quantize_activation import SMALLEST_SCALE

__all__ = ["LowBitHooks", "Reached", "round_activation", "round_cached", "round_inputs", "round_mapped"]


class Reached(Exception):  # noqa: N818 - it ends a run early and is no error
    """The site that a run was to stop at was reached; holds what came there, transformed and not yet rounded."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def round_activation(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Return `x` [..., n] on the grid of `quantize_activation`; see there."""
    if bits == FLOAT_BITS:
        return x
    zero = 1 << (bits - 1)
    scale = (x.abs().amax(-1, keepdim=True) * (clip / (zero - 1))).clamp_min(SMALLEST_SCALE)
    return (x / scale).round_().clamp_(-zero, zero - 1) * scale


def round_inputs(x: Tensor, parts: Sequence[Segment]) -> Tensor:
    """Return `x` [..., n] on the grids of its segments, each of which has a scale per token; channels stay in order."""
    if len(parts) == 1:
        return round_activation(x, parts[0].format.activation_bits, parts[0].format.clip)
    if all(part.format.weight_only for part in parts):
        return x
    rounded = torch.empty_like(x)
    for part in parts:
        assert part.channels is not None
        rounded[..., torch.from_numpy(part.channels)] = round_activation(
            channels_of(x, part), part.format.activation_bits, part.format.clip
        )
    return rounded


class LowBitHooks:
    """Hooks that put transforms and grids into a folded block.

    Attributes:
        weights: float32 [out, in] by module, on their grids, for the modules rounded so far.
        high: the high-impact channels, by site that has any.
        clips: by site, for the sites done so far; of `key` and `value`, the share of a head's range.
        stop: the site to raise `Reached` at, if any.
    """

    def __init__(self, folded: Block, factors: dict[Site, Factors], scheme: Scheme) -> None:
        """Take the block as `fold_block` returns it, and the factors it was folded with."""
        self.weights: dict[str, Tensor] = {}
        self.high: dict[Site, HighImpact] = {}
        self.clips: dict[Site, float] = {}
        self.stop: Site | None = None
        self._folded = folded
        self._online = {site: Factors(each.kind, None, each.right, each.left) for site, each in factors.items()}
        self._scheme = scheme
        key = self._online["key"].right
        self._key_map = None if key is None else key.expand(folded.config.num_key_value_heads, -1, -1)

    def gain(self, norm: str) -> Tensor:
        """Return the folded gain."""
        return self._folded.weight(norm)

    def transform(self, site: Site, x: Tensor) -> Tensor:
        """Return what runs online at `site`."""
        return self._online[site].apply(x)

    def site(self, site: Site, x: Tensor) -> Tensor:
        """Return the transformed input on its grid.

        Raises:
            Reached: at the site to stop at.
        """
        x = self.transform(site, x)
        if self.stop == site:
            raise Reached(x)
        return round_inputs(x, segments(self._scheme.at(site), self.high.get(site), self.clips.get(site, 1.0)))

    def linear(self, module: str, x: Tensor) -> Tensor:
        """Return the output of a rounded linear, bias included."""
        return torch.nn.functional.linear(x, self.weights[module], self._folded.tensors.get(f"{module}.bias"))

    def map_keys(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys behind the key map and its inverse."""
        if self._key_map is None:
            return query, key
        inverse = torch.linalg.inv(self._key_map).mT.repeat_interleave(self._folded.config.groups, 0)
        return query @ inverse, key @ self._key_map

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, and keys and values as the cache gives them back."""
        query, key = self.map_keys(query, key)
        key = round_cached(key, self._scheme.key_bits, self.clips.get("key", 1.0))
        return query, key, round_cached(value, self._scheme.value_bits, self.clips.get("value", 1.0))


def round_cached(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Return keys or values [..., d] as the cache gives them back; see `quantize_kv`."""
    return x if bits == FLOAT_BITS else dequantize_kv(*quantize_kv(x, bits, clip))


def round_mapped(x: Tensor, right: Tensor | None, bits: int, clip: float = 1.0) -> Tensor:
    """Return keys or values [batch, kv_heads, seq, d] that went through the cache in the space of a map, and back.

    Args:
        x: keys or values.
        right: the map, [kv_heads or 1, d, d], or None.
        bits: of the cache.
        clip: share of a head's range that the grid spans.
    """
    if right is None:
        return round_cached(x, bits, clip)
    back: Tensor = torch.linalg.inv(right)
    return round_cached(x @ right, bits, clip) @ back
