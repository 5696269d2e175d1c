"""How much of its range an activation grid, or that of cached keys and values, should span."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from planish.compiler.learn.block import Angles, Block, FloatHooks, attend, run_block
from planish.compiler.learn.low_bit import Reached, round_activation, round_mapped
from planish.compiler.learn.transforms.factors import Factors
from planish.passes.scheme import FLOAT_BITS, LinearFormat, Scheme
from planish.passes.transforms import Site

__all__ = ["Heads", "kv_clips", "read_heads", "search_clip", "search_kv_clip"]

#: Clips tried: a grid of b bits on n Gaussian channels wants about 0.75 of absmax at 4 bits, 0.55 at 3 and, at 2, 0.3
#: for 1536 channels and 0.25 for 8192.
_CLIPS = tuple(round(1 - 0.05 * step, 2) for step in range(18))
#: Clips tried for keys and values: of the range that 64 Gaussian channels span, about 0.65 is best at 2 bits, 0.85 at 3
#: (Max 1960, "Quantizing for minimum distortion", table II).
_KV_CLIPS = tuple(round(1 - 0.05 * step, 2) for step in range(11))


class Heads(NamedTuple):
    """What attention computes with: queries and keys after RoPE, and values, [batch, heads, seq, d] each."""

    query: Tensor
    key: Tensor
    value: Tensor


@torch.no_grad()
def search_clip(inputs: Tensor, weight: Tensor, form: LinearFormat, token_weights: Tensor) -> float:
    """Return the share of a token's absmax at which rounding the inputs moves the outputs least.

    Args:
        inputs: float32 [tokens, n], transformed.
        weight: float32 [out, n], transformed.
        form: of the linear.
        token_weights: float32 [tokens].
    """
    if form.activation_bits == FLOAT_BITS or form.activation_bits >= 8:
        return 1.0

    def error(clip: float) -> float:
        lost = (round_activation(inputs, form.activation_bits, clip) - inputs) @ weight.T
        return float((token_weights * lost.square().sum(1)).sum())

    return _least(_CLIPS, error)


@torch.no_grad()
def search_kv_clip(
    site: Site, factors: Factors, bits: int, heads: Heads, output: Tensor, token_weights: Tensor
) -> float:
    """Return the share of a head's range at which a cache of keys, or of values, moves the block's output least.

    The error is taken behind the softmax and o_proj: noise of rounding averages out over the tokens that are attended
    to, what a clip cuts off need not.

    Args:
        site: `key` or `value`.
        factors: the map of the site.
        bits: of the cache.
        heads: of the float block.
        output: the weight of o_proj, [hidden, q_size].
        token_weights: float32 [batch * seq].
    """
    if bits >= 8:
        return 1.0
    expected = attend(*heads)

    def error(clip: float) -> float:
        stored = {site: round_mapped(getattr(heads, site), factors.right, bits, clip)}
        lost = (attend(*heads._replace(**stored)) - expected).flatten(0, -2) @ output.T
        return float((token_weights * lost.square().sum(1)).sum())

    return _least(_KV_CLIPS, error)


def _least(clips: Sequence[float], error: Callable[[float], float]) -> float:
    """Return the clip of least error, from the widest on: the error has one minimum, so it stops where that rises."""
    best, least = clips[0], error(clips[0])
    for clip in clips[1:]:
        found = error(clip)
        if found > 1.1 * least:
            break
        if found < least:
            best, least = clip, found
    return best


@torch.no_grad()
def kv_clips(
    block: Block, x: Tensor, angles: Angles, factors: Mapping[Site, Factors], scheme: Scheme, token_weights: Tensor
) -> dict[Site, float]:
    """Return the clips of the sites `key` and `value`, searched on some inputs of the block; see `search_kv_clip`.

    Args:
        block: as the checkpoint has it.
        x: inputs, float32 [batch, seq, hidden].
        angles: of `seq` positions.
        factors: the maps of `key` and `value`.
        scheme: gives the bits.
        token_weights: float32 [batch * seq].
    """
    heads, output = read_heads(block, x, angles), block.weight("self_attn.o_proj")
    bits: dict[Site, int] = {"key": scheme.key_bits, "value": scheme.value_bits}
    return {
        site: search_kv_clip(site, factors[site], each, heads, output, token_weights) for site, each in bits.items()
    }


def read_heads(block: Block, x: Tensor, angles: Angles) -> Heads:
    """Return what attention in the float block computes with, given the block's inputs [batch, seq, hidden]."""
    hooks = _Recording(block)
    with contextlib.suppress(Reached):
        run_block(block.config, hooks, x, angles)
    return hooks.found


class _Recording(FloatHooks):
    """Keeps queries, keys and values, and ends the run there."""

    found: Heads

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.found = Heads(query, key, value)
        raise Reached(value)
