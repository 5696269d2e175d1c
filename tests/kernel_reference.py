"""What the kernels must give, computed in PyTorch on the host: exact integers, float64, and nothing of their layouts.

Inputs are drawn anew from the seed of the test. What kernels write goes into memory filled with 0xFF, which is NaN for
floats and no code of any width for codes, with more of it behind: whatever is not written, or written outside, shows.
"""

import dataclasses

import numpy as np
import torch

from planish.plugins.kernel_layout import pack_for_kernel
from planish.plugins.kernel_library import Order
from planish.plugins.linear_ops import DeviceWeight
from planish.plugins.packing import pack
from planish.plugins.token_ops import QuantizedTokens, TokenSegment

__all__ = ["Channels", "Poisoned", "natural_codes", "poisoned_tokens", "quantized", "stored"]

_SMALLEST_SCALE = torch.tensor(1e-10)


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """Some input channels of a linear: weight codes int64 [rows, channels] and their scales float32 [rows]."""

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int

    @classmethod
    def random(cls, generator: torch.Generator, rows: int, channels: int, bits: int) -> "Channels":
        codes = torch.randint(1 << bits, (rows, channels), generator=generator)
        return cls(codes, torch.rand(rows, generator=generator) + 0.01, bits)

    def on(self, device: torch.device) -> DeviceWeight:
        packed = pack(self.codes.numpy().astype(np.uint8), self.bits)
        weight = pack_for_kernel(packed, self.codes.shape[1], self.bits)
        return DeviceWeight.of(weight, self.scales.numpy(), device)

    def centred(self) -> torch.Tensor:
        """Return code - zero point, float64, in which sums of their products with codes are exact."""
        return self.codes.double() - (1 << self.bits - 1)

    def products(self, tokens: torch.Tensor, bits: int) -> torch.Tensor:
        """Return the exact sums of products with token codes int64 [tokens, channels] of `bits` bits, as float32."""
        sums = (tokens.double() - (1 << bits - 1)) @ self.centred().T
        assert sums.abs().max() < 1 << 31
        return sums.float()


class Poisoned:
    """Room for a tensor in memory of 0xFF bytes, some of it behind."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        size = int(np.prod(shape)) * dtype.itemsize
        self._bytes = torch.full((size + 4096,), 255, dtype=torch.uint8, device=device)
        self._size = size
        self.tensor = self._bytes[:size].view(dtype).view(shape)

    def assert_nothing_written_behind(self) -> None:
        assert bool((self._bytes[self._size :] == 255).all())


def poisoned_tokens(tokens: int, segments: list[TokenSegment], order: Order, device: torch.device) -> QuantizedTokens:
    """Return room for quantised tokens whose every byte is 0xFF."""
    room = QuantizedTokens.empty(tokens, segments, order, device)
    for tensor in (room.codes, room.scales, room.zero_sums):
        tensor.view(torch.uint8).fill_(255)
    return room


def stored(codes: torch.Tensor, segment: TokenSegment, order: Order) -> torch.Tensor:
    """Return codes int64 [tokens, channels] of a segment as kernels load them, uint8 [tokens, bytes], padded."""
    padding = segment.padded - segment.channels
    whole = torch.nn.functional.pad(codes, (0, padding), value=1 << segment.bits - 1).to(torch.uint8)
    if order is Order.NIBBLES:
        return whole[:, ::2] | whole[:, 1::2] << 4
    lanes = whole.view(len(codes), -1, 4, 2).transpose(2, 3)
    if order is Order.COLUMNS:
        lanes = lanes.reshape(len(codes), -1, 4, 4, 4).transpose(2, 3)
    return lanes.reshape(len(codes), -1)


def natural_codes(tokens: QuantizedTokens, segment: int) -> torch.Tensor:
    """Return the codes of a segment in the order of channels, int64 [tokens, padded channels], on the host."""
    half = 2 if tokens.order is Order.NIBBLES else 1
    sizes = [each.padded // half for each in tokens.segments]
    start = sum(sizes[:segment])
    part = tokens.codes[:, start : start + sizes[segment]].cpu()
    count = len(part)
    if tokens.order is Order.NIBBLES:
        return torch.stack([part & 15, part >> 4], 2).view(count, -1).long()
    if tokens.order is Order.COLUMNS:
        part = part.view(count, -1, 4, 4, 4).transpose(2, 3).reshape(count, -1)
    return part.view(count, -1, 2, 4).transpose(2, 3).reshape(count, -1).long()


def quantized(
    codes: list[torch.Tensor], scales: torch.Tensor, segments: list[TokenSegment], order: Order, device: torch.device
) -> QuantizedTokens:
    """Return tokens of given codes int64 [tokens, channels] for each segment, and scales float32 [tokens, segments]."""
    parts = [stored(each, segment, order) for each, segment in zip(codes, segments, strict=True)]
    sums = []
    for each, segment in zip(codes, segments, strict=True):
        zero = 1 << segment.bits - 1
        total = each.sum(1) + zero * (segment.padded - segment.channels)
        sums.append(torch.stack([torch.full_like(total, zero), total], 1))
    return QuantizedTokens(
        torch.cat(parts, 1).contiguous().to(device),
        scales.contiguous().to(device),
        torch.stack(sums, 1).int().to(device),
        tuple(segments),
        order,
    )
