"""GPTQ against the algorithm as its paper first states it, in numpy float64, and against rounding to nearest."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from planish.compiler.learn.rounding import gptq as module
from planish.compiler.learn.rounding.gptq import compensate, gptq
from planish.compiler.quantize.arithmetic import dequantize_weight, fit_scale, quantize_weight
from planish.passes.scheme import LinearFormat

Matrix = npt.NDArray[np.float64]


def inputs(n: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """Return inputs whose channels follow a few common causes, float64 [tokens, n]."""
    generator = np.random.default_rng(seed)
    causes = generator.normal(size=(tokens, max(2, n // 6))) @ generator.normal(size=(max(2, n // 6), n))
    return torch.from_numpy(causes + 0.3 * generator.normal(size=(tokens, n)))


def weights(rows: int, n: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, n)).astype(np.float32))


def textbook(weight: Matrix, hessian: Matrix, form: LinearFormat) -> tuple[npt.NDArray[np.int64], list[Matrix]]:
    """Round column by column, each time removing the column from the inverse Hessian (optimal brain surgeon).

    Without blocks and without a Cholesky factor; the scale of a group is fitted when its first column is reached.
    """
    zero = 1 << form.weight_bits - 1
    n = weight.shape[1]
    group = form.group or n
    inverse = np.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * np.eye(n))
    work, codes, scales = weight.copy(), np.empty(weight.shape, np.int64), []
    for i in range(n):
        if i % group == 0:
            scales.append(fit_scale(torch.from_numpy(work[:, i : i + group]).float(), form).numpy().astype(np.float64))
        q = np.clip(np.round(work[:, i] / scales[-1][:, 0]), -zero, zero - 1)
        codes[:, i] = q + zero
        error = (work[:, i] - q * scales[-1][:, 0]) / inverse[i, i]
        work -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes, scales


@pytest.mark.parametrize(
    ("n", "group", "block"),
    # One block; several; groups within blocks; groups that end within one; groups longer than it; a short last group.
    [(24, None, 128), (40, None, 16), (64, 16, 32), (48, 16, 24), (64, 32, 16), (40, 16, 128), (40, 16, 12)],
)
def test_equals_the_textbook(n: int, group: int | None, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    form = LinearFormat(4, 8, group)
    x, w = inputs(n), weights(6, n)
    found = gptq(w, x.T @ x, form)
    codes, scales = textbook(w.double().numpy(), (x.T @ x).numpy(), form)
    np.testing.assert_array_equal(found.codes.numpy(), codes)
    # A float16 scale may land on its neighbour.
    np.testing.assert_allclose(found.scale.numpy().T, np.concatenate(scales, 1), rtol=1e-3 if group else 1e-5)
    assert found.scale.shape == (form.groups(n), 6)
    assert found.group == (group or n)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 16])
def test_beats_rounding_to_nearest_where_inputs_correlate(bits: int, group: int | None) -> None:
    form = LinearFormat(bits, 16, group)
    x, w = inputs(200), weights(32, 200)
    seen, fresh = x[:300], x[300:]

    def error(rounded: Tensor) -> float:
        return float((fresh @ (rounded - w).double().T).square().sum())

    nearest = error(dequantize_weight(quantize_weight(w, form)))
    assert error(dequantize_weight(gptq(w, seen.T @ seen, form))) < 0.6 * nearest


def test_uncorrelated_inputs_leave_rounding_to_nearest() -> None:
    w, form = weights(8, 48), LinearFormat(4, 8)
    assert torch.equal(gptq(w, torch.eye(48, dtype=torch.float64) * 7, form).codes, quantize_weight(w, form).codes)


def test_silent_channels() -> None:
    """Channels that are always 0 make the Hessian singular; the damping is there for them."""
    x, w = inputs(32), weights(8, 32)
    x[:, 5:9] = 0
    found = dequantize_weight(gptq(w, x.T @ x, LinearFormat(4, 8)))
    assert found.isfinite().all()
    assert float((x @ (found - w).double().T).norm()) < 0.2 * float((x @ w.double().T).norm())


def test_a_broken_hessian_is_refused() -> None:
    hessian = torch.eye(16, dtype=torch.float64)
    hessian[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        gptq(weights(2, 16), hessian, LinearFormat(4, 8))


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
def test_compensate_is_the_least_squares_solution(ridge: float) -> None:
    """Against numpy's solver, with the ridge as further rows of the system."""
    x, w = inputs(12), weights(5, 12)
    seen = x + 0.1 * inputs(12, seed=7)
    hessian, cross = seen.T @ seen, x.T @ seen
    root = np.sqrt(ridge * float(hessian.diagonal().mean()))
    left = np.concatenate([seen.numpy(), root * np.eye(12)])
    right = np.concatenate([(x @ w.double().T).numpy(), root * w.double().numpy().T])
    expected = np.linalg.lstsq(left, right)[0].T
    np.testing.assert_allclose(
        compensate(w.double(), hessian, cross, [ridge])[ridge].numpy(), expected, rtol=1e-6, atol=1e-8
    )


def test_nothing_to_compensate() -> None:
    x, w = inputs(12), weights(5, 12)
    torch.testing.assert_close(compensate(w.double(), x.T @ x, x.T @ x, [0.3])[0.3], w.double(), rtol=1e-8, atol=1e-9)
