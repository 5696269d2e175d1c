"""The closed forms by the identities that define them, with the damping written out again here."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from planish.compiler.learn.transforms import closed_forms
from planish.compiler.learn.transforms.closed_forms import (
    block_means,
    geometric_mean,
    head_transforms,
    kronecker_means,
    rms_scale,
    whiten_and_mix,
)
from planish.compiler.learn.transforms.hadamard import hadamard

Matrix = npt.NDArray[np.float64]


def moment(n: int, seed: int, spread: float = 1.5) -> Tensor:
    """Return the second moment of correlated channels whose sizes differ a lot, [n, n]."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(4 * n, n)) @ generator.normal(size=(n, n)) * np.exp(spread * generator.normal(size=n))
    return torch.from_numpy(x.T @ x / len(x))


def damped(s: Tensor) -> Matrix:
    return (s + 0.01 * s.diagonal().mean() * torch.eye(len(s), dtype=s.dtype)).numpy()


def objective(metric: Matrix, sx: Matrix, sw: Matrix) -> float:
    """Return tr(G Sx) tr(G^-1 Sw), to which the error is proportional."""
    return float(np.trace(metric @ sx) * np.trace(np.linalg.solve(metric, sw)))


def singular_sum(sx: Matrix, sw: Matrix) -> float:
    """Return the sum of the singular values of Sx^(1/2) Sw^(1/2)."""
    return float(np.linalg.svd(sqrtm(sx) @ sqrtm(sw), compute_uv=False).sum())


@pytest.mark.parametrize("n", [12, 40])
def test_geometric_mean_solves_its_equation(n: int) -> None:
    """Sx^-1 # Sw is the only positive G with G Sx G = Sw."""
    sx, sw = moment(n, 1), moment(n, 2)
    metric = geometric_mean(sx, sw).numpy()
    np.testing.assert_allclose(metric @ damped(sx) @ metric, damped(sw), rtol=1e-7, atol=1e-7 * float(sw.abs().max()))
    assert np.linalg.eigvalsh(metric).min() > 0


def test_geometric_mean_against_matrix_square_roots() -> None:
    sx, sw = damped(moment(16, 3)), damped(moment(16, 4))
    root = sqrtm(sx)
    expected = np.linalg.solve(root, sqrtm(root @ sw @ root)) @ np.linalg.inv(root)
    found = geometric_mean(moment(16, 3), moment(16, 4)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("n", [16, 48])
def test_both_sides_are_balanced_and_level(n: int) -> None:
    sx, sw = moment(n, 5), moment(n, 6)
    exact_x = torch.from_numpy(damped(sx))
    p = whiten_and_mix(geometric_mean(sx, sw), exact_x, torch.from_numpy(hadamard(n))).numpy()
    inputs = p.T @ damped(sx) @ p
    inverse = np.linalg.inv(p)
    weights = inverse @ damped(sw) @ inverse.T
    np.testing.assert_allclose(inputs, weights, atol=1e-7 * np.abs(inputs).max())
    np.testing.assert_allclose(np.diag(inputs), np.diag(inputs).mean(), rtol=1e-7)
    # The minimum of the error model.
    product = np.trace(inputs) * np.trace(weights)
    np.testing.assert_allclose(product, singular_sum(damped(sx), damped(sw)) ** 2, rtol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_full_beats_diagonal_beats_none(seed: int) -> None:
    """rho >= rho_d >= 1 for the transforms as they are computed, not only for the formulas."""
    sx, sw = moment(24, 10 + seed), moment(24, 20 + seed)
    exact_x, exact_w = damped(sx), damped(sw)
    scale = rms_scale(sx.diagonal(), sw.diagonal()).numpy()
    plain = objective(np.eye(24), exact_x, exact_w)
    diagonal = objective(np.diag(scale**2), exact_x, exact_w)
    full = objective(geometric_mean(sx, sw).numpy(), exact_x, exact_w)
    assert full < diagonal < plain


def test_rms_scale_is_the_best_diagonal() -> None:
    sx, sw = moment(20, 7), moment(20, 8)
    exact_x, exact_w = np.diag(damped(sx)), np.diag(damped(sw))
    scale = rms_scale(sx.diagonal(), sw.diagonal()).numpy()
    least = (scale**2 * exact_x).sum() * (exact_w / scale**2).sum()
    np.testing.assert_allclose(least, np.sqrt(exact_x * exact_w).sum() ** 2, rtol=1e-9)
    np.testing.assert_allclose(np.log(scale).mean(), 0, atol=1e-12)


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_forms, "_DAMPING", 0.0)


@pytest.mark.usefixtures("undamped")
def test_kronecker_moments_have_kronecker_means() -> None:
    a, b, c, d = moment(4, 1), moment(6, 2), moment(4, 3), moment(6, 4)
    left, right, _, _ = kronecker_means(torch.kron(a, b), torch.kron(c, d), 4)
    expected = torch.kron(geometric_mean(a, c), geometric_mean(b, d))
    torch.testing.assert_close(torch.kron(left, right), expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.usefixtures("undamped")
@pytest.mark.parametrize("rows", [3, 4, 6])
def test_kronecker_mean_is_the_global_minimum(rows: int) -> None:
    """No other product of two factors is better, near or far."""
    sx, sw = moment(24, 30), moment(24, 31)
    left, right, left_moment, right_moment = kronecker_means(sx, sw, rows)
    least = objective(torch.kron(left, right).numpy(), sx.numpy(), sw.numpy())
    generator = np.random.default_rng(0)
    for spread in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(50):
            near = [
                root @ np.diag(np.exp(spread * generator.normal(size=len(root)))) @ root.T
                for root in (
                    np.linalg.cholesky(g.numpy()) @ np.linalg.qr(generator.normal(size=g.shape))[0]
                    for g in (left, right)
                )
            ]
            assert objective(np.kron(*near), sx.numpy(), sw.numpy()) > least * (1 - 1e-6)
    assert objective(geometric_mean(sx, sw).numpy(), sx.numpy(), sw.numpy()) < least
    assert left_moment.shape == left.shape
    assert right_moment.shape == right.shape


@pytest.mark.usefixtures("undamped")
def test_one_row_is_the_dense_mean() -> None:
    sx, sw = moment(12, 1), moment(12, 2)
    _, right, _, _ = kronecker_means(sx, sw, 1)
    alone = geometric_mean(sx, sw)
    torch.testing.assert_close(right / right.trace(), alone / alone.trace(), rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("undamped")
def test_blocks_are_solved_alone() -> None:
    sx, sw = moment(24, 1), moment(24, 2)
    metrics, moments = block_means(sx, sw, 8)
    for i in range(3):
        part = slice(8 * i, 8 * i + 8)
        torch.testing.assert_close(metrics[i], geometric_mean(sx[part, part], sw[part, part]))
        torch.testing.assert_close(moments[i], sx[part, part])


def test_a_silent_block_stays_finite() -> None:
    sx = moment(16, 1)
    sx[8:] = 0
    sx[:, 8:] = 0
    metrics, _ = block_means(sx, moment(16, 2), 8)
    assert metrics.isfinite().all()


def test_heads_are_levelled_one_by_one() -> None:
    stored, reader = (torch.stack([moment(8, seed + i) for i in range(3)]) for seed in (40, 50))
    maps = head_transforms(stored, reader, torch.from_numpy(hadamard(8)))
    for i in range(3):
        seen = maps[i].T @ stored[i] @ maps[i]
        torch.testing.assert_close(seen.diagonal(), seen.diagonal().mean().expand(8), rtol=1e-6, atol=0)
        full = objective((maps[i] @ maps[i].T).numpy(), damped(stored[i]), damped(reader[i]))
        assert full < objective(np.eye(8), damped(stored[i]), damped(reader[i]))
