"""Products with 8-bit weights against exact integers, scaled in the order of PlanishMatMul8."""

import numpy as np
import pytest
import torch

from planish.plugins.byte_linear import ByteWeight, byte_linear
from planish.plugins.kernel_library import Order
from planish.plugins.token_ops import quantize_tokens
from tests.kernel_reference import natural_codes, poisoned_tokens


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "channels"), [(8, 64), (272, 200), (1001, 576)])
def test_products_are_those_of_integers(rows: int, channels: int, bits: int, device: torch.device) -> None:
    generator = np.random.default_rng(channels)
    codes = generator.integers(0, 256, (rows, channels), np.uint8)
    codes[0], codes[1] = 0, 255
    scale = generator.uniform(0.01, 1, rows).astype(np.float32)
    weight = ByteWeight.of(codes, scale, device)
    # What torch._int_mm wants on a GPU, and not on a CPU.
    assert not len(weight.centred) % 8
    for count in (1, 5, 40):
        x = torch.randn(count, channels, generator=torch.Generator().manual_seed(count))
        segment = weight.segment(bits, 0.9)
        tokens = quantize_tokens(x.to(device), [segment], out=poisoned_tokens(count, [segment], Order.LANES, device))
        centred = natural_codes(tokens, 0)[:, :channels] - (1 << bits - 1)
        sums = centred @ (torch.from_numpy(codes.astype(np.int64)) - 128).T
        expected = sums.float() * torch.from_numpy(scale) * tokens.scales.cpu()
        assert torch.equal(byte_linear(tokens, weight).cpu(), expected)


def test_tokens_that_do_not_fit(device: torch.device) -> None:
    weight = ByteWeight.of(np.zeros((8, 64), np.uint8), np.ones(8, np.float32), device)
    x = torch.ones(1, 64, device=device)
    with pytest.raises(ValueError, match="tokens of 64 channels, order COLUMNS, and weights of 64"):
        byte_linear(quantize_tokens(x, [weight.segment(8, 1.0)], order=Order.COLUMNS), weight)
    other = ByteWeight.of(np.zeros((8, 128), np.uint8), np.ones(8, np.float32), device)
    with pytest.raises(ValueError, match="tokens of 64 channels, order LANES, and weights of 128"):
        byte_linear(quantize_tokens(x, [weight.segment(8, 1.0)]), other)
