"""The linears against PyTorch: sums of products equal to exact integers, floats behind them to float32 arithmetic."""

import pytest
import torch

from planish.plugins.kernel_layout import gated_rows
from planish.plugins.kernel_library import SMALL_TOKENS, Order
from planish.plugins.linear_ops import linear, weight_only_linear
from planish.plugins.token_ops import TokenSegment, best_order, quantize_tokens
from tests.kernel_reference import Channels, Poisoned, quantized

FEW = (1, 2, 3, 8, 9, 16)
MANY = (17, 65)
#: Rows and channels.
SHAPES = [(1, 8), (17, 65), (48, 576)]
MORE_SHAPES = [(15, 63), (33, 257), (960, 576), (576, 1536), (4096, 4096), (1000, 11008), (257, 14336)]
#: High-impact channels, 0 for one segment.
HIGH = (0, 64, 512)


def shapes(device: torch.device) -> list[tuple[int, int]]:
    return SHAPES + (MORE_SHAPES if device.type == "cuda" else [])


def orders(count: int, bits: int, device: torch.device) -> list[Order]:
    """Return the orders in which this device multiplies so many tokens of so many bits."""
    if count <= SMALL_TOKENS:
        return [Order.LANES]
    if device.type == "cuda":
        return sorted({Order.LANES, best_order(count, bits, device)})
    return [order for order in Order if order is not Order.NIBBLES or bits <= 4]


def check(device: torch.device, count: int, channels: list[Channels], bits: list[int], gated: bool = False) -> None:
    """Multiply random codes of `bits` bits by weights, in every order and type of output."""
    generator = torch.Generator().manual_seed(count)
    segments = [TokenSegment(each.codes.shape[1], b, each.bits) for each, b in zip(channels, bits, strict=True)]
    codes = [torch.randint(1 << s.bits, (count, s.channels), generator=generator) for s in segments]
    scales = torch.rand(count, len(segments), generator=generator) / 100 + 1e-4
    expected = torch.zeros(count, len(channels[0].codes))
    for i, each in enumerate(channels):
        # The order of PlanishMatMul's multiplications.
        expected += each.products(codes[i], bits[i]) * each.scales * scales[:, i : i + 1]
    weights = [each.on(device) for each in channels]
    if gated:
        gate, up = expected.double().view(count, -1, 2, 8).unbind(2)
        expected = (torch.nn.functional.silu(gate) * up).reshape(count, -1)
    for order in orders(count, max(bits), device):
        tokens = quantized(codes, scales, segments, order, device)
        for dtype in (torch.float32, torch.float16) + ((torch.bfloat16,) if device.type == "cuda" else ()):
            room = Poisoned(tuple(expected.shape), dtype, device)
            found = linear(tokens, weights[-1], *weights[:-1], dtype=dtype, gated=gated, out=room.tensor)
            if gated:
                tolerance = 1e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
                torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=1e-6)
            else:
                assert torch.equal(found.cpu(), expected.to(dtype)), (count, order, dtype)
            room.assert_nothing_written_behind()


@pytest.mark.parametrize("high", HIGH)
@pytest.mark.parametrize("token_bits", [3, 4, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_scheme_and_shape(bits: int, token_bits: int, high: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(bits)
    for rows, width in shapes(device):
        channels = [Channels.random(generator, rows, width, bits)]
        if high:
            channels.insert(0, Channels.random(generator, rows, high, 4))
        for count in (*FEW, *MANY) if device.type == "cuda" or rows < 48 else (2, 16, 65):
            check(device, count, channels, ([max(4, token_bits)] if high else []) + [token_bits])


@pytest.mark.gpu
def test_many_tokens(gpu: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, width in ((4096, 4096), (6144, 4096), (4096, 14336)):
        low, high = Channels.random(generator, rows, width, 3), Channels.random(generator, rows, 512, 4)
        check(gpu, 4096, [low], [3])
        check(gpu, 1000, [high, low], [4, 3])


@pytest.mark.parametrize("high", HIGH[:2])
def test_gate_and_up(high: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    for rows in (16, 320, *([22016] if device.type == "cuda" else [])):
        channels = [Channels.random(generator, rows, 300, 3)]
        if high:
            channels.insert(0, Channels.random(generator, rows, high, 4))
        for count in (1, 2, 7, 16, 70):
            check(device, count, channels, [4, 3][-len(channels) :], gated=True)


def test_order_of_gate_and_up() -> None:
    """Rows are eight of gate, eight of up."""
    assert gated_rows(32).tolist() == [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
    with pytest.raises(ValueError, match="40 rows of gate and up do not come in sixteens"):
        gated_rows(40)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weight_only(bits: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(bits)
    for rows, width in [(1, 8), (17, 72), (48, 576)] + (MORE_SHAPES[3:] if device.type == "cuda" else []):
        if width % 8:
            continue
        channels = Channels.random(generator, rows, width, bits)
        weight = channels.on(device)
        for count in (1, 8, 9, 16, 17, 70):
            x = torch.randn(count, width, generator=generator).half()
            expected = x.double() @ channels.centred().T * channels.scales
            bound = x.double().abs() @ channels.centred().abs().T * channels.scales
            room = Poisoned((count, rows), torch.float32, device)
            found = weight_only_linear(x.to(device), weight, dtype=torch.float32, out=room.tensor)
            assert bool(((found.cpu() - expected).abs() <= 1e-5 * bound + 1e-30).all())
            room.assert_nothing_written_behind()


def test_results_repeat(device: torch.device) -> None:
    """One token gives the same floats alone and among others of the same kernel, and on every run."""
    generator = torch.Generator().manual_seed(5)
    channels = Channels.random(generator, 48, 576, 3)
    weight, x = channels.on(device), torch.randn(8, 576, generator=generator).half().to(device)
    first = weight_only_linear(x, weight)
    assert torch.equal(weight_only_linear(x, weight), first)
    assert torch.equal(weight_only_linear(x[3:6].clone(), weight), first[3:6])


@pytest.mark.gpu
def test_calls_can_be_captured(gpu: torch.device) -> None:
    """A CUDA graph of a prologue and a linear gives the same for other tokens."""
    generator = torch.Generator().manual_seed(6)
    weight = Channels.random(generator, 960, 576, 3).on(gpu)
    segments = [TokenSegment(576, 3, 3)]
    for count in (1, 16, 100):
        order = best_order(count, 3, gpu)
        x = torch.zeros(count, 576, dtype=torch.float16, device=gpu)
        linear(quantize_tokens(x, segments, order=order), weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(quantize_tokens(x, segments, order=order), weight)
        x.copy_(torch.randn(count, 576, generator=generator).half())
        graph.replay()
        assert torch.equal(y, linear(quantize_tokens(x, segments, order=order), weight))
