"""What rounding a weight does to its outputs, from the second moment of its inputs alone.

The mean over tokens of ||x (W - Q)^T||^2 is tr((W - Q) H (W - Q)^T) with H = E[x^T x]: a sum over the rows of W. So
rounding can be learned without a single activation, at a cost that does not grow with the text, and every row by
itself keeps the best that was found.
"""

import dataclasses

import torch
from torch import Tensor

from planish.compiler.quantize.arithmetic import QuantizedWeight, dequantize_weight

__all__ = ["BestRows", "damped", "row_errors"]

#: As GPTQ has it: what the moment does not tell of other text, every weight counts for itself.
_DAMPING = 1e-2


def row_errors(error: Tensor, moment: Tensor) -> Tensor:
    """Return e H e^T of every row e of `error`, [rows].

    Args:
        error: W - Q, float [rows, n].
        moment: H, [n, n].
    """
    return ((error @ moment) * error).sum(1)


def damped(moment: Tensor) -> Tensor:
    """Return a moment with a hundredth of its mean diagonal added to the diagonal, float32, of mean diagonal 1.01.

    Raises:
        ValueError: if it is not finite.
    """
    if not moment.isfinite().all():
        raise ValueError("the second moment of the inputs holds NaN or infinity")
    level = moment.diagonal().mean().clamp_min(1e-30)
    return (moment / level).float() + _DAMPING * torch.eye(len(moment), device=moment.device)


class BestRows:
    """The best rounding of every row that was offered, by the error on a moment that nothing was fitted to."""

    def __init__(self, weight: Tensor, moment: Tensor, start: QuantizedWeight, beside: Tensor | None = None) -> None:
        """Begin with a rounding.

        Args:
            weight: float [rows, m].
            moment: H of all n inputs, held out, [n, n]; those of `weight` come first.
            start: of `weight`.
            beside: W - Q of the other inputs, [rows, n - m]; None where there are none.
        """
        self._weight, self._beside = weight.float(), beside
        self._moment = moment.float()
        self.found, self.errors = start, self._of(start)

    def offer(self, rounding: QuantizedWeight) -> None:
        """Take over the rows that are better."""
        errors = self._of(rounding)
        better = errors < self.errors
        self.errors = torch.where(better, errors, self.errors)
        codes = torch.where(better[:, None], rounding.codes, self.found.codes)
        scale = torch.where(better, rounding.scale, self.found.scale)
        self.found = dataclasses.replace(self.found, codes=codes, scale=scale)

    def _of(self, rounding: QuantizedWeight) -> Tensor:
        error = self._weight - dequantize_weight(rounding)
        return row_errors(error if self._beside is None else torch.cat([error, self._beside], 1), self._moment)
