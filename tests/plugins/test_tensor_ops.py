"""What the PyTorch wrapper refuses, in words, before it calls or even loads the kernels."""

from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch

from planish.plugins import on_tensors
from planish.plugins.kernel_layout import pack_for_kernel
from planish.plugins.kernel_library import Order
from planish.plugins.linear_ops import DeviceWeight, linear, weight_only_linear
from planish.plugins.packing import pack
from planish.plugins.token_ops import QuantizedTokens, TokenSegment, quantize_tokens

SEGMENTS = [TokenSegment(96, 3, 3)]


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors of the host pass, as those of a GPU would."""
    monkeypatch.setattr(on_tensors, "DEVICE", "cpu")


def weight(rows: int = 32, channels: int = 96, bits: int = 3) -> DeviceWeight:
    codes = np.zeros((rows, channels), np.uint8)
    packed = pack_for_kernel(pack(codes, bits), channels, bits)
    return DeviceWeight.of(packed, np.ones(rows, np.float32), "cpu")


def tokens(count: int = 2, segments: list[TokenSegment] = SEGMENTS) -> QuantizedTokens:
    return QuantizedTokens.empty(count, segments, Order.LANES, "cpu")


def refused(message: str) -> AbstractContextManager[object]:
    return pytest.raises(ValueError, match=message)


def test_tensors_of_the_host() -> None:
    with refused("x is on cpu; kernels take tensors on cuda"):
        quantize_tokens(torch.zeros(2, 96), SEGMENTS)
    with refused("codes is on cpu; kernels take tensors on cuda"):
        linear(tokens(), weight())
    with refused("x is on cpu; kernels take tensors on cuda"):
        weight_only_linear(torch.zeros(2, 96, dtype=torch.float16), weight())


@pytest.mark.usefixtures("on_the_host")
def test_tensors_of_two_devices() -> None:
    with refused("gain is on meta; kernels take tensors on cpu"):
        quantize_tokens(torch.zeros(2, 96), SEGMENTS, gain=torch.zeros(96, device="meta"))


def test_types_and_shapes_of_tokens() -> None:
    x = torch.zeros(2, 96)
    with refused(r"x is torch\.int64, and must be torch\.float32 or torch\.float16 or torch\.bfloat16"):
        quantize_tokens(x.long(), SEGMENTS)
    with refused(r"x is \[2, 3, 32\], and must be \[tokens, channels\]"):
        quantize_tokens(x.view(2, 3, 32), SEGMENTS)
    with refused(r"x is \[0, 96\], and must be \[tokens, channels\]"):
        quantize_tokens(x[:0], SEGMENTS)
    with refused(r"x is not contiguous: call \.contiguous\(\)"):
        quantize_tokens(torch.zeros(96, 2).T, SEGMENTS)
    with refused(r"one or two segments have all 96 channels, not \[64\]"):
        quantize_tokens(x, [TokenSegment(64, 3, 3)])
    with refused(r"residual is torch\.float16, and must be torch\.float32"):
        quantize_tokens(x, SEGMENTS, residual=x.half())
    with refused("sum_out is given, and no residual to add"):
        quantize_tokens(x, SEGMENTS, sum_out=x.clone())
    with refused(r"gain is \[95\], and must be \[96\]"):
        quantize_tokens(x, SEGMENTS, gain=torch.zeros(95))
    with refused(r"permutation is torch\.int64, and must be torch\.int32"):
        quantize_tokens(x, SEGMENTS, permutation=torch.arange(96))
    with refused(r"workspace is \[2, 95\], and must be \[2, 96\]"):
        quantize_tokens(x, SEGMENTS, workspace=torch.zeros(2, 95))
    with refused("8-bit weights have no kernel layout"):
        quantize_tokens(x, [TokenSegment(96, 3, 8)])
    with refused("out is made for 3 tokens of"):
        quantize_tokens(x, SEGMENTS, out=tokens(3))
    with refused("order LANES; this call has 2 of .*, order NIBBLES"):
        quantize_tokens(x, SEGMENTS, order=Order.NIBBLES, out=tokens())


def test_factors() -> None:
    x = torch.zeros(2, 96)
    with refused("96 channels cannot be read as rows of 36"):
        quantize_tokens(x, SEGMENTS, right=torch.zeros(36, 36))
    with refused(r"right is \[3, 24, 24\], and must be \[4, 24, 24\]"):
        quantize_tokens(x, SEGMENTS, right=torch.zeros(3, 24, 24))
    with refused(r"left is \[6, 6\], and must be \[4, 4\]"):
        quantize_tokens(x, SEGMENTS, right=torch.zeros(24, 24), left=torch.zeros(6, 6))
    with refused(r"left is torch\.float64, and must be torch\.float32"):
        quantize_tokens(x, SEGMENTS, left=torch.zeros(4, 4).double())


@pytest.mark.usefixtures("on_the_host")
def test_alignment() -> None:
    with refused("x begins 4 bytes behind a multiple of 16: clone it"):
        quantize_tokens(torch.zeros(193)[1:].view(2, 96), SEGMENTS)
    room = torch.zeros(65, dtype=torch.float16)[1:].view(2, 32)
    with refused("out begins 2 bytes behind a multiple of 16"):
        linear(tokens(), weight(), out=room)


def test_linears() -> None:
    with refused(r"tokens have segments of \[\(96, 3\)\] channels and weight bits, and the weights \[\(96, 4\)\]"):
        linear(tokens(), weight(bits=4))
    with refused(r"the weights \[\(64, 4\), \(96, 3\)\]"):
        linear(tokens(), weight(), weight(channels=64, bits=4))
    two = tokens(segments=[TokenSegment(64, 4, 3), *SEGMENTS])
    with refused("high-impact weights are 32 rows of 3 bits; beside 32 rows they must be as many, of 4 bits"):
        linear(two, weight(), weight(channels=64))
    with refused(r"a result of torch\.float64 has no kernel"):
        linear(tokens(), weight(), dtype=torch.float64)
    with refused("40 rows of gate and up: they come in sixteens"):
        linear(tokens(), weight(rows=40), gated=True)
    with refused(r"out is \[2, 32\], and must be \[2, 16\]"):
        linear(tokens(), weight(), gated=True, out=torch.zeros(2, 32, dtype=torch.float16))


def test_weight_only() -> None:
    with refused(r"x is torch\.bfloat16, and must be torch\.float16"):
        weight_only_linear(torch.zeros(2, 96, dtype=torch.bfloat16), weight())
    with refused(r"x is \[2, 95\], and must be \[tokens, 96\]"):
        weight_only_linear(torch.zeros(2, 95, dtype=torch.float16), weight())
    with refused("100 channels: a multiple of 8 has a kernel"):
        weight_only_linear(torch.zeros(2, 100, dtype=torch.float16), weight(channels=100))


def test_scales_of_a_weight() -> None:
    packed = pack_for_kernel(pack(np.zeros((32, 96), np.uint8), 3), 96, 3)
    with refused(r"scales are float32 \[1, 32\], and must be float32 \[32\]"):
        DeviceWeight.of(packed, np.ones((1, 32), np.float32), "cpu")
