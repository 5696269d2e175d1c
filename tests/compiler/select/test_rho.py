"""The predicted gain of transforms: its identities, and that measured errors follow it."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from planish.compiler.learn.transforms.candidates import FORMS, Form, closed_form
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.select.rho import rho, rho_diagonal, rho_of

Matrix = npt.NDArray[np.float64]
N = 64


def data(seed: int, correlated: bool) -> tuple[Matrix, Matrix]:
    """Return activations [512, N] with loud channels, and a weight [96, N]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(512, N)) * np.exp(rng.normal(0, 1, N))
    if correlated:
        x = x @ (np.eye(N) + 0.3 * rng.normal(size=(N, N)))
    return x, rng.normal(size=(96, N)) * np.exp(rng.normal(0, 0.3, N))


def moments(x: Matrix, w: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(x.T @ x / len(x)), torch.from_numpy(w.T @ w / len(w))


@pytest.mark.parametrize("correlated", [False, True])
def test_rho_from_the_singular_values_of_the_product(correlated: bool) -> None:
    x, w = data(0, correlated)
    s = np.linalg.svd(x @ w.T / math.sqrt(len(x) * len(w)), compute_uv=False)
    expected = np.square(x).sum() / len(x) * np.square(w).sum() / len(w) / s.sum() ** 2
    assert rho(*moments(x, w)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("correlated", [False, True])
def test_more_freedom_gains_more(seed: int, correlated: bool) -> None:
    sx, sw = moments(*data(seed, correlated))
    assert rho(sx, sw) >= rho_diagonal(sx, sw) >= 1
    assert rho(sx, sw) > 1.05 * rho_diagonal(sx, sw) or not correlated


@pytest.mark.parametrize("form", list(FORMS))
def test_rho_of_a_form_is_that_of_its_matrix(form: Form) -> None:
    sx, sw = moments(*data(1, correlated=True))
    factors = closed_form(form, sx, sw, seed=0)
    P = factors.stored(N).matrix()
    inverse = np.linalg.inv(P)
    expected = float(sx.trace() * sw.trace())
    expected /= np.trace(P.T @ sx.numpy() @ P) * np.trace(inverse @ sw.numpy() @ inverse.T)
    assert rho_of(factors, sx, sw) == pytest.approx(expected, rel=1e-5)
    assert rho_of(factors, sx, sw) <= rho(sx, sw) * (1 + 1e-6)


def test_what_closed_forms_reach() -> None:
    sx, sw = moments(*data(2, correlated=True))
    found = {form: rho_of(closed_form(form, sx, sw, seed=0), sx, sw) for form in FORMS}
    assert found["identity"] == pytest.approx(1, abs=1e-12)
    assert found["hadamard"] == pytest.approx(1, abs=1e-6)
    # The damping of the closed forms costs a little.
    assert 0.97 * rho_diagonal(sx, sw) < found["rotation"] <= rho_diagonal(sx, sw) * (1 + 1e-6)
    assert 0.9 * rho(sx, sw) < found["dense"] <= rho(sx, sw)
    assert found["rotation"] < found["kronecker"] < found["dense"]


@pytest.mark.parametrize("seed", range(3))
def test_measured_errors_follow_the_prediction(seed: int) -> None:
    x, w = data(seed, correlated=True)
    sx, sw = moments(x, w)
    errors = {form: product_error(x, w, closed_form(form, sx, sw, seed=0)) for form in FORMS if form != "identity"}
    for form, error in errors.items():
        predicted = 10 * math.log10(rho_of(closed_form(form, sx, sw, seed=0), sx, sw))
        assert 10 * math.log10(errors["hadamard"] / error) == pytest.approx(predicted, abs=1.2), form


def product_error(x: Matrix, w: Matrix, factors: Factors) -> float:
    """Return the error of the product with both sides in 6 bits, scales by the largest magnitude of each row."""
    transform = factors.stored(N)
    sides = []
    for side in (transform.apply(x), transform.apply_to_weight(w)):
        step = np.abs(side).max(1, keepdims=True) / 31
        sides.append(step * np.rint(side / step))
    return float(np.square(sides[0] @ sides[1].T - x @ w.T).mean())


def test_dead_sites() -> None:
    zero, one = torch.zeros(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    assert rho(zero, one) == rho_diagonal(zero, one) == rho_of(Factors("identity"), one, zero) == 1
    # What x holds and what W reads have nothing in common: the product is 0, whatever a rotation makes of it.
    first, last = torch.diag(one[0]), torch.diag(one[3])
    assert rho_diagonal(first, last) == math.inf
