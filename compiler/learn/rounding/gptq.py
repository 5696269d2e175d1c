"""GPTQ: round a weight column by column, each time repairing the columns still to come (arXiv 2210.17323).

Two generalisations, both without cost: the inputs are those that the layer will really see (transformed, rounded, from
the quantised prefix), and the output to keep is that of the float model, which a least-squares step works into the
weight before it is rounded (the asymmetric calibration of GPTAQ, arXiv 2504.02692, in closed form).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from planish.compiler.quantize.arithmetic import QuantizedWeight, fit_scale
from planish.passes.scheme import LinearFormat

__all__ = ["compensate", "gptq"]

_DAMPING = 1e-2
_BLOCK = 128


def compensate(weight: Tensor, hessian: Tensor, cross: Tensor, ridges: Iterable[float]) -> dict[float, Tensor]:
    """Return, by ridge, the weight that best maps what a layer sees to what it should say.

    The minimiser of ||X W^T - Xq V^T||^2 + r ||V - W||^2 over V, with r = `ridge` times the mean diagonal of the
    Hessian.

    Args:
        weight: W, float [out, in].
        hessian: Xq^T Xq, float64 [in, in].
        cross: X^T Xq, float64 [in, in].
        ridges: positive; the larger, the closer to W.
    """
    level, columns = hessian.diagonal().mean() + 1e-30, weight.to(hessian.dtype).T
    wanted, found = cross.T @ columns, {}
    for ridge in ridges:
        # In place: every matrix of this size that need not be is one of the largest things in memory.
        damped = hessian.clone()
        damped.diagonal().add_(ridge * level)
        factor = torch.linalg.cholesky(damped, out=damped)
        found[ridge] = torch.cholesky_solve(wanted + ridge * level * columns, factor).T.to(weight.dtype)
    return found


def gptq(weight: Tensor, hessian: Tensor, form: LinearFormat) -> QuantizedWeight:
    """Round a weight to the grid of `form` such that its output moves least.

    Args:
        weight: float [out, in].
        hessian: sum of x^T x over the inputs as the layer sees them, float64 [in, in].
        form: bits and groups; scales are those of least squared error of the weight as it is when its group is
            reached.

    Returns:
        The codes, and scales as `quantize_weight` gives them.

    Raises:
        ValueError: if the Hessian is not finite.
    """
    rows, k = weight.shape
    zero = 1 << (form.weight_bits - 1)
    group = form.group or k
    factor = _inverse_factor(hessian).to(torch.float32)
    work = weight.to(torch.float32).clone()
    codes = torch.empty(rows, k, dtype=torch.uint8, device=weight.device)
    scales = []
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        errors = torch.empty(rows, stop - start, device=weight.device)
        for column in range(start, stop):
            if column % group == 0:
                # Columns of this group beyond the block have not been repaired by it yet: repair a copy.
                ahead = work[:, column : column + group].clone()
                done = column - start
                if done and column + group > stop:
                    ahead[:, stop - column :] -= errors[:, :done] @ factor[start:column, stop : column + group]
                scales.append(fit_scale(ahead, form))
            scale = scales[-1]
            q = (work[:, column : column + 1] / scale).round_().clamp_(-zero, zero - 1)
            codes[:, column] = (q + zero).to(torch.uint8).squeeze(1)
            error = (work[:, column : column + 1] - q * scale) / factor[column, column]
            work[:, column:stop] -= error * factor[column, column:stop]
            errors[:, column - start] = error.squeeze(1)
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return QuantizedWeight(codes, torch.cat(scales, 1).T.contiguous(), form.weight_bits, group)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian."""
    if not hessian.isfinite().all():
        raise ValueError("the Hessian holds NaN or infinity")
    level = hessian.diagonal().mean().clamp_min(1e-30)
    # Decomposed from the last column to the first, the Hessian is R R^T with R upper; then R^-1 is the factor sought.
    backwards = (hessian / level).flip(0, 1)
    backwards.diagonal().add_(_DAMPING)
    backwards = torch.linalg.cholesky(backwards).flip(0, 1)
    factor = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    torch.linalg.solve_triangular(backwards, factor, upper=True, out=factor)
    return factor
