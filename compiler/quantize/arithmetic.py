"""The low-bit arithmetic, defined once in PyTorch; everything else is compared with it.

Weights are symmetric, per output channel or per group of input channels, with the scale of least squared error.
Activations are symmetric per token, cached keys and values asymmetric per token and KV head, both found at run time.
Codes are unsigned throughout; a symmetric code c of b bits stands for c - 2^(b-1).
"""

import dataclasses

import torch
from torch import Tensor

from planish.passes.high_impact import Segment
from planish.passes.scheme import LinearFormat
from planish.plugins.ops.append_kv import SMALLEST_KV_SCALE
from planish.plugins.ops.quantize_activation import SMALLEST_SCALE

__all__ = [
    "QuantizedWeight",
    "channels_of",
    "dequantize_kv",
    "dequantize_weight",
    "fit_scale",
    "integer_matmul",
    "low_bit_linear",
    "low_bit_product",
    "quantize_activation",
    "quantize_kv",
    "quantize_weight",
]

#: Scales tried per weight row, as shares of the one that just spans its largest magnitude.
_SHARES = torch.logspace(0, -0.9, 24, base=10.0)
#: Rounds of "best scale for these codes, best codes for this scale" after the search.
_REFITS = 3
#: Weights searched at a time: the temporaries stay in the processor's cache, which makes it several times faster.
_CHUNK = 1 << 17


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """The codes of one weight matrix, or of the input channels of one that are a segment.

    Attributes:
        codes: uint8 [out, in].
        scale: float32 [groups, out]; representable in float16 where there are several input channels to a group.
        bits: bits of a code.
        group: input channels to a scale; `in` where there is one scale per output channel.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    group: int


def channels_of(x: Tensor, segment: Segment) -> Tensor:
    """Return the channels of `x` [..., in] that are in a segment, in its order."""
    return x if segment.channels is None else x[..., torch.from_numpy(segment.channels)]


def quantize_weight(weight: Tensor, form: LinearFormat) -> QuantizedWeight:
    """Round a weight, float [out, in], to the grid of `form`, each scale minimising the squared error.

    The search tries shares of the absmax scale and then alternates between the least-squares scale of the codes,
    s = <w, q> / <q, q>, and the codes of that scale, keeping the best seen; so the error is never above that of the
    absmax scale.
    """
    rows, k = weight.shape
    group = form.group or k
    padded = torch.nn.functional.pad(weight.float(), (0, -k % group))
    grouped = padded.reshape(-1, group)
    step = max(1, _CHUNK // group)
    parts = [_fit_rows(part, form.weight_bits, form.group is not None) for part in torch.split(grouped, step)]
    codes = torch.cat([part for part, _ in parts]).reshape(rows, -1)[:, :k]
    scale = torch.cat([part for _, part in parts]).reshape(rows, -1).T
    return QuantizedWeight(codes.contiguous(), scale.contiguous(), form.weight_bits, group)


def fit_scale(rows: Tensor, form: LinearFormat) -> Tensor:
    """Return the scale of least squared error of every row, float32 [rows, 1], as `quantize_weight` finds it."""
    step = max(1, _CHUNK // rows.shape[1])
    fitted = [_fit_rows(part, form.weight_bits, form.group is not None)[1] for part in torch.split(rows, step)]
    return torch.cat(fitted)[:, None]


def _fit_rows(rows: Tensor, bits: int, half: bool) -> tuple[Tensor, Tensor]:
    zero = 1 << (bits - 1)
    absmax_scale = rows.abs().amax(1, keepdim=True) / (zero - 1)

    def stored(scale: Tensor) -> Tensor:
        # A row of zeros, or one that float16 cannot scale, gets scale 1 and so codes of zero.
        scale = scale.half().float() if half else scale
        return torch.where((scale > 0) & scale.isfinite(), scale, 1.0)

    def round_to(scale: Tensor) -> tuple[Tensor, Tensor]:
        q = (rows / scale).round_().clamp_(-zero, zero - 1)
        return q, (q * scale).sub_(rows).square_().sum(1, keepdim=True)

    scale = stored(absmax_scale)
    best_scale, (_, best_error) = scale, round_to(scale)
    for trial in range(len(_SHARES) - 1 + _REFITS):
        if trial < len(_SHARES) - 1:
            scale = stored(absmax_scale * _SHARES[trial + 1])
        else:
            # Codes follow from their scale: making them anew costs less than keeping the best through the search.
            best_q, _ = round_to(best_scale)
            scale = stored((rows * best_q).sum(1, keepdim=True) / best_q.square().sum(1, keepdim=True))
        _, error = round_to(scale)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return (round_to(best_scale)[0] + zero).to(torch.uint8), best_scale.squeeze(1)


def dequantize_weight(weight: QuantizedWeight) -> Tensor:
    """Return the float32 [out, in] matrix that the codes stand for."""
    k = weight.codes.shape[1]
    scale = weight.scale.T.repeat_interleave(weight.group, dim=1)[:, :k]
    return (weight.codes.float() - (1 << weight.bits - 1)) * scale


def quantize_activation(x: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the codes, uint8 like `x`, and the scale, float32 [..., 1], of float32 activations [..., K]."""
    zero = 1 << (bits - 1)
    # The factor is a float32 quotient, as it is in the graph.
    factor = torch.tensor(clip, dtype=torch.float32) / (zero - 1)
    scale = (x.abs().amax(-1, keepdim=True) * factor).clamp_min(SMALLEST_SCALE)
    codes = (x / scale).round().clamp(-zero, zero - 1) + zero
    return codes.to(torch.uint8), scale


def integer_matmul(codes: Tensor, weight_codes: Tensor, activation_bits: int, weight_bits: int) -> Tensor:
    """Return sum_k (codes - 2^(a-1)) (weight_codes - 2^(w-1)) exactly, int32 [..., out].

    Floating point multiplies integers exactly as long as every partial sum stays below its mantissa, and is far
    faster in PyTorch than an integer product.
    """
    activation_zero, weight_zero = 1 << (activation_bits - 1), 1 << (weight_bits - 1)
    exact_in_float = weight_codes.shape[1] * activation_zero * weight_zero < 1 << 24
    dtype = torch.float32 if exact_in_float else torch.float64
    left = codes.to(dtype) - activation_zero
    return (left @ (weight_codes.to(dtype) - weight_zero).T).to(torch.int32)


def low_bit_product(codes: Tensor, scale: Tensor, weight: QuantizedWeight, activation_bits: int) -> Tensor:
    """Return the product of activation codes [..., in] and their scale with a quantised weight, float32 [..., out]."""
    y = torch.zeros((), dtype=torch.float32)
    for g, start in enumerate(range(0, codes.shape[-1], weight.group)):
        part = slice(start, start + weight.group)
        products = integer_matmul(codes[..., part], weight.codes[:, part], activation_bits, weight.bits)
        y = y + products.float() * weight.scale[g]
    return y * scale


def low_bit_linear(x: Tensor, weight: QuantizedWeight, form: LinearFormat) -> Tensor:
    """Return the product of float32 `x` [..., in] with a quantised weight, float32 [..., out]."""
    if form.weight_only:
        return x @ dequantize_weight(weight).T
    codes, scale = quantize_activation(x, form.activation_bits, form.clip)
    return low_bit_product(codes, scale, weight, form.activation_bits)


def quantize_kv(x: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the codes, uint8 like `x`, and float16 [..., 2] scale and zero, of keys or values [..., head_dim].

    The grid spans the share `clip` of a head's range, about the middle of it; what lies outside saturates.
    """
    # Both factors are float32 numbers, as they are in the graph; at clip 1 they are 2^bits - 1 and 0.
    ratio = torch.tensor(clip, dtype=torch.float32)
    levels, margin = (2**bits - 1) / ratio, (1 - ratio) / 2
    low = x.amin(-1, keepdim=True)
    span = x.amax(-1, keepdim=True) - low
    step = (span / levels).clamp_min(SMALLEST_KV_SCALE)
    stored = torch.cat([step, low + span * margin], -1).half()
    scale, zero = stored.float().chunk(2, -1)
    return ((x - zero) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8), stored


def dequantize_kv(codes: Tensor, stored: Tensor) -> Tensor:
    """Return the float32 keys or values that `quantize_kv` stored."""
    scale, zero = stored.float().chunk(2, -1)
    return codes.float() * scale + zero
