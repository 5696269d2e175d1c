"""AdaRound: learn for every weight whether it is rounded up or down (arXiv 2004.10568).

The rounded weight is s clip(floor(W / s) + h(V)), with h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1) between
down and up (eq. 22 and 23 of the paper). V learns to give the least output error and, more and more, to decide: the
regulariser is the sum of 1 - |2 h - 1|^beta (eq. 24). The loss is that of one layer and comes from the second moment of
its inputs (see `row_errors.py`): no activations are needed, which makes it quick on a CPU.
"""

import dataclasses
import math

import torch
from torch import Tensor

from planish.compiler.learn.rounding.row_errors import BestRows, damped, row_errors
from planish.compiler.quantize.arithmetic import QuantizedWeight

__all__ = ["Beside", "adaround"]

_ZETA, _GAMMA = 1.1, -0.1
#: The exponent of the regulariser, from the first step that has it to the last.
_BETA_FIRST, _BETA_LAST = 20.0, 2.0
#: Share of the steps without regulariser.
_WARM_UP = 0.2
#: What one undecided weight costs, relative to the mean error of one that is rounded at random.
_UNDECIDED = 5.0
_STEPS, _RATE = 1000, 1e-2
#: How often the weights as decided so far are looked at.
_LOOKS = 10


@dataclasses.dataclass(frozen=True)
class Beside:
    """The rest of a weight of which only some input channels are learned.

    Attributes:
        channels: which inputs are those of the learned part, int64 [m]; the others are in `others`.
        others: int64 [n - m].
        error: W - Q of the others, float32 [rows, n - m], as they are and stay.
    """

    channels: Tensor
    others: Tensor
    error: Tensor


@torch.enable_grad()
def adaround(
    weight: Tensor,
    start: QuantizedWeight,
    moment: Tensor,
    held_out: Tensor,
    beside: Beside | None = None,
    steps: int = _STEPS,
) -> QuantizedWeight:
    """Return `start` with codes that move the output least; scales stay.

    With a part beside that is rounded already, what it does to the output is known, and the part that learns makes up
    for it: it is rounded around the real weight that would do so best, W + E_b H_bp H_pp^-1, where p are its channels
    and b those beside. Of every row the result is the best of the start and of what was found on the way, by the
    held-out moment: never worse than the start there.

    Args:
        weight: float [rows, m].
        start: codes and scales of `weight`, float32 [groups, rows].
        moment: E[x^T x] of all inputs to learn on, float64 [n, n]; n is m where nothing is beside.
        held_out: the same of other inputs.
        beside: the rest of the weight.
        steps: of Adam.

    Raises:
        ValueError: if the moment to learn on is not finite.
    """
    weight, H = weight.detach().float(), damped(moment)
    if beside is None:
        aim, best = weight, BestRows(weight, held_out, start)
    else:
        every = torch.cat([beside.channels, beside.others])
        best = BestRows(weight, held_out[every][:, every], start, beside.error)
        reach = beside.error @ H[beside.others][:, beside.channels]
        H = H[beside.channels][:, beside.channels]
        aim = weight + torch.linalg.solve(H.double(), reach.double().T).T.float()
    scale = start.scale.T.repeat_interleave(start.group, 1)[:, : weight.shape[1]]
    zero = 1 << start.bits - 1
    down = (aim / scale).floor()
    # What a weight of a row adds if its rounding errors are uniform and independent.
    unit = (scale.square() * H.diagonal()).mean(1) / 12
    V = _logits(aim / scale - down).requires_grad_()
    optimizer = torch.optim.Adam([V], lr=_RATE)
    warm_up = round(_WARM_UP * steps)
    for step in range(steps):
        h = _share_up(V)
        q = (down + h).clamp(-zero, zero - 1)
        loss = (row_errors(aim - q * scale, H) / unit).sum()
        if step >= warm_up:
            done = (step - warm_up) / max(1, steps - warm_up - 1)
            beta = _BETA_LAST + (_BETA_FIRST - _BETA_LAST) * (1 + math.cos(math.pi * done)) / 2
            loss = loss + _UNDECIDED * (1 - (2 * h - 1).abs().pow(beta)).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % max(1, steps // _LOOKS) == 0 or step + 1 == steps:
            codes = (down + (_share_up(V.detach()) >= 0.5)).clamp(-zero, zero - 1) + zero
            best.offer(dataclasses.replace(start, codes=codes.to(torch.uint8)))
    return best.found


def _share_up(V: Tensor) -> Tensor:
    return (V.sigmoid() * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


def _logits(share: Tensor) -> Tensor:
    """Return the V at which h(V) is `share`, 0 to 1."""
    return ((share - _GAMMA) / (_ZETA - _GAMMA)).logit()
