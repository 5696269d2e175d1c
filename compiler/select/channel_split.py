"""A weight whose channels are stored in two formats: the ones that matter most with more bits (arXiv 2511.17801).

`ChannelSplit.of` is the split that the compiled model stores, with the bits that `planish inspect` counts in it.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from planish.compiler.errors import SelectionError
from planish.compiler.quantize.arithmetic import QuantizedWeight, dequantize_weight, quantize_weight
from planish.passes.high_impact import CHANNEL_STEP, SUFFIXES, Segment, high_format
from planish.passes.scheme import LinearFormat

__all__ = ["Axis", "ChannelSplit", "SplitWeight"]

#: What a channel is: an input channel is a column of a weight [out, in], an output channel a row.
Axis = Literal["in", "out"]


@dataclasses.dataclass(frozen=True)
class ChannelSplit:
    """How channels are told apart and stored.

    Linears that read the same input share the order of its channels: their weights, one below the other, are split as
    one matrix.

    Attributes:
        low: format of the most channels.
        high: format of the channels that matter most.
        axis: what a channel is.
        step: the channels of the high part are a multiple of this; kernels want 64.
        index_bits: bits stored per channel for where it comes from, as the graph has it.
    """

    low: LinearFormat
    high: LinearFormat
    axis: Axis = "in"
    step: int = CHANNEL_STEP
    index_bits: int = 32

    def __post_init__(self) -> None:
        if not self.low.weight_bits < self.high.weight_bits < 16:
            raise SelectionError(
                f"Channels that matter get {self.high.weight_bits} bits, the others {self.low.weight_bits}: give those "
                "that matter more bits than the others, and at most 8."
            )
        if self.step < 1 or self.index_bits < 0:
            raise SelectionError(
                f"Steps of {self.step} channels, with {self.index_bits} bits for the index of each, are not possible."
            )

    @classmethod
    def of(cls, form: LinearFormat, bits: int) -> "ChannelSplit":
        """Return how the compiled model stores linears of a format whose high-impact channels have `bits` bits.

        Raises:
            SelectionError: if that is not more bits than the others have.
        """
        try:
            return cls(form, high_format(form, bits))
        except ValueError as error:
            raise SelectionError(f"{str(error).capitalize()}. Give --hic-bits more.") from error

    def segments(self, order: Tensor, count: int) -> tuple[Segment, ...]:
        """Return the segments of the input channels, whose activations have grids of their own.

        Args:
            order: the channels, those that matter most first, int64 [channels].
            count: how many of them are high.
        """
        if self.axis == "out" or count == 0:
            return (Segment("", self.low),)
        high, rest = order[:count].numpy(), order[count:].numpy()
        return Segment(SUFFIXES[0], self.high, high), Segment(SUFFIXES[1], self.low, rest)

    def most(self, channels: int) -> int:
        """Return how many of `channels` can be high: not all, as the model stores two parts."""
        return (channels - 1) // self.step * self.step

    def channels(self, shape: tuple[int, int]) -> int:
        """Return how many channels a weight of `shape` [out, in] has."""
        return shape[1] if self.axis == "in" else shape[0]

    def check_counts(self, counts: Sequence[int], channels: int) -> None:
        """Check that `counts` can be numbers of high channels out of `channels`.

        Raises:
            SelectionError: if one is not a multiple of the step from 0 to below `channels`, or they do not grow.
        """
        if not counts or any(later <= count for count, later in itertools.pairwise(counts)):
            raise SelectionError(f"The numbers of high channels must grow from one to the next; these are {[*counts]}.")
        for count in counts:
            if not 0 <= count <= self.most(channels) or count % self.step:
                raise SelectionError(
                    f"{count} of {channels} channels cannot be high: take multiples of {self.step} from 0 to "
                    f"{self.most(channels)}."
                )

    def stored_bits(self, shape: tuple[int, int], count: int) -> int:
        """Return what a weight of `shape` [out, in] takes with `count` high channels: codes, scales and order.

        Each part has scales of its own. There is no order to store where all channels are in one part. Where the order
        of an FFN's hidden units is folded into the linears in front, which takes a site without an online transform,
        the model stores less than is counted here.
        """
        rows, inputs = shape
        bits = 0
        for form, part in ((self.high, count), (self.low, self.channels(shape) - count)):
            part_rows, part_inputs = (rows, part) if self.axis == "in" else (part, inputs)
            if part:
                bits += part_rows * (part_inputs * form.weight_bits + form.groups(part_inputs) * form.scale_bits)
        ordered = 0 < count < self.channels(shape)
        return bits + self.index_bits * self.channels(shape) * ordered

    def quantize(self, weight: Tensor, order: Tensor, count: int) -> "SplitWeight":
        """Round a weight to nearest, each part with scales of least squared error of its own.

        Args:
            weight: float [out, in].
            order: the channels, those that matter most first, int64 [channels].
            count: how many of them are high.
        """
        by_channel = weight.T if self.axis == "in" else weight
        parts = []
        for form, chosen in ((self.high, order[:count]), (self.low, order[count:])):
            part = by_channel[chosen]
            part = part.T.contiguous() if self.axis == "in" else part
            parts.append(quantize_weight(part, form) if len(chosen) else None)
        return SplitWeight(self.axis, order, *parts)


@dataclasses.dataclass(frozen=True)
class SplitWeight:
    """A weight in two parts.

    Attributes:
        axis: what a channel is.
        order: the channels of the high part, then those of the low one, int64 [channels]; groups of scales follow it.
        high: the first channels, or None.
        low: the others, or None.
    """

    axis: Axis
    order: Tensor
    high: QuantizedWeight | None
    low: QuantizedWeight | None

    def dequantize(self) -> Tensor:
        """Return the float32 [out, in] matrix that the codes stand for, channels as they were before the split."""
        dim = 1 if self.axis == "in" else 0
        parts = [dequantize_weight(part) for part in (self.high, self.low) if part is not None]
        whole = torch.cat(parts, dim)
        return whole.index_select(dim, torch.argsort(self.order).to(whole.device))
