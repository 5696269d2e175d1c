"""AdaRound against trying every rounding, against GPTQ, and beside a part that is rounded already."""

import itertools

import pytest
import torch

from planish.compiler.learn.rounding.adaround import Beside, adaround
from planish.compiler.learn.rounding.gptq import gptq
from planish.compiler.learn.rounding.row_errors import damped, row_errors
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.passes.scheme import LinearFormat
from tests.rounding import error, moment, weights

FORM = LinearFormat(3, 16)


def test_close_to_the_best_of_all_roundings() -> None:
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(12, 8, generator=generator)
    x = torch.randn(400, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    x += 0.3 * torch.randn(400, 8, generator=generator)
    H = damped(x.T @ x / 400).double()
    start = quantize_weight(w, FORM)
    found = error(w, dequantize_weight(adaround(w, start, H, H)), H)
    scale = start.scale.T
    down = (w / scale).floor()
    every = [
        error(w, (down + torch.tensor(ups, dtype=torch.float32)).clamp(-4, 3) * scale, H)
        for ups in itertools.product((0, 1), repeat=8)
    ]
    best, before = torch.stack(every).amin(0), error(w, dequantize_weight(start), H)
    assert float(best.sum()) < 0.5 * float(before.sum())
    assert (found >= best * (1 - 1e-5)).all()
    assert float((before - found).sum()) > 0.7 * float((before - best).sum())


@pytest.mark.parametrize("group", [None, 16])
def test_weights_go_up_or_down_and_no_row_gets_worse(group: int | None) -> None:
    w, H, held_out = weights(16, 40), moment(40, 1, tokens=60), moment(40, 2)
    start = quantize_weight(w, LinearFormat(3, 16, group))
    found = adaround(w, start, H, held_out, steps=300)
    assert torch.equal(found.scale, start.scale)
    assert (found.codes.int() - start.codes.int()).abs().max() == 1
    before, after = (error(w, dequantize_weight(each), held_out) for each in (start, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert float(after.sum()) < 0.9 * float(before.sum())


def test_about_as_good_as_gptq() -> None:
    w, H = weights(32, 48), moment(48, 3)
    found = adaround(w, quantize_weight(w, FORM), H, H, steps=600)
    nearest, by_gptq, ours = (
        float(error(w, dequantize_weight(each), H).sum())
        for each in (quantize_weight(w, FORM), gptq(w, H, FORM), found)
    )
    assert ours < 0.8 * nearest
    assert ours < 1.1 * by_gptq


def test_it_makes_up_for_what_stands_beside() -> None:
    w, H = weights(24, 40), moment(40, 4)
    low, high = torch.arange(0, 40, 2), torch.arange(1, 40, 2)
    lost = w[:, low] - dequantize_weight(quantize_weight(w[:, low], LinearFormat(2, 16)))
    start = quantize_weight(w[:, high], LinearFormat(4, 16))

    def whole(rounded: torch.Tensor) -> float:
        part = torch.zeros_like(w)
        part[:, low], part[:, high] = lost, w[:, high] - rounded
        return float(row_errors(part.double(), H).sum())

    alone = adaround(w[:, high], start, H[high][:, high], H[high][:, high], steps=300)
    together = adaround(w[:, high], start, H, H, Beside(high, low, lost), steps=300)
    assert whole(dequantize_weight(together)) < 0.9 * whole(dequantize_weight(alone))
    assert whole(dequantize_weight(together)) < whole(dequantize_weight(start))


def test_a_moment_that_is_not_finite_is_refused() -> None:
    w = weights(2, 32)
    with pytest.raises(ValueError, match="NaN or infinity"):
        adaround(w, quantize_weight(w, FORM), moment(32, 0) * torch.inf, moment(32, 1))
