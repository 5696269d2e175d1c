"""How much of its range an activation grid should span."""

import torch
from torch import Tensor

from planish.compiler.learn.low_bit import round_activation
from planish.passes.scheme import FLOAT_BITS, LinearFormat

__all__ = ["search_clip"]

#: Clips tried: a grid of b bits on n Gaussian channels wants about 0.75 of absmax at 4 bits and 0.55 at 3.
_CLIPS = tuple(round(1 - 0.05 * step, 2) for step in range(13))


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
