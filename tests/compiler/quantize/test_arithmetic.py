"""The arithmetic against definitions, brute force and values worked out by hand.

That the graph computes the same is tested with the ops, in tests/plugins/ops.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from planish.compiler.quantize import arithmetic
from planish.compiler.quantize.arithmetic import (
    dequantize_kv,
    dequantize_weight,
    low_bit_linear,
    quantize_activation,
    quantize_kv,
    quantize_weight,
)
from planish.passes.scheme import LinearFormat

BITS = [2, 3, 4, 8]
#: Widths that no group divides are the normal case.
FORMS = [None, 16, 128]


def weights(kind: str, rows: int = 24, k: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    w = 0.02 * torch.randn(rows, k, generator=generator)
    if kind == "heavy_tails":
        w = w / (0.05 + torch.rand(rows, k, generator=generator))
    elif kind == "outlier":
        w[:, 7] = 1.0
    elif kind == "uniform":
        w = torch.rand(rows, k, generator=generator) - 0.5
    elif kind == "tiny":
        w = w * 1e-5
    elif kind == "huge":
        w = w * 1e5
    elif kind == "zero_rows":
        w[3] = 0
        w[5, :128] = 0
    return w


KINDS = ["normal", "heavy_tails", "outlier", "uniform", "tiny", "huge", "zero_rows"]


def absmax_error(w: Tensor, form: LinearFormat) -> Tensor:
    """Return the squared error of every row when each scale just spans the largest magnitude."""
    group = form.group or w.shape[1]
    highest = (1 << form.weight_bits - 1) - 1
    error = torch.zeros(len(w))
    for part in w.split(group, 1):
        scale = part.abs().amax(1, keepdim=True) / highest
        if form.group:
            scale = scale.half().float()
        scale[scale == 0] = 1
        q = (part / scale).round().clamp(-highest - 1, highest)
        error += (q * scale - part).square().sum(1)
    return error


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_never_worse_than_the_absmax_scale(bits: int, group: int | None, kind: str) -> None:
    w, form = weights(kind), LinearFormat(bits, 8, group)
    quantized = quantize_weight(w, form)
    error = (dequantize_weight(quantized) - w).square().sum(1)
    assert (error <= absmax_error(w, form) * (1 + 1e-5)).all()
    if bits <= 4 and kind == "heavy_tails" and group != 16:
        # The search is there for these: it must gain, not only tie. Sixteen channels rarely hold a tail.
        assert error.sum() < 0.8 * absmax_error(w, form).sum()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["normal", "heavy_tails", "uniform", "outlier"])
def test_close_to_the_best_scale_there_is(bits: int, kind: str) -> None:
    """Against 4000 scales per row; the codes of a scale are the nearest ones, so nothing else is free."""
    w = weights(kind, rows=12, k=64)
    highest = (1 << bits - 1) - 1
    scales = w.abs().amax(1, keepdim=True) / highest * torch.linspace(0.08, 1.02, 4000)
    grid = scales[:, :, None]
    q = (w[:, None] / grid).round().clamp(-highest - 1, highest)
    best = (q * grid - w[:, None]).square().sum(2).amin(1)
    error = (dequantize_weight(quantize_weight(w, LinearFormat(bits, 8))) - w).square().sum(1)
    # With so few channels the error jumps about from scale to scale, at 8 bits most of all.
    assert (error / best).max() < (1.5 if bits == 8 else 1.2)
    assert error.sum() < (1.2 if bits == 8 else 1.04) * best.sum()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", FORMS)
def test_shapes_and_stored_types(bits: int, group: int | None) -> None:
    w = weights("normal")
    quantized = quantize_weight(w, LinearFormat(bits, 8, group))
    assert quantized.codes.dtype == torch.uint8
    assert quantized.codes.shape == w.shape
    assert int(quantized.codes.max()) < 1 << bits
    assert quantized.scale.shape == (1 if group is None else -(-200 // group), 24)
    assert quantized.group == (group or 200)
    assert (quantized.scale > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [16, 128])
def test_group_scales_are_float16(kind: str, group: int) -> None:
    scale = quantize_weight(weights(kind), LinearFormat(4, 8, group)).scale
    assert torch.equal(scale, scale.half().float())
    assert scale.isfinite().all()


@pytest.mark.parametrize("group", [None, 16])
def test_rows_of_zeros(group: int | None) -> None:
    quantized = quantize_weight(torch.zeros(3, 40), LinearFormat(3, 8, group))
    assert (quantized.codes == 4).all()
    assert (quantized.scale == 1).all()
    assert not dequantize_weight(quantized).any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, 16])
def test_weights_on_a_grid_are_exact(bits: int, group: int | None) -> None:
    """Golden codes: whole multiples of a scale, with both ends used, come back as they were."""
    highest = (1 << bits - 1) - 1
    q = torch.randint(-highest, highest + 1, (5, 48), generator=torch.Generator().manual_seed(1))
    q[:, ::16] = highest
    quantized = quantize_weight(q * 0.25, LinearFormat(bits, 8, group))
    assert torch.equal(quantized.codes.long(), q + (1 << bits - 1))
    assert (quantized.scale == 0.25).all()


def test_codes_by_hand() -> None:
    """Four bits, scale 1: halves go to the even neighbour; the lowest code is reached only from beyond -7.5."""
    w = torch.tensor([[7.0, -7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.0]])
    q = (w / 1.0).round().clamp(-8, 7)
    assert q.tolist() == [[7, -7, 0, 2, 2, 0, -2, 0]]
    quantized = arithmetic.QuantizedWeight((q + 8).to(torch.uint8), torch.tensor([[2.0], [0.5]]), 4, 5)
    assert dequantize_weight(quantized).tolist() == [[14, -14, 0, 4, 4, 0, -1, 0]]


def test_the_lowest_code_is_used() -> None:
    """-8 .. 7 is lopsided: a row whose largest magnitude is negative may take scale 1 where absmax takes 8 / 7."""
    w = torch.tensor([[-8.0, 7.0, 3.0, -2.0, 5.0, 1.0, -6.0, 4.0]])
    quantized = quantize_weight(w, LinearFormat(4, 8))
    assert torch.equal(dequantize_weight(quantized), w)
    assert quantized.codes[0, 0] == 0


def test_a_last_group_of_its_own() -> None:
    """576 by 128 leaves 64 channels; their scale comes from them alone."""
    w = weights("normal", 8, 576)
    w[:, 512:] *= 100
    whole = quantize_weight(w, LinearFormat(4, 16, 128))
    last = quantize_weight(w[:, 512:], LinearFormat(4, 16, 128))
    assert whole.scale.shape == (5, 8)
    assert torch.equal(whole.scale[4:], last.scale)
    assert torch.equal(whole.codes[:, 512:], last.codes)
    assert (dequantize_weight(whole) - w).norm() < 0.15 * w.norm()


def test_slices_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large matrix is searched in slices of rows."""
    w, form = weights("heavy_tails"), LinearFormat(3, 8, 16)
    whole = quantize_weight(w, form)
    monkeypatch.setattr(arithmetic, "_CHUNK", 100)
    sliced = quantize_weight(w, form)
    assert torch.equal(whole.codes, sliced.codes)
    assert torch.equal(whole.scale, sliced.scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    w, form = weights("normal").to(dtype), LinearFormat(4, 8)
    assert torch.equal(quantize_weight(w, form).codes, quantize_weight(w.float(), form).codes)


# Products


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("activation_bits", [2, 4, 8, 16])
@pytest.mark.parametrize("group", FORMS)
def test_product_equals_dequantized_float64(bits: int, activation_bits: int, group: int | None) -> None:
    form = LinearFormat(bits, activation_bits, group)
    x = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(2))
    weight = quantize_weight(weights("normal"), form)
    seen = x
    if activation_bits < 16:
        codes, scale = quantize_activation(x, activation_bits)
        seen = (codes.double() - (1 << activation_bits - 1)) * scale.double()
    expected = seen.double() @ dequantize_weight(weight).double().T
    y = low_bit_linear(x, weight, form)
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), expected.numpy(), rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", range(2, 9))
def test_activation_error_is_at_most_half_a_step(bits: int) -> None:
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(3))
    codes, scale = quantize_activation(x, bits)
    error = ((codes.float() - (1 << bits - 1)) * scale - x).abs()
    assert (error <= 0.5001 * scale).all()
    # The largest magnitude is met exactly, up to rounding.
    at = x.abs().argmax(1, keepdim=True)
    assert (error.gather(1, at) <= 1e-6 * x.abs().amax(1, keepdim=True)).all()


def test_clip_narrows_the_grid() -> None:
    x = torch.randn(256, 576, generator=torch.Generator().manual_seed(4))

    def error(clip: float) -> float:
        codes, scale = quantize_activation(x, 3, clip)
        return float(((codes.float() - 4) * scale - x).square().mean())

    assert error(0.65) < 0.7 * error(1.0)


# Keys and values


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", [1.0, 0.8, 0.5])
@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_kv_grid_is_centred_in_the_range(bits: int, clip: float, offset: float) -> None:
    """Against the definition in float64: the middle stays, half the range is multiplied with the clip."""
    x = torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(6)) + offset
    codes, stored = quantize_kv(x, bits, clip)
    exact = x.double().numpy()
    low, high = exact.min(-1, keepdims=True), exact.max(-1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2 * clip
    step, zero = 2 * half / (2**bits - 1), middle - half
    assert codes.dtype == torch.uint8
    assert stored.dtype == torch.float16
    np.testing.assert_allclose(stored[..., :1].numpy(), step, rtol=2**-11 + 1e-5)
    np.testing.assert_allclose(stored[..., 1:].numpy(), zero, rtol=2**-11, atol=1e-5)
    # The codes are those of the stored grid, by the same definition: what lies outside saturates.
    their_step, their_zero = (part.double().numpy() for part in stored.split(1, -1))
    steps = (exact - their_zero) / their_step
    assert (np.abs(np.clip(steps, 0, 2**bits - 1) - codes.numpy()) <= 0.5 + 1e-4).all()
    if not offset:  # where the float16 zero is off by little
        saturates = ((steps < -0.5) | (steps > 2**bits - 0.5)).any()
        assert saturates == (clip * 2**bits < 2**bits - 1)


def test_kv_clip_lowers_the_error_of_gaussians() -> None:
    """Two bits over min .. max of 64 Gaussian channels are far from the best uniform grid of four levels."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(7))

    def error(clip: float) -> float:
        return float((dequantize_kv(*quantize_kv(x, 2, clip)) - x).square().mean())

    assert error(0.65) < 0.6 * error(1.0)
    # Max (1960), "Quantizing for minimum distortion", table II: the best uniform grid of four levels leaves 0.1188. One
    # that follows each row's own range does a little better.
    assert error(0.65) == pytest.approx(0.1188, rel=0.05)
