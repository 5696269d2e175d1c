"""How much of its range an activation grid, or that of cached keys and values, should span."""

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

from planish.compiler.learn.block import Angles, Block, FloatHooks, run_block
from planish.compiler.learn.factors import Factors
from planish.compiler.learn.low_bit import Reached, round_activation, round_cached
from planish.compiler.learn.site_moments import SiteMoments
from planish.passes.scheme import FLOAT_BITS, LinearFormat, Scheme
from planish.passes.transforms import Site

__all__ = ["kv_clips", "search_clip", "search_kv_clip"]

#: Clips tried: a grid of b bits on n Gaussian channels wants about 0.75 of absmax at 4 bits and 0.55 at 3.
_CLIPS = tuple(round(1 - 0.05 * step, 2) for step in range(13))
#: Clips tried for keys and values: of the range that 64 Gaussian channels span, about 0.65 is best at 2 bits, 0.85 at 3
#: (Max 1960, "Quantizing for minimum distortion", table II).
_KV_CLIPS = tuple(round(1 - 0.05 * step, 2) for step in range(11))


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

    # The error has one minimum: stop where it rises.
    best, least = _CLIPS[0], error(_CLIPS[0])
    for clip in _CLIPS[1:]:
        found = error(clip)
        if found > 1.1 * least:
            break
        if found < least:
            best, least = clip, found
    return best


@torch.no_grad()
def search_kv_clip(heads: Tensor, readers_moment: Tensor, bits: int) -> float:
    """Return the share of a head's range at which rounding keys or values moves what reads them least.

    The error is the mean of e R e^T over tokens, summed over heads, with e what rounding changes and R the moment of
    the head's readers: the squared change of a score by a query, or of the block's output by a value.

    Args:
        heads: keys after RoPE or values, float32 [batch, kv_heads, seq, d], mapped.
        readers_moment: E[q^T q] of the queries, or W_o^T W_o of the columns, mapped, [kv_heads, d, d].
        bits: of the cache.
    """
    if bits >= 8:
        return 1.0
    readers = readers_moment.to(heads.dtype)

    def error(clip: float) -> float:
        lost = round_cached(heads, bits, clip) - heads
        return float((lost @ readers).mul_(lost).double().sum())

    return min(_KV_CLIPS, key=error)


@torch.no_grad()
def kv_clips(
    block: Block,
    x: Tensor,
    angles: Angles,
    factors: Mapping[Site, Factors],
    moments: SiteMoments,
    scheme: Scheme,
) -> dict[Site, float]:
    """Return the clips of the sites `key` and `value`, searched on the keys and values of the float block.

    Args:
        block: as the checkpoint has it.
        x: some of its inputs, float32 [batch, seq, hidden].
        angles: of `seq` positions.
        factors: the maps of `key` and `value`.
        moments: of the block.
        scheme: gives the bits.
    """
    hooks = _Heads(block)
    with contextlib.suppress(Reached):
        run_block(block.config, hooks, x, angles)
    sides: tuple[tuple[Site, Tensor, Tensor, int], ...] = (
        ("key", hooks.key, moments.queries, scheme.key_bits),
        ("value", hooks.value, moments.value_readers, scheme.value_bits),
    )
    found: dict[Site, float] = {}
    for site, heads, readers, bits in sides:
        right = factors[site].right
        if right is not None:
            # Rows of the heads go through the map, those of the readers through the transpose of its inverse.
            inverse = torch.linalg.inv(right.to(readers))
            heads, readers = heads @ right.to(heads), inverse @ readers @ inverse.mT
        found[site] = search_kv_clip(heads, readers, bits)
    return found


class _Heads(FloatHooks):
    """Keeps keys and values, and ends the run where attention is done."""

    key: Tensor
    value: Tensor

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.key, self.value = key, value
        return query, key, value

    def site(self, site: Site, x: Tensor) -> Tensor:
        if site == "attn_out":
            raise Reached(x)
        return x
