"""Learned weight clipping: how much of its range the grid of every weight row spans (OmniQuant, arXiv 2308.13137).

A scale is the sigmoid of a logit times the scale that just spans the largest magnitude of its row or group. The logits
learn by Adam to give the least output error, from the second moment of the inputs rather than from activations (see
`row_errors.py`), and start at the scales of least squared error of the weight itself.
"""

import torch
from torch import Tensor

from planish.compiler.learn.gradient.trainable import round_to_grid
from planish.compiler.learn.rounding.row_errors import BestRows, damped, row_errors
from planish.compiler.quantize.arithmetic import QuantizedWeight, quantize_weight
from planish.passes.scheme import LinearFormat

__all__ = ["learn_clips"]

_STEPS, _RATE = 150, 0.03
#: How many steps pass between two looks at the held-out moment.
_LOOK = 10
#: A share is the sigmoid of a logit, which would be infinite at 1: where learning starts at most.
_WIDEST = 0.98


@torch.enable_grad()
def learn_clips(
    weight: Tensor, moment: Tensor, held_out: Tensor, form: LinearFormat, steps: int = _STEPS
) -> QuantizedWeight:
    """Round a weight to nearest, with scales that let its output move least.

    Of every row the result is the best of the start and of what was found on the way, by the held-out moment: never
    worse than `quantize_weight` there.

    Args:
        weight: float [out, in].
        moment: E[x^T x] of the inputs to learn on, float64 [in, in].
        held_out: the same of other inputs.
        form: bits and groups.
        steps: of Adam.

    Returns:
        As `quantize_weight` does.

    Raises:
        ValueError: if the moment to learn on is not finite.
    """
    weight, H = weight.detach().float(), damped(moment)
    start = quantize_weight(weight, form)
    best = BestRows(weight, held_out, start)
    spans = _spans(weight, start)
    logits = (start.scale / spans).clamp(1 - _WIDEST, _WIDEST).logit().requires_grad_()
    zero = 1 << form.weight_bits - 1
    optimizer = torch.optim.Adam([logits], lr=_RATE)
    for step in range(1, steps + 1):
        scale = logits.sigmoid() * spans
        rounded = round_to_grid(weight, _by_column(scale, start), -zero, zero - 1)
        optimizer.zero_grad()
        row_errors(weight - rounded, H).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % _LOOK == 0 or step == steps:
            best.offer(_rounded(weight, logits.detach().sigmoid() * spans, start, half=form.group is not None))
    return best.found


def _spans(weight: Tensor, start: QuantizedWeight) -> Tensor:
    """Return the scale that spans the largest magnitude, float32 [groups, out]; 1 where all are zero."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % start.group))
    largest = padded.reshape(len(weight), -1, start.group).abs().amax(2).T
    return torch.where(largest > 0, largest / ((1 << start.bits - 1) - 1), 1.0)


def _by_column(scale: Tensor, like: QuantizedWeight) -> Tensor:
    return scale.T.repeat_interleave(like.group, 1)[:, : like.codes.shape[1]]


def _rounded(weight: Tensor, scale: Tensor, like: QuantizedWeight, *, half: bool) -> QuantizedWeight:
    if half:
        scale = scale.half().float()
        # Where float16 has no such scale, the one of the start stays.
        scale = torch.where((scale > 0) & scale.isfinite(), scale, like.scale)
    zero = 1 << like.bits - 1
    codes = (weight / _by_column(scale, like)).round_().clamp_(-zero, zero - 1) + zero
    return QuantizedWeight(codes.to(torch.uint8), scale.contiguous(), like.bits, like.group)
