"""Every closed form at widths with and without nice divisors: what it must keep, and what it must gain."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from planish.compiler.learn.transforms.candidates import FORMS, Form, closed_form, kind_of
from planish.compiler.learn.transforms.hadamard import hadamard_transform

#: The form `smooth` is learned, see test_flatten.py.
ALL = [form for form in get_args(Form) if form != "smooth"]
#: Powers of two, several of 32, few divisors, none.
WIDTHS = [64, 96, 160, 42, 37]


def moments(n: int) -> tuple[Tensor, Tensor]:
    """Return moments of inputs with outlier channels and of weights, float64 [n, n]: neighbours correlate."""
    generator = np.random.default_rng(n)
    mixing = np.eye(n) + 0.7 * np.eye(n, k=1) + 0.4 * np.eye(n, k=3)
    x = generator.normal(size=(6 * n, n)) @ mixing * np.exp(1.2 * generator.normal(size=n))
    w = generator.normal(size=(6 * n, n)) * np.exp(0.3 * generator.normal(size=n))
    return torch.from_numpy(x.T @ x / len(x)), torch.from_numpy(w.T @ w / len(w))


def predicted(form: Form, sx: Tensor, sw: Tensor) -> float:
    """Return tr(P^T Sx P) tr(P^-1 Sw P^-T) with P as it is applied."""
    factors = closed_form(form, sx, sw, 0)
    root_x, root_w = (torch.linalg.cholesky(s).T for s in (sx, sw))
    return float(factors.apply(root_x).square().sum() * factors.apply_to_weight(root_w).square().sum())


def test_every_form_is_named() -> None:
    assert set(FORMS) == set(ALL)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("width", WIDTHS)
def test_products_stay_and_transforms_can_be_stored(form: Form, width: int) -> None:
    sx, sw = moments(width)
    factors = closed_form(form, sx, sw, 4)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(4, width, dtype=torch.float64, generator=generator) for _ in range(2))
    torch.testing.assert_close(factors.apply(x) @ factors.apply_to_weight(w).T, x @ w.T, rtol=1e-8, atol=1e-8)
    stored = factors.stored(width)
    np.testing.assert_allclose(stored.apply(x.numpy()), factors.apply(x).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("width", [64, 160])
def test_kind_is_true(form: Form, width: int) -> None:
    """What is called a rotation is one, up to the channel scale; what is called affine is none."""
    factors = closed_form(form, *moments(width), 4)
    assert factors.kind == kind_of(form)
    matrix = factors.stored(width).without_scale().matrix()
    off = np.abs(matrix @ matrix.T - np.eye(width)).max()
    assert off < 1e-6 if kind_of(form) != "affine" else off > 1e-2


@pytest.mark.parametrize("width", [64, 160])
def test_more_freedom_predicts_less_error(width: int) -> None:
    sx, sw = moments(width)
    error = {form: predicted(form, sx, sw) for form in ALL}
    np.testing.assert_allclose(error["hadamard"], error["identity"], rtol=1e-5)
    assert error["rotation"] < 0.7 * error["identity"]
    assert error["kronecker"] < error["rotation"]
    assert error["blocks32"] < error["rotation"]
    assert error["dense"] < error["blocks32"]
    assert error["dense"] < error["kronecker"]


@pytest.mark.parametrize("form", ["kronecker", "blocks32", "dense"])
def test_channels_are_level_behind_it(form: Form) -> None:
    """A constant diagonal of P^T Sx P is what the mixing is for; a Kronecker product reaches it on average only."""
    sx, sw = moments(64)
    root = torch.linalg.cholesky(sx).T
    before = root.square().sum(0)
    after = closed_form(form, sx, sw, 0).apply(root).square().sum(0)
    assert float(before.max() / before.mean()) > 4
    assert float(after.max() / after.mean()) < (1.01 if form == "dense" else 1.5)


def test_hadamard_is_the_transform() -> None:
    found = closed_form("hadamard", *moments(96), 5).stored(96)
    np.testing.assert_array_equal(found.matrix(), hadamard_transform(96, 5).matrix())


@pytest.mark.parametrize("form", ALL)
def test_silent_channels(form: Form) -> None:
    sx, sw = moments(64)
    sx[3], sx[:, 3] = 0, 0
    sw[7], sw[:, 7] = 0, 0
    factors = closed_form(form, sx, sw, 0)
    assert factors.apply(torch.eye(64, dtype=torch.float64)).isfinite().all()
    assert factors.apply_to_weight(torch.eye(64, dtype=torch.float64)).isfinite().all()
