"""Hadamard matrices by their definition, and the rotations made of them."""

import numpy as np
import pytest

from planish.compiler.learn.transforms.hadamard import hadamard, hadamard_transform, split_width

#: Doublings of 1 or 2, orders of Paley's first construction and their doublings, and orders that only his second gives.
ORDERS = [1, 2, 16, 64, 4, 12, 20, 24, 28, 44, 48, 80, 108, 112, 36, 72, 76, 148]
WIDTHS = [64, 160, 576, 1536, 2048, 8192, 11008, 14336]


@pytest.mark.parametrize("order", ORDERS)
def test_is_a_hadamard_matrix(order: int) -> None:
    matrix = hadamard(order)
    np.testing.assert_allclose(np.abs(matrix), order**-0.5, rtol=1e-12)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(order), atol=1e-12)


@pytest.mark.parametrize("order", [3, 6, 43, 52, 86])
def test_no_matrix_is_invented(order: int) -> None:
    with pytest.raises(ValueError, match=f"order {order} "):
        hadamard(order)


@pytest.mark.parametrize("width", [*WIDTHS, 7, 86, 576 * 3])
def test_split_is_a_split(width: int) -> None:
    rows, columns = split_width(width)
    assert rows * columns == width
    assert rows <= columns


def test_split_prefers_hadamard_orders() -> None:
    assert split_width(64) == (8, 8)
    assert split_width(1536) == (32, 48)
    # 24 x 24 has no rival; 86 x 128 costs less than 64 x 172 and has no Hadamard matrix on the left, nor has 172.
    assert split_width(576) == (24, 24)


@pytest.mark.parametrize("width", [*WIDTHS[:4], 13, 42, 86 * 4])
def test_transform_is_orthogonal(width: int) -> None:
    matrix = hadamard_transform(width, 3).matrix()
    # Factors are kept in float32.
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-6)


@pytest.mark.parametrize("width", [160, 576, 1536])
def test_an_outlier_is_spread_evenly(width: int) -> None:
    x = np.zeros((1, width))
    x[0, 5] = 1
    np.testing.assert_allclose(np.abs(hadamard_transform(width, 3).apply(x)), width**-0.5, rtol=1e-6)


def test_scale_comes_before_the_rotation() -> None:
    scale = np.linspace(0.5, 2, 48)
    x = np.random.default_rng(0).normal(size=(3, 48))
    scaled, plain = hadamard_transform(48, 3, scale), hadamard_transform(48, 3)
    np.testing.assert_allclose(scaled.apply(x), plain.apply(x * scale), rtol=1e-5, atol=1e-6)


def test_seed_decides_the_signs() -> None:
    one, same, other = (hadamard_transform(64, seed).matrix() for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
