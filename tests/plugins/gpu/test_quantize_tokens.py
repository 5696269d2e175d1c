"""The quantising kernel against PyTorch: equal where nothing but rounding happens, close to float64 behind the rest."""

import pytest
import torch

from planish.plugins.kernel_library import Order
from planish.plugins.token_ops import QuantizedTokens, TokenSegment, quantize_tokens, spread_workspace
from tests.kernel_reference import Poisoned, natural_codes, poisoned_tokens

WIDTHS = [8, 576, 1536]
# A token of 12288 channels takes as much shared memory as a launch may have without asking.
MORE_WIDTHS = [1, 63, 4096, 11008, 12288, 14336]


def random_tokens(count: int, channels: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))
    x[:, channels // 3] *= 30
    x[count // 2] = 0
    return x.to(dtype)


def widths(device: torch.device) -> list[int]:
    return WIDTHS + (MORE_WIDTHS if device.type == "cuda" else [])


def check_equal(found: QuantizedTokens, segment: int, x: torch.Tensor) -> None:
    """Check codes, scale and sums against the float32 arithmetic of PlanishQuantizeActivation."""
    about = found.segments[segment]
    zero = 1 << about.bits - 1
    factor = torch.tensor(about.clip) / (zero - 1)
    scale = (x.float().abs().amax(1) * factor).clamp(min=1e-10)
    codes = (x.float() / scale[:, None]).round().clamp(-zero, zero - 1).long() + zero
    natural = natural_codes(found, segment)
    assert torch.equal(found.scales[:, segment].cpu(), scale)
    assert torch.equal(natural[:, : about.channels], codes)
    assert bool((natural[:, about.channels :] == zero).all())
    sums = torch.stack([torch.full((len(x),), zero), natural.sum(1)], 1)
    assert torch.equal(found.zero_sums[:, segment].cpu().long(), sums)


def check_close(found: QuantizedTokens, expected: torch.Tensor) -> None:
    """Check codes to be the nearest to float64 values, but for ties that float32 may break."""
    (about,) = found.segments
    zero = 1 << about.bits - 1
    ideal = expected.abs().amax(1, keepdim=True) * about.clip / (zero - 1)
    steps = (expected / ideal.clamp(min=1e-10)).clamp(-zero, zero - 1)
    torch.testing.assert_close(found.scales.cpu().double(), ideal.clamp(min=1e-10), rtol=1e-4, atol=0)
    assert (natural_codes(found, 0)[:, : about.channels] - zero - steps).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_are_those_of_the_op(bits: int, dtype: torch.dtype, order: Order, device: torch.device) -> None:
    if (order is Order.NIBBLES and bits > 4) or (dtype is torch.bfloat16 and device.type == "cpu"):
        return
    for channels in widths(device):
        for count in (1, 5, 40):
            x = random_tokens(count, channels, dtype, seed=channels)
            segments = [TokenSegment(channels, bits, 3, clip=0.75)]
            room = poisoned_tokens(count, segments, order, device)
            found = quantize_tokens(x.to(device), segments, order=order, out=room)
            assert found is room
            check_equal(found, 0, x)


def test_two_segments_and_a_permutation(device: torch.device) -> None:
    for channels in widths(device)[1:]:
        if channels <= 64:
            continue
        x = random_tokens(6, channels, torch.float32, seed=channels)
        permutation = torch.randperm(channels, generator=torch.Generator().manual_seed(1)).int()
        segments = [TokenSegment(64, 4, 4), TokenSegment(channels - 64, 3, 3, clip=0.8)]
        found = quantize_tokens(x.to(device), segments, permutation=permutation.to(device))
        moved = x[:, permutation.long()]
        check_equal(found, 0, moved[:, :64])
        check_equal(found, 1, moved[:, 64:])


@pytest.mark.parametrize("form", ["right", "rows", "left", "right left", "rows left"])
def test_transforms(form: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(24, 24), (9, 64), (2, 288), (1, 576)]
    shapes += [(64, 64), (128, 32), (86, 128), (112, 128)] if device.type == "cuda" else []
    for m, k in shapes:
        right = torch.randn((m, k, k) if "rows" in form else (k, k), generator=generator) / k**0.5
        left = torch.randn(m, m, generator=generator) / m**0.5 if "left" in form else None
        factor = None if form == "left" else right
        for count in (1, 33):
            x = random_tokens(count, m * k, torch.float32, seed=m)
            wide = x.double().view(count, m, k)
            if factor is not None:
                wide = torch.einsum("tmk,mkj->tmj", wide, right.double().expand(m, k, k))
            if left is not None:
                wide = torch.einsum("lm,tlk->tmk", left.double(), wide)
            segments = [TokenSegment(m * k, 4, 3)]
            found = quantize_tokens(
                x.to(device),
                segments,
                right=None if factor is None else factor.to(device),
                left=None if left is None else left.to(device),
                out=poisoned_tokens(count, segments, Order.LANES, device),
            )
            check_close(found, wide.reshape(count, -1))


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_map_spread_over_the_gpu(dtype: torch.dtype, mixed: bool, device: torch.device) -> None:
    """In a launch of its own, with the residual and the norm in front; what does not spread leaves the workspace."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(9, 64), (24, 24), (2, 288), (7, 48)]
    shapes += [(64, 64), (448, 32), (172, 64), (112, 128)] if device.type == "cuda" else []
    for m, k in shapes:
        right, left = torch.randn(m, k, k, generator=generator) / k**0.5, torch.randn(m, m, generator=generator)
        gain = torch.rand(m * k, generator=generator) + 0.5
        for count in (1, 5, 32, 33):
            x, residual = (random_tokens(count, m * k, dtype, seed) for seed in (m, k))
            total, room = (Poisoned((count, m * k), each, device) for each in (dtype, torch.float32))
            assert (spread_workspace(x, right) is None) == (count > 32)
            segments = [TokenSegment(m * k, 8, 3)]
            found = quantize_tokens(
                x.to(device), segments, residual=residual.to(device), sum_out=total.tensor, gain=gain.to(device),
                epsilon=1e-5, right=right.to(device), left=left.to(device) if mixed else None,
                out=poisoned_tokens(count, segments, Order.LANES, device), workspace=room.tensor,
            )  # fmt: skip
            added = x + residual
            assert torch.equal(total.tensor.cpu(), added)
            wide = added.double()
            normal = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * gain
            lines = torch.einsum("tmk,mkj->tmj", normal.view(count, m, k), right.double())
            expected = torch.einsum("lm,tlk->tmk", left.double(), lines) if mixed else lines
            check_close(found, expected.reshape(count, -1))
            room.assert_nothing_written_behind()
            if count > 32:
                assert room.tensor.isnan().all()
            else:
                spread = room.tensor.cpu().double()
                assert (spread - lines.reshape(count, -1)).abs().max() <= 1e-4 * lines.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_residual_and_norm(dtype: torch.dtype, device: torch.device) -> None:
    if dtype is torch.bfloat16 and device.type == "cpu":
        return
    for channels in widths(device)[1:]:
        x, residual = (random_tokens(7, channels, dtype, seed) for seed in (1, 2))
        gain = torch.rand(channels, generator=torch.Generator().manual_seed(3)) + 0.5
        total = Poisoned((7, channels), dtype, device)
        found = quantize_tokens(
            x.to(device), [TokenSegment(channels, 8, 3)], residual=residual.to(device), sum_out=total.tensor,
            gain=gain.to(device), epsilon=1e-5,
        )  # fmt: skip
        added = x + residual
        assert torch.equal(total.tensor.cpu(), added)
        total.assert_nothing_written_behind()
        wide = added.double()
        check_close(found, wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * gain)
