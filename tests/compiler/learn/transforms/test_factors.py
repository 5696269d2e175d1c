"""Factors in PyTorch against the transforms in numpy, and gradients against differences."""

import numpy as np
import pytest
import torch
from torch import Tensor

from planish.compiler.learn.transforms.factors import Factors
from planish.passes.transforms import Transform


def transform(which: str, width: int = 24) -> Transform:
    generator = np.random.default_rng(2)
    scale = np.exp(generator.normal(size=width))
    columns, rows = 6, width // 6

    def square(*shape: int) -> np.ndarray:
        return generator.normal(size=shape) + 3 * np.eye(shape[-1])

    parts = {
        "identity": (None, None, None),
        "scale": (scale, None, None),
        "dense": (scale, square(1, width, width), None),
        "kronecker": (scale, square(1, columns, columns), square(rows, rows)),
        "blocks": (None, square(rows, columns, columns), None),
        "mixed blocks": (scale, square(rows, columns, columns), square(rows, rows)),
        "left": (None, None, square(rows, rows)),
    }[which]
    return Transform(width, "identity" if which in ("identity", "scale") else "affine", *parts)


KINDS = ["identity", "scale", "dense", "kronecker", "blocks", "mixed blocks", "left"]


def rows(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).normal(size=shape))


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
def test_apply_equals_the_transform(which: str, shape: tuple[int, ...]) -> None:
    stored, x = transform(which), rows(*shape)
    if len(shape) == 1:
        x = x[None]
    np.testing.assert_allclose(Factors.of(stored).apply(x).numpy(), stored.apply(x.numpy()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", KINDS)
def test_weights_equal_the_transform(which: str) -> None:
    stored, w = transform(which), rows(7, 24)
    found = Factors.of(stored).apply_to_weight(w).numpy()
    np.testing.assert_allclose(found, stored.apply_to_weight(w.numpy()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("which", KINDS)
def test_products_stay_what_they_were(which: str) -> None:
    factors, x, w = Factors.of(transform(which)), rows(5, 24), rows(7, 24)
    torch.testing.assert_close(factors.apply(x) @ factors.apply_to_weight(w).T, x @ w.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", KINDS)
def test_stored_and_read_again(which: str) -> None:
    stored = transform(which)
    again = Factors.of(stored).stored(24)
    assert again.kind == stored.kind
    for name in ("scale", "right", "left"):
        one, other = getattr(stored, name), getattr(again, name)
        assert (one is None) == (other is None)
        assert one is None or np.array_equal(one, other)


def test_float32_stays_float32() -> None:
    factors = Factors.of(transform("kronecker"))
    assert factors.apply(torch.ones(2, 24)).dtype == torch.float32
    assert factors.apply_to_weight(torch.ones(2, 24)).dtype == torch.float32


def test_gradients_through_both_sides() -> None:
    """A rounded product that depends on every factor; the rounding is left out, as it passes gradients through."""
    given = transform("mixed blocks")
    parts = [
        torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in (given.scale, given.right, given.left)
    ]
    x, w = rows(3, 24), rows(2, 24)

    def both(scale: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        factors = Factors("affine", scale, right, left)
        return factors.apply(x), factors.apply_to_weight(w)

    assert torch.autograd.gradcheck(both, parts)
