"""Coordinate descent on codes, against trying every code of one channel after the other in numpy."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from planish.compiler.learn.rounding import descent as module
from planish.compiler.learn.rounding.descent import descend
from planish.compiler.learn.rounding.gptq import gptq
from planish.compiler.learn.rounding.row_errors import damped
from planish.passes.scheme import LinearFormat
from tests.rounding import error, moment, weights

N = 40
H = damped(moment(N, 1))


def start(weight: Tensor, bits: int, group: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return signed codes as GPTQ finds them, scales, the group of each channel, and the bounds of the grid."""
    found = gptq(weight, H.double(), LinearFormat(bits, 16, group))
    zero = float(1 << bits - 1)
    codes = (found.codes.float() - zero).T.contiguous()
    return codes, found.scale, torch.arange(N) // found.group, torch.full((N,), zero)


def reference(weight: Tensor, codes: Tensor, scales: Tensor, groups: Tensor, zeros: Tensor, sweeps: int) -> np.ndarray:
    """Try every code of one channel after the other, by the error itself, float64 [out, in]."""
    w, c, s, h = (each.double().clone().numpy() for each in (weight, codes.T, scales[groups].T, H))
    for _ in range(sweeps):
        for row, j in itertools.product(range(len(w)), range(w.shape[1])):
            tried = np.arange(-int(zeros[j]), int(zeros[j]))
            errors = []
            for code in tried:
                c[row, j] = code
                e = w[row] - c[row] * s[row]
                errors.append(e @ h @ e)
            c[row, j] = tried[int(np.argmin(errors))]
    return c


@pytest.mark.parametrize("block", [128, 12, 1])
@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, None), (3, 16), (4, 32)])
def test_every_code_is_the_best_of_its_grid(
    bits: int, group: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    w = weights(5, N)
    codes, *grid = start(w, bits, group)
    expected = reference(w, codes, *grid, module._SWEEPS)
    before = codes.clone()
    found = descend(w, codes, *grid, H)
    np.testing.assert_array_equal(found.T, expected)
    assert not torch.equal(found, before)


def test_no_row_becomes_worse_and_the_error_falls() -> None:
    w = weights(64, N)
    codes, scales, groups, zeros = start(w, 2)
    begun = codes.clone()
    found = descend(w, codes, scales, groups, zeros, H)
    before, after = (error(w, (each * scales).T, H.double()) for each in (begun, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert float(after.sum()) < 0.9 * float(before.sum())


def test_channels_of_their_own_bits_stay_on_their_grids() -> None:
    w = 3 * weights(16, N)
    codes, scales, groups, _ = start(w, 4)
    zeros = torch.where(torch.arange(N) % 3 == 0, 8.0, 2.0)
    found = descend(w, codes.clamp(-2, 1), scales, groups, zeros, H).T
    assert (found >= -zeros).all()
    assert (found <= zeros - 1).all()
    assert (found.amin(0) < -2).any()


def test_what_cannot_be_better_stays() -> None:
    """Weights on the grid have no error, and codes of uncorrelated inputs nothing to make up for."""
    w = weights(6, N)
    codes, scales, *grid = start(w, 3)
    on_grid = (codes * scales).T
    assert torch.equal(descend(on_grid, codes.clone(), scales, *grid, H), codes)
    nearest = (w.T / scales).round().clamp(-4, 3)
    assert torch.equal(descend(w, nearest.clone(), scales, *grid, torch.eye(N)), nearest)
