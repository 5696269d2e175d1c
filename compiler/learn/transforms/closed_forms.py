"""Transforms in closed form, from second moments of what is multiplied.

With dynamic absmax scales behind a mixing rotation, the error of a quantised product is, to first order, in proportion
to tr(P^T Sx P) tr(P^-1 Sw P^-T), where Sx = E[x^T x] and Sw = E[w^T w] over the rows of W. Its minimiser has
P P^T = Sx^-1 # Sw, the geometric mean (WUSH; CAT), times any rotation behind it, which is chosen to even out the
diagonal. With P diagonal that is the RMS rule, p_j = (Sw_jj / Sx_jj)^(1/4).

All moments are float64 [n, n], symmetric and positive semi-definite; they are damped here.
"""

import torch
from torch import Tensor

__all__ = ["block_means", "geometric_mean", "head_transforms", "kronecker_means", "rms_scale", "whiten_and_mix"]

#: Share of the mean diagonal that is added to a moment.
_DAMPING = 1e-2
#: Rounds of the alternating solution for two Kronecker factors.
_FLIPS = 8


def rms_scale(inputs: Tensor, weights: Tensor) -> Tensor:
    """Return the channel scale [n] that x is multiplied with, of geometric mean 1, given the moments' diagonals."""
    damped_x, damped_w = (each + _DAMPING * _level(each) for each in (inputs, weights))
    scale: Tensor = (damped_w / damped_x) ** 0.25
    return scale / scale.log().mean().exp()


def geometric_mean(inputs: Tensor, weights: Tensor) -> Tensor:
    """Return Sx^-1 # Sw [n, n]; batched over leading dimensions."""
    inputs, weights = _damped(inputs), _damped(weights)
    root, inverse_root = _powers(inputs)
    middle, _ = _powers(root @ weights @ root)
    return _symmetric(inverse_root @ middle @ inverse_root)


def whiten_and_mix(metric: Tensor, inputs: Tensor, mixing: Tensor) -> Tensor:
    """Return P with P P^T = `metric`, such that P^T Sx P has a constant diagonal if `mixing` is a Hadamard matrix."""
    root, _ = _powers(metric)
    _, vectors = torch.linalg.eigh(_symmetric(root @ inputs @ root))
    transform: Tensor = root @ vectors @ mixing
    return transform


def block_means(inputs: Tensor, weights: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the geometric means and input moments of the diagonal blocks, [n / size, size, size] each."""
    blocks = [torch.stack([s[i : i + size, i : i + size] for i in range(0, len(s), size)]) for s in (inputs, weights)]
    # One damping for all blocks: a block of quiet channels must not be whitened louder than the rest.
    damped = [
        b + _DAMPING * _level(s.diagonal()) * torch.eye(size, dtype=s.dtype, device=s.device)
        for b, s in zip(blocks, (inputs, weights), strict=True)
    ]
    return geometric_mean(*damped), blocks[0]


def kronecker_means(inputs: Tensor, weights: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the metric G1 (x) G2 that minimises tr(G Sx) tr(G^-1 Sw), and the input moments each factor sees.

    The objective is geodesically convex on the Kronecker set, so alternating between the factors finds its minimum.

    Returns:
        G1 [rows, rows], G2 [n / rows, n / rows], and the moments in the same shapes.
    """
    n = len(inputs)
    columns = n // rows
    sx = _damped(inputs).reshape(rows, columns, rows, columns)
    sw = _damped(weights).reshape(rows, columns, rows, columns)
    left = torch.eye(rows, dtype=inputs.dtype, device=inputs.device)
    right = torch.eye(columns, dtype=inputs.dtype, device=inputs.device)
    for _ in range(_FLIPS):
        left_moment = torch.einsum("iajb,ab->ij", sx, right)
        left = geometric_mean(left_moment, torch.einsum("iajb,ab->ij", sw, torch.linalg.inv(right)))
        left = left / left.logdet().div(rows).exp()
        right_moment = torch.einsum("iajb,ij->ab", sx, left)
        right = geometric_mean(right_moment, torch.einsum("iajb,ij->ab", sw, torch.linalg.inv(left)))
    return left, right, left_moment, right_moment


def head_transforms(stored: Tensor, reader: Tensor, mixing: Tensor) -> Tensor:
    """Return per-head maps [heads, d, d] for what is stored [heads, d, d] and what reads it, by their moments.

    Keys are stored and read by queries, values are stored and read by the columns of o; only the stored side is
    quantised, and the error that its reader sees is in proportion to the same product of traces.
    """
    return whiten_and_mix(geometric_mean(stored, reader), stored, mixing)


def _damped(moment: Tensor) -> Tensor:
    damped = moment.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(_DAMPING * _level(moment.diagonal(dim1=-2, dim2=-1))[..., None])
    return damped


def _level(diagonal: Tensor) -> Tensor:
    """Return what damping is measured by, the mean over the last dimension; 1 where nothing at all was multiplied.

    Blocks that were added to a model and never trained have weights of zeros, and inputs of zeros behind them.
    """
    mean = diagonal.mean(-1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def _powers(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root and its inverse of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    root = values.clamp_min(1e-30).sqrt()
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors / root[..., None, :]) @ vectors.mT


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
