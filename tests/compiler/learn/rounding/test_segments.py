"""Rounding in two segments: GPTQ against the textbook algorithm, and no row worse than rounded to nearest."""

import numpy as np
import pytest
import torch

from planish.compiler.learn.rounding import descent as descent_module
from planish.compiler.learn.rounding import gptq as gptq_module
from planish.compiler.learn.rounding.gptq import gptq
from planish.compiler.learn.rounding.row_errors import damped
from planish.compiler.learn.rounding.segments import Rounding, assemble, round_segments, select_rows
from planish.compiler.quantize.arithmetic import dequantize_weight, fit_scale, quantize_weight
from planish.passes.high_impact import HighImpact, Segment, segments
from planish.passes.scheme import LinearFormat
from tests.rounding import error, moment, weights

N, COUNT = 160, 64
W = weights(24, N)
H, HELD_OUT = moment(N, 1), moment(N, 2)
HIGH = HighImpact(4, np.random.default_rng(3).permutation(N), COUNT)


def of(group: int | None = None, bits: int = 2) -> tuple[Segment, ...]:
    return segments(LinearFormat(bits, 16, group), HIGH)


def column_by_column(parts: tuple[Segment, ...]) -> torch.Tensor:
    """Round the rest and then the high channels, removing each column from the inverse as it is done (float64)."""
    inverse = torch.linalg.inv(damped(H).double())
    work, rounded = W.double().clone(), torch.zeros(W.shape, dtype=torch.float64)
    for part in reversed(parts):
        assert part.channels is not None
        scale = fit_scale(work[:, part.channels].float(), part.format).double()[:, 0]
        zero = 1 << part.format.weight_bits - 1
        for j in part.channels.tolist():
            rounded[:, j] = (work[:, j] / scale).round().clamp(-zero, zero - 1) * scale
            work -= (work[:, j] - rounded[:, j])[:, None] * inverse[j] / inverse[j, j]
            inverse = inverse - torch.outer(inverse[j], inverse[j]) / inverse[j, j]
    return rounded


def test_gptq_is_the_textbook_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_module, "_DAMPING", 0.0)
    monkeypatch.setattr(descent_module, "_SWEEPS", 0)
    expected = column_by_column(of())
    found = assemble(round_segments(W, of(), H, H, "gptq"), of()).double()
    # Sums of float32 end a little off: a weight between two codes may go to the other, and then those behind it too.
    rows = (found - expected).abs().amax(1) < 1e-4
    assert rows.double().mean() > 0.8
    errors = [error(W, each, H).sum() for each in (found, expected)]
    assert float(errors[0] / errors[1]) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_no_row_is_worse_than_nearest_on_held_out(rounding: Rounding, group: int | None) -> None:
    parts = of(group)
    nearest = assemble(round_segments(W, parts, H, HELD_OUT, "nearest"), parts)
    found = assemble(round_segments(W, parts, H, HELD_OUT, rounding), parts)
    before, after = error(W, nearest, HELD_OUT), error(W, found, HELD_OUT)
    assert (after <= before * (1 + 1e-4)).all()
    assert float(after.sum()) < 0.9 * float(before.sum())


def test_rows_that_only_nearest_suits_are_rounded_to_nearest() -> None:
    """On the identity as held-out moment nothing is better than rounding to nearest with scales of least error."""
    found = round_segments(W, of(), H, torch.eye(N).double(), "gptq")
    nearest = round_segments(W, of(), H, torch.eye(N).double(), "nearest")
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(found, nearest, strict=True))


def test_the_finer_grid_repairs_the_coarser_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other order, which repairs the rest alone, ends with a larger error, neither descended from."""
    monkeypatch.setattr(descent_module, "_SWEEPS", 0)
    parts = of()
    found = error(W, assemble(round_segments(W, parts, H, H, "gptq"), parts), H).sum()
    high, rest = (torch.from_numpy(part.channels) for part in parts)
    swapped = (torch.cat([high, rest]), parts[0].format, parts[1].format)
    order, first, second = swapped
    M = damped(H).double()[order][:, order]
    A, B, C = M[:COUNT, :COUNT], M[:COUNT, COUNT:], M[COUNT:, COUNT:]
    of_high = dequantize_weight(gptq(W[:, high], A - B @ torch.linalg.solve(C, B.T), first))
    moved = W[:, rest] + (W[:, high] - of_high) @ torch.linalg.solve(C, B.T).T.float()
    of_rest = dequantize_weight(gptq(moved, C, second))
    other = torch.empty_like(W)
    other[:, high], other[:, rest] = of_high, of_rest
    assert float(found) < 0.9 * float(error(W, other, H).sum())


@pytest.mark.parametrize("count", [0, COUNT])
def test_codes_and_channels_belong_together(count: int) -> None:
    parts = segments(LinearFormat(3, 16, 32), HighImpact(8, HIGH.order, count))
    rounded = round_segments(W, parts, H, HELD_OUT, "nearest")
    whole = assemble(rounded, parts)
    for part, codes in zip(parts, rounded, strict=True):
        channels = slice(None) if part.channels is None else torch.from_numpy(part.channels)
        assert torch.equal(whole[:, channels], dequantize_weight(quantize_weight(W[:, channels], part.format)))
        assert codes.bits == part.format.weight_bits
    rows = select_rows(rounded, slice(5, 9))
    assert torch.equal(assemble(rows, parts), whole[5:9])


def test_one_segment_is_gptq_and_descent_from_there() -> None:
    parts = segments(LinearFormat(3, 16, 32), None)
    (found,) = round_segments(W, parts, H, HELD_OUT, "gptq")
    begun = gptq(W, H, parts[0].format)
    assert torch.equal(found.scale, begun.scale)
    before, after = (error(W, dequantize_weight(each), damped(H).double()) for each in (begun, found))
    assert (after <= before * (1 + 1e-5)).all()
    assert float(after.sum()) < 0.97 * float(before.sum())


def test_two_segments_are_descended_from_together() -> None:
    """No code of either segment has a better neighbour, given all others."""
    parts = of()
    found = round_segments(W, parts, H, H, "gptq")
    whole, M = assemble(found, parts), damped(H).double()
    best = error(W, whole, M)
    for part, rounded in zip(parts, found, strict=True):
        assert part.channels is not None
        moved = 0
        for j, channel in enumerate(part.channels.tolist()):
            for step in (-1, 1):
                allowed = (rounded.codes[:, j].int() + step).clamp(0, (1 << rounded.bits) - 1)
                other = whole.clone()
                other[:, channel] += (allowed - rounded.codes[:, j].int()) * rounded.scale[0]
                moved += int((error(W, other, M) < best * (1 - 1e-4)).sum())
        # Four sweeps leave few codes that could still be better.
        assert moved < 0.02 * rounded.codes.numel()


@pytest.mark.parametrize("which", [0, 1])
def test_moments_that_are_not_finite_are_refused(which: int) -> None:
    moments = [H.clone(), HELD_OUT.clone()]
    moments[which][3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        round_segments(W, of(), *moments, "gptq")
