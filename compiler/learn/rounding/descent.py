"""Move codes, one input channel after the other, to where the error of the output is least while all others stay.

GPTQ decides on every column once, before it knows what becomes of the columns behind it. Coordinate descent on the same
objective (QuantEase, arXiv 2309.01885) goes over all of them again: no step can make the error larger, and scales stay
as they are, so that what a row is stored as does not change. Here columns are rows of transposed matrices, so that a
step reads and writes memory in one piece.
"""

import torch
from torch import Tensor

__all__ = ["descend"]

#: Passes over all columns. Of what twelve win on the inputs that codes are fitted to, four win more than four fifths.
_SWEEPS = 4
#: Columns whose gradients are kept up to date one by one; those of the next are one product.
_BLOCK = 128


def descend(weight: Tensor, codes: Tensor, scales: Tensor, groups: Tensor, zeros: Tensor, hessian: Tensor) -> Tensor:
    """Return codes with which no row of tr((W - Q) H (W - Q)^T) is larger than with those given.

    Column j of a row contributes (w_j - s_j c_j) to an error e, whose gradient is g = e H. With the others fixed, the
    best real code is c_j + g_j / (s_j H_jj): the nearest integer within the grid is the best code.

    Args:
        weight: W, float32 [out, in].
        codes: c^T, whole numbers around 0, float32 [in, out]; they become those that are returned.
        scales: s of every group of input channels, float32 [groups, out].
        groups: the group of each channel, int64 [in].
        zeros: largest magnitude of a code of each channel; the largest code is one less, float32 [in].
        hessian: H, of positive diagonal, float32 [in, in].

    Returns:
        Float32 [in, out].
    """
    # One matrix of the weight's size, and no temporary one.
    errors = weight.T.to(torch.float32, copy=True).contiguous()
    scale_of = [scales[group] for group in groups.tolist()]
    for i, scale in enumerate(scale_of):
        errors[i].addcmul_(codes[i], scale, value=-1)
    for _ in range(_SWEEPS):
        for start in range(0, len(hessian), _BLOCK):
            block = slice(start, start + _BLOCK)
            within = hessian[block, block]
            gradients = hessian[block] @ errors
            for j, i in enumerate(range(start, start + len(within))):
                best = (codes[i] + gradients[j] / (scale_of[i] * within[j, j])).round_()
                best = torch.clamp(best, -zeros[i], zeros[i] - 1)
                moved = (codes[i] - best) * scale_of[i]
                codes[i] = best
                errors[i] += moved
                gradients[j + 1 :].addr_(within[j, j + 1 :], moved)
    return codes
