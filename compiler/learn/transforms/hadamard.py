"""Hadamard matrices of every width a model may have: rotations that spread an outlier over all channels."""

import functools

import numpy as np
import numpy.typing as npt
from scipy.linalg import hadamard as sylvester

from planish.passes.transforms import Transform

__all__ = ["hadamard", "hadamard_transform", "split_width"]

Matrix = npt.NDArray[np.float64]


def hadamard_transform(width: int, seed: int, scale: npt.NDArray[np.floating] | None = None) -> Transform:
    """Return a randomised Hadamard rotation of `width` channels as two Kronecker factors.

    The random signs, and the `scale` given, are the channel scale, which folds away. A factor for whose size no
    Hadamard matrix is known (odd, or 2 mod 4) is a random orthogonal matrix instead.
    """
    rows, columns = split_width(width)
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1.0, 1.0], width)
    return Transform(
        width,
        "rotation",
        scale=signs if scale is None else signs * scale,
        right=_mixing(columns, seed)[None],
        left=_mixing(rows, seed) if rows > 1 else None,
    )


def split_width(width: int) -> tuple[int, int]:
    """Return (m, k) with m k = width and m <= k: few operations, and Hadamard orders where that costs little."""
    pairs = [(m, width // m) for m in range(1, int(width**0.5) + 1) if width % m == 0]
    return min(pairs, key=lambda pair: sum(pair) * (1 if all(_core(size) for size in pair) else 1.5))


def _mixing(order: int, seed: int) -> Matrix:
    if _core(order):
        return hadamard(order)
    q, r = np.linalg.qr(np.random.default_rng(seed + order).normal(size=(order, order)))
    return np.asarray(q * np.sign(np.diag(r)))


@functools.cache
def hadamard(order: int) -> Matrix:
    """Return a normalised Hadamard matrix, H H^T = I, float64 [order, order].

    Sylvester's doubling of Paley's constructions: I from a prime q = order - 1 (3 mod 4), II from a prime
    q = order / 2 - 1 (1 mod 4), R. E. A. C. Paley, On orthogonal matrices, 1933.

    Raises:
        ValueError: if none is found that way.
    """
    core = _core(order)
    if core is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    matrix: Matrix = np.kron(sylvester(order // core), _paley(core)) / order**0.5
    return matrix


def _core(order: int) -> int | None:
    """Return the order whose doublings give `order` and which one of the constructions gives, if there is one."""
    core = order
    while core > 2:
        if core % 4 == 0 and (_is_prime(core - 1) or (core % 8 == 4 and _is_prime(core // 2 - 1))):
            return core
        if core % 2:
            return None
        core //= 2
    return core


def _paley(order: int) -> Matrix:
    if order <= 2:
        return np.asarray(sylvester(order), np.float64)
    if _is_prime(order - 1):
        skew = np.zeros((order, order))
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = _residues(order - 1)
        return skew + np.eye(order)
    symmetric = np.zeros((order // 2, order // 2))
    symmetric[0, 1:] = symmetric[1:, 0] = 1
    symmetric[1:, 1:] = _residues(order // 2 - 1)
    return np.kron(symmetric, [[1, 1], [1, -1]]) + np.kron(np.eye(order // 2), [[1, -1], [-1, -1]])


def _residues(q: int) -> Matrix:
    """Return Jacobsthal's matrix: the quadratic character of i - j modulo the prime q."""
    character = np.full(q, -1.0)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    indices = np.arange(q)
    matrix: Matrix = character[(indices[:, None] - indices) % q]
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))
