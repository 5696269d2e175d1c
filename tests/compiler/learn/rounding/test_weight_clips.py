"""Learned clips against a search over all scales, and against the start."""

import pytest
import torch

from planish.compiler.learn.rounding.row_errors import damped
from planish.compiler.learn.rounding.weight_clips import learn_clips
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.passes.scheme import LinearFormat
from tests.rounding import error, moment, weights


@pytest.mark.parametrize("bits", [2, 3])
def test_close_to_the_best_of_all_scales(bits: int) -> None:
    w, H = weights(12, 32), moment(32, 0)
    zero = 1 << bits - 1
    found = error(w, dequantize_weight(learn_clips(w, H, H, LinearFormat(bits, 16))), damped(H).double())
    absmax = w.abs().amax(1, keepdim=True) / (zero - 1)
    every = []
    for share in torch.linspace(0.05, 1, 400):
        scale = share * absmax
        every.append(error(w, (w / scale).round().clamp(-zero, zero - 1) * scale, damped(H).double()))
    best = torch.stack(every).amin(0)
    start = error(w, dequantize_weight(quantize_weight(w, LinearFormat(bits, 16))), damped(H).double())
    assert float(best.sum()) < 0.9 * float(start.sum())
    # Most of what there is to gain is gained.
    assert float((start - found).sum()) > 0.7 * float((start - best).sum())


@pytest.mark.parametrize("group", [None, 16])
def test_no_row_is_worse_than_its_start_on_held_out_text(group: int | None) -> None:
    w, H, held_out = weights(20, 40), moment(40, 1, tokens=30), moment(40, 2)
    form = LinearFormat(2, 16, group)
    start, found = quantize_weight(w, form), learn_clips(w, H, held_out, form)
    before, after = (error(w, dequantize_weight(each), held_out) for each in (start, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert float(after.sum()) < float(before.sum())
    assert found.scale.shape == start.scale.shape
    if group:
        assert torch.equal(found.scale, found.scale.half().float())


def test_rows_of_zeros_stay() -> None:
    w = torch.zeros(3, 32)
    assert not dequantize_weight(learn_clips(w, moment(32, 0), moment(32, 1), LinearFormat(2, 16), steps=10)).any()


def test_a_moment_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        learn_clips(weights(2, 32), moment(32, 0) * torch.inf, moment(32, 1), LinearFormat(2, 16))
