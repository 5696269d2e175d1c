"""How much better than a rotation another transform will be, from second moments alone.

With dynamic absmax scales, and a rotation behind it that spreads every outlier, the error of a quantised product under
x -> x P is to first order in proportion to tr(P^T Sx P) tr(P^-1 Sw P^-T), where Sx = E[x^T x] and Sw = E[w^T w] over
the rows of the weights that read x. Rotations leave that product as it is. Its minimum over all invertible P is
(sum s)^2, with s the singular values of Sx^(1/2) Sw^(1/2) (WUSH; the geometric mean that CAT names too); over diagonal
P it is (sum_j sqrt(Sx_jj Sw_jj))^2. The ratios are the predicted errors of a rotation over that of the transform, so

    rho >= rho_diagonal >= 1,

and 10 log10 of one is the gain in dB. Moments are float64 [n, n], symmetric and positive semi-definite, and are not
damped: what is predicted is what the transform does to these moments, not what a closed form would do to safer ones.
"""

import math

import torch
from torch import Tensor

from planish.compiler.learn.transforms.factors import Factors

__all__ = ["rho", "rho_diagonal", "rho_of"]


def rho(inputs: Tensor, weights: Tensor) -> float:
    """Return the predicted error of a rotation over that of the best invertible map."""
    values, vectors = torch.linalg.eigh((inputs + inputs.mT) / 2)
    root = vectors * values.clamp_min(0).sqrt()
    squares = torch.linalg.eigvalsh(root.mT @ ((weights + weights.mT) / 2) @ root)
    return _ratio(inputs, weights, squares.clamp_min(0).sqrt().sum() ** 2)


def rho_diagonal(inputs: Tensor, weights: Tensor) -> float:
    """Return the predicted error of a rotation over that of the best channel scale with a rotation behind it."""
    return _ratio(inputs, weights, (inputs.diagonal() * weights.diagonal()).sqrt().sum() ** 2)


def rho_of(factors: Factors, inputs: Tensor, weights: Tensor) -> float:
    """Return the predicted error of a rotation over that of the transform `factors`: 1 for a rotation without scale."""
    mapped_inputs = factors.apply(factors.apply(inputs).mT)
    mapped_weights = factors.apply_to_weight(factors.apply_to_weight(weights).mT)
    return _ratio(inputs, weights, mapped_inputs.trace() * mapped_weights.trace())


def _ratio(inputs: Tensor, weights: Tensor, least: Tensor) -> float:
    """Return tr(Sx) tr(Sw) / `least`; 1 where nothing is multiplied, so that there is no error."""
    rotated = float(inputs.trace() * weights.trace())
    if not rotated:
        return 1.0
    return rotated / float(least) if least else math.inf
