"""Output errors from second moments: against the outputs themselves."""

import dataclasses

import numpy as np
import pytest
import torch

from planish.compiler.learn.rounding.row_errors import BestRows, damped, row_errors
from planish.compiler.quantize.arithmetic import QuantizedWeight, dequantize_weight, quantize_weight
from planish.passes.scheme import LinearFormat

FORM = LinearFormat(3, 16)
RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(200, 12)), RNG.normal(size=(5, 12))
H = torch.from_numpy(X.T @ X / len(X))


def test_equals_the_mean_squared_change_of_outputs() -> None:
    error = W - np.round(W)
    expected = np.square(X @ error.T).mean(0)
    np.testing.assert_allclose(row_errors(torch.from_numpy(error), H).numpy(), expected, rtol=1e-12)


def test_damping() -> None:
    found = damped(1000 * H)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), H / H.diagonal().mean() + 0.01 * torch.eye(12, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )
    assert damped(torch.zeros(3, 3)).tolist() == (0.01 * torch.eye(3)).tolist()
    with pytest.raises(ValueError, match="NaN or infinity"):
        damped(H * torch.nan)


def worse_rows(rounding: QuantizedWeight, rows: list[int]) -> QuantizedWeight:
    codes = rounding.codes.clone()
    codes[rows] = (codes[rows] + 1) % 8
    return dataclasses.replace(rounding, codes=codes)


def test_every_row_keeps_its_best() -> None:
    weight = torch.from_numpy(W).float()
    good = quantize_weight(weight, FORM)
    best = BestRows(weight, H, worse_rows(good, [0, 3]))
    before = best.errors
    best.offer(worse_rows(good, [1, 4]))
    torch.testing.assert_close(best.found.codes, good.codes)
    assert (best.errors <= before).all()
    expected = row_errors(weight - dequantize_weight(good), H.float())
    torch.testing.assert_close(best.errors, expected)


def test_what_stands_beside_counts() -> None:
    """The part is judged together with the rest: rounding it worse pays where that undoes what the rest does."""
    weight = torch.from_numpy(W[:, :8]).float()
    start = quantize_weight(weight, FORM)
    beside = torch.from_numpy(RNG.normal(size=(5, 4))).float()
    found = BestRows(weight, H, start, beside).errors
    whole = torch.cat([weight - dequantize_weight(start), beside], 1).double()
    np.testing.assert_allclose(found.numpy(), np.square(X @ whole.T.numpy()).mean(0), rtol=1e-4)
