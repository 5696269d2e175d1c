"""Round a weight whose input channels are one segment, or a high-impact one and the rest.

GPTQ (arXiv 2210.17323) over two segments takes the rest first: what goes wrong there is larger, and the finer grid of
the high-impact channels is left to repair it. With H cut into the blocks of both segments, the rest r and the others h,
rounding column after column is the same as rounding r under its Schur complement H_rr - H_rh H_hh^-1 H_hr, which is
what an error in r costs once h has made up for it; then moving h by E_r H_rh H_hh^-1; then rounding h under H_hh.
What comes out is descended from, over the channels of both.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from planish.compiler.learn.rounding.descent import descend
from planish.compiler.learn.rounding.gptq import gptq
from planish.compiler.learn.rounding.round_split import round_split
from planish.compiler.learn.rounding.row_errors import damped, row_errors
from planish.compiler.learn.rounding.weight_clips import learn_clips
from planish.compiler.quantize.arithmetic import QuantizedWeight, channels_of, dequantize_weight, quantize_weight
from planish.compiler.select.channel_split import ChannelSplit
from planish.passes.high_impact import Segment

__all__ = ["Parts", "Rounding", "assemble", "round_segments", "select_rows"]

#: How weights are rounded: column by column, then by descent; by learned clips of the rest and learned codes of
#: high-impact channels (arXiv 2511.17801); or each to its nearest.
Rounding = Literal["gptq", "adaround", "nearest"]

#: One weight by segments, in their order: the high-impact channels first.
Parts = tuple[QuantizedWeight, ...]


@torch.no_grad()
def round_segments(
    weight: Tensor, segments: Sequence[Segment], moment: Tensor, held_out: Tensor, rounding: Rounding
) -> Parts:
    """Round a weight to the grids of its segments such that its output moves least.

    In two segments, every row whose output error on the held-out moment is larger than that of rounding to nearest is
    rounded to nearest.

    Args:
        weight: float [out, in].
        segments: of its input channels, as `segments` gives them.
        moment: sum of x^T x over the inputs as the layer sees them, float64 [in, in].
        held_out: the same of inputs that nothing is fitted to.
        rounding: how.

    Raises:
        ValueError: if a moment is not finite.
    """
    nearest = tuple(quantize_weight(channels_of(weight, each), each.format) for each in segments)
    if rounding == "nearest":
        return nearest
    if len(segments) == 1:
        form = segments[0].format
        if rounding == "gptq":
            return _descended(weight, segments, damped(moment), (gptq(weight, moment, form),))
        return (learn_clips(weight, moment, held_out, form),)
    high, rest = (_channels(each).to(weight.device) for each in segments)
    learned = (_gptq if rounding == "gptq" else _learn)(weight, segments, high, rest, moment, held_out)
    return _best_rows(weight, segments, held_out, nearest, learned)


def assemble(parts: Parts, segments: Sequence[Segment]) -> Tensor:
    """Return the float32 [out, in] matrix that the codes stand for, channels as they were before they were cut."""
    if len(parts) == 1:
        return dequantize_weight(parts[0])
    whole = torch.empty(len(parts[0].codes), sum(part.codes.shape[1] for part in parts), device=parts[0].codes.device)
    for part, segment in zip(parts, segments, strict=True):
        whole[:, _channels(segment)] = dequantize_weight(part)
    return whole


def select_rows(parts: Parts, rows: slice) -> Parts:
    """Return some output channels of a weight."""
    return tuple(
        QuantizedWeight(part.codes[rows], part.scale[:, rows].contiguous(), part.bits, part.group) for part in parts
    )


def _gptq(weight: Tensor, segments: Sequence[Segment], high: Tensor, rest: Tensor, moment: Tensor, _: Tensor) -> Parts:
    # Damped as GPTQ does it, before the complement is taken: no channel may seem to be made up for without loss.
    M = damped(moment)
    H = M.double()
    within, across = H[high][:, high], H[rest][:, high]
    back = torch.linalg.solve(within, across.T)
    rest_part = gptq(weight[:, rest], H[rest][:, rest] - across @ back, segments[1].format)
    error = weight[:, rest] - dequantize_weight(rest_part)
    moved = weight[:, high] + error @ back.T.to(error.dtype)
    return _descended(weight, segments, M, (gptq(moved, within, segments[0].format), rest_part))


def _descended(weight: Tensor, segments: Sequence[Segment], H: Tensor, parts: Parts) -> Parts:
    """Return the same scales with the codes that descent finds under a damped moment."""
    rows, k = weight.shape
    orders = [torch.arange(k) if each.channels is None else _channels(each) for each in segments]
    codes, zeros = torch.empty(k, rows, device=weight.device), torch.empty(k, device=weight.device)
    groups, first = torch.empty(k, dtype=torch.int64), 0
    for part, order in zip(parts, orders, strict=True):
        zeros[order] = float(1 << part.bits - 1)
        codes[order] = part.codes.T.float() - zeros[order, None]
        groups[order] = first + torch.arange(len(order)) // part.group
        first += len(part.scale)
    scales = torch.cat([part.scale for part in parts])
    codes = descend(weight, codes, scales, groups, zeros, H)
    return tuple(
        dataclasses.replace(part, codes=(codes[order].T + zeros[order]).to(torch.uint8).contiguous())
        for part, order in zip(parts, orders, strict=True)
    )


def _learn(
    weight: Tensor, segments: Sequence[Segment], high: Tensor, rest: Tensor, moment: Tensor, held_out: Tensor
) -> Parts:
    split = ChannelSplit(segments[1].format, segments[0].format)
    found = round_split(weight, torch.cat([high, rest]), len(high), split, moment, held_out)
    assert found.high is not None
    assert found.low is not None
    return found.high, found.low


def _best_rows(weight: Tensor, segments: Sequence[Segment], held_out: Tensor, first: Parts, second: Parts) -> Parts:
    """Return the rows of `first`, but those of `second` where their error is not larger."""
    if not held_out.isfinite().all():
        raise ValueError("the second moment of the held-out inputs holds NaN or infinity")
    H = held_out.float()
    before, after = (row_errors(weight - assemble(each, segments), H) for each in (first, second))
    better = after <= before
    return tuple(
        QuantizedWeight(
            torch.where(better[:, None], new.codes, old.codes),
            torch.where(better, new.scale, old.scale),
            old.bits,
            old.group,
        )
        for old, new in zip(first, second, strict=True)
    )


def _channels(segment: Segment) -> Tensor:
    assert segment.channels is not None
    return torch.from_numpy(segment.channels)
