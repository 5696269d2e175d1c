"""The CUDA kernels on PyTorch tensors: `quantize_tokens`, `linear`, `weight_only_linear`.

Work goes to the current stream of the tensors' GPU. Nothing is allocated but what is returned, and not even that where
`out` is given; nothing is synchronised; so calls can be captured into a CUDA graph. The library that `make plugins`
compiles is loaded on the first call; arguments are checked before it, and refused in words.
"""

import ctypes
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from planish.plugins.kernel_layout import KernelWeight, padded_channels
from planish.plugins.kernel_library import (
    SMALL_TOKENS,
    SPREAD_TOKENS,
    CodeSegment,
    LinearTask,
    Order,
    QuantizeTask,
    WeightOnlyTask,
    WeightSegment,
    call,
    kernel_library,
)
from planish.plugins.on_tensors import TYPES, address, launch, on_device_of

__all__ = [
    "DeviceWeight",
    "QuantizedTokens",
    "TokenSegment",
    "best_order",
    "linear",
    "quantize_tokens",
    "spread_workspace",
    "weight_only_linear",
]

#: Where tensors must be.
_DEVICE = "cuda"
_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class TokenSegment:
    """A run of channels, in stored order, that share a scale.

    Attributes:
        channels: how many.
        bits: of a code, 2 .. 8.
        weight_bits: of the weights that multiply them, 2 .. 4, which decide the padding.
        clip: share of the largest magnitude that the grid spans, 0 < clip <= 1.
    """

    channels: int
    bits: int
    weight_bits: int
    clip: float = 1.0

    @property
    def padded(self) -> int:
        """Channels with padding."""
        return padded_channels(self.channels, self.weight_bits)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTokens:
    """What `quantize_tokens` gives and `linear` takes.

    Attributes:
        codes: uint8 [tokens, bytes], in `order`, the segments one behind the other.
        scales: float32 [tokens, segments].
        zero_sums: int32 [tokens, segments, 2], zero point and sum of the codes with padding.
        segments: one, or the high-impact channels and the others.
        order: of the codes.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_sums: torch.Tensor
    segments: tuple[TokenSegment, ...]
    order: Order

    @classmethod
    def empty(
        cls, tokens: int, segments: Sequence[TokenSegment], order: Order, device: torch.device | str
    ) -> "QuantizedTokens":
        """Return room for `tokens` tokens, not initialised."""
        stored = sum(segment.padded for segment in segments) // (2 if order is Order.NIBBLES else 1)
        count = len(segments)
        return cls(
            torch.empty(tokens, stored, dtype=torch.uint8, device=device),
            torch.empty(tokens, count, dtype=torch.float32, device=device),
            torch.empty(tokens, count, 2, dtype=torch.int32, device=device),
            tuple(segments),
            order,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceWeight:
    """A `KernelWeight` and its scales on a GPU.

    Attributes:
        words: int32 [row tiles, words], the bits of the uint32 words.
        row_sums: int32 [row tiles * 16].
        scales: float32 [rows].
        channels: input channels.
        bits: of a code.
    """

    words: torch.Tensor
    row_sums: torch.Tensor
    scales: torch.Tensor
    channels: int
    bits: int

    @classmethod
    def of(
        cls, weight: KernelWeight, scale: npt.NDArray[np.float32], device: torch.device | str = _DEVICE
    ) -> "DeviceWeight":
        """Copy a weight and its scales, float32 [rows], to a GPU.

        Raises:
            ValueError: if there is not one scale to a row.
        """
        if scale.shape != (weight.rows,) or scale.dtype != np.float32:
            raise ValueError(f"scales are {scale.dtype} {list(scale.shape)}, and must be float32 [{weight.rows}]")
        words, row_sums, scales = (
            torch.from_numpy(np.array(each)).to(device)
            for each in (weight.words.view(np.int32), weight.row_sums, scale)
        )
        return cls(words, row_sums, scales, weight.channels, weight.bits)

    @property
    def rows(self) -> int:
        """Output channels."""
        return len(self.scales)


def best_order(tokens: int, bits: int, device: torch.device | str = _DEVICE) -> Order:
    """Return the order in which products of `tokens` tokens, of codes up to `bits` bits, are fastest on a GPU.

    Raises:
        KernelError: if the GPU cannot be asked.
        NativeBuildError: if the kernels are not compiled.
    """
    order = ctypes.c_int32()
    with on_device_of(torch.device(device)):
        call(kernel_library(), "planish_best_order", tokens, bits, ctypes.byref(order))
    return Order(order.value)


def spread_workspace(x: torch.Tensor, right: torch.Tensor | None) -> torch.Tensor | None:
    """Return the workspace in which `quantize_tokens` spreads the map of few tokens, or None where it would not.

    Args:
        x: the tokens, [tokens, channels].
        right: as `quantize_tokens` takes it.
    """
    spreads = right is not None and right.dim() == 3 and len(right) > 1 and len(x) <= SPREAD_TOKENS
    return torch.empty(x.shape, dtype=torch.float32, device=x.device) if spreads else None


def quantize_tokens(
    x: torch.Tensor,
    segments: Sequence[TokenSegment],
    *,
    residual: torch.Tensor | None = None,
    sum_out: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    epsilon: float = 0.0,
    right: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    permutation: torch.Tensor | None = None,
    order: Order = Order.LANES,
    out: QuantizedTokens | None = None,
    workspace: torch.Tensor | None = None,
) -> QuantizedTokens:
    """Add a residual, normalise, transform, and quantise tokens; see `cuda/quantize_row.cuh` for the formulas.

    Args:
        x: float32, float16 or bfloat16 [tokens, channels].
        segments: one or two, of all channels together.
        residual: added to x, like x; None is none.
        sum_out: takes x + residual, like x; None where it is not wanted.
        gain: float32 [channels] of the RMSNorm; None is no norm.
        epsilon: of the RMSNorm.
        right: float32 [k, k], or [m, k, k] with one matrix for each row of the token; None is none.
        left: float32 [m, m]; None is none.
        permutation: int32 [channels], stored channel i is channel permutation[i]; None leaves them in order.
        order: of the codes, what the linear behind takes; see `best_order`.
        out: where the result goes; None makes it.
        workspace: float32 like x, of `spread_workspace`: spreads a block-diagonal map of a few tokens over the GPU,
            in a launch of its own; None is one launch.

    Raises:
        ValueError: if an argument has the wrong type, shape, device or alignment; the message says which.
        KernelError: if the launch failed.
        NativeBuildError: if the kernels are not compiled.
    """
    _check("x", x, tuple(TYPES), ("tokens", "channels"))
    tokens, channels = x.shape
    if sum(segment.channels for segment in segments) != channels or len(segments) not in (1, 2):
        raise ValueError(
            f"one or two segments have all {channels} channels, not {[segment.channels for segment in segments]}"
        )
    for name, tensor in (("residual", residual), ("sum_out", sum_out)):
        _check(name, tensor, (x.dtype,), (tokens, channels))
    if sum_out is not None and residual is None:
        raise ValueError("sum_out is given, and no residual to add")
    _check("gain", gain, (torch.float32,), (channels,))
    _check("permutation", permutation, (torch.int32,), (channels,))
    _check("workspace", workspace, (torch.float32,), (tokens, channels))
    m, k = _factors(channels, right, left)
    if out is None:
        out = QuantizedTokens.empty(tokens, segments, order, x.device)
    elif (out.segments, out.order, len(out.codes)) != (tuple(segments), order, tokens):
        raise ValueError(
            f"out is made for {len(out.codes)} tokens of {out.segments}, order {out.order.name}; this call has "
            f"{tokens} of {tuple(segments)}, order {order.name}"
        )
    tensors = {"x": x, "residual": residual, "sum_out": sum_out, "gain": gain, "right": right, "left": left,
               "permutation": permutation, "out.codes": out.codes, "workspace": workspace}  # fmt: skip
    _same_device(tensors)
    task = QuantizeTask(
        x=address(x), residual=address(residual), sum=address(sum_out), gain=address(gain), epsilon=epsilon,
        right=address(right), left=address(left),
        right_count=0 if right is None else m if right.dim() == 3 else 1, m=m, k=k, permutation=address(permutation),
        segments=(CodeSegment * 2)(*(CodeSegment(s.channels, s.padded, s.bits, s.clip) for s in segments)),
        segment_count=len(segments), type=TYPES[x.dtype], order=order, channels=channels, tokens=tokens,
        codes=address(out.codes), stride=out.codes.shape[1], scales=address(out.scales),
        zero_sums=address(out.zero_sums), workspace=address(workspace),
    )  # fmt: skip
    launch(kernel_library(), "planish_quantize_tokens", task, x.device)
    return out


def linear(
    tokens: QuantizedTokens,
    low: DeviceWeight,
    high: DeviceWeight | None = None,
    *,
    dtype: torch.dtype = torch.float16,
    gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return codes of tokens times weights, [tokens, rows], or silu(gate) * up, [tokens, rows / 2], where it is gated.

    Args:
        tokens: their codes; in the order `LANES` where there are no more than `SMALL_TOKENS`.
        low: the weights of the last segment.
        high: those of the first where there are two, of 4 bits.
        dtype: of the result, float32, float16 or bfloat16; sums of products are int32 and scaled in float32.
        gated: whether rows are gate and up as `kernel_layout.gated_rows` mixes them.
        out: where the result goes; None makes it.

    Raises:
        ValueError: if an argument does not fit; the message says which.
        KernelError: if the launch failed.
        NativeBuildError: if the kernels are not compiled.
    """
    weights = [low] if high is None else [high, low]
    found = [(segment.channels, segment.weight_bits) for segment in tokens.segments]
    wanted = [(weight.channels, weight.bits) for weight in weights]
    if found != wanted:
        raise ValueError(f"tokens have segments of {found} channels and weight bits, and the weights {wanted}")
    if high is not None and (high.bits != 4 or high.rows != low.rows):
        raise ValueError(
            f"high-impact weights are {high.rows} rows of {high.bits} bits; beside {low.rows} rows they must be as "
            "many, of 4 bits"
        )
    count = len(tokens.codes)
    out = _output(out, count, low.rows, gated, dtype, tokens.codes.device)
    tensors = {"codes": tokens.codes, "scales of tokens": tokens.scales, "out": out}
    for weight in weights:
        tensors |= {f"{weight.bits}-bit weights": weight.words, f"their scales ({weight.bits} bits)": weight.scales}
    _same_device(tensors)
    task = LinearTask(
        low=_segment(low), high=_segment(high), low_bits=low.bits, type=TYPES[dtype], order=tokens.order, gated=gated,
        rows=low.rows, tokens=count, codes=address(tokens.codes), stride=tokens.codes.shape[1],
        token_scales=address(tokens.scales), token_zero_sums=address(tokens.zero_sums), y=address(out),
    )  # fmt: skip
    small = count <= SMALL_TOKENS and tokens.order is Order.LANES
    launch(kernel_library(), "planish_small_linear" if small else "planish_large_linear", task, out.device)
    return out


def weight_only_linear(
    x: torch.Tensor,
    weight: DeviceWeight,
    *,
    dtype: torch.dtype = torch.float16,
    gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x, float16 [tokens, channels], times weights; `dtype`, `gated`, `out` and errors as in `linear`.

    The channels are a multiple of 8.
    """
    _check("x", x, (torch.float16,), ("tokens", weight.channels))
    if weight.channels % 8:
        raise ValueError(f"{weight.channels} channels: a multiple of 8 has a kernel")
    out = _output(out, len(x), weight.rows, gated, dtype, x.device)
    _same_device({"x": x, "weights": weight.words, "their scales": weight.scales, "out": out})
    task = WeightOnlyTask(
        words=address(weight.words), scales=address(weight.scales), bits=weight.bits, type=TYPES[dtype], gated=gated,
        channels=weight.channels, rows=weight.rows, tokens=len(x), x=address(x), stride=x.shape[1], y=address(out),
    )  # fmt: skip
    launch(kernel_library(), "planish_weight_only_linear", task, x.device)
    return out


def _factors(channels: int, right: torch.Tensor | None, left: torch.Tensor | None) -> tuple[int, int]:
    """Return the rows and columns that a token is read as."""
    if right is None and left is None:
        return 1, channels
    k = right.shape[-1] if right is not None else channels // max(1, len(left) if left is not None else 1)
    m = channels // max(1, k)
    if m * k != channels:
        raise ValueError(f"{channels} channels cannot be read as rows of {k}, the width of the right factor")
    if right is not None:
        _check("right", right, (torch.float32,), (m, k, k) if right.dim() == 3 else (k, k))
    _check("left", left, (torch.float32,), (m, m))
    return m, k


def _output(
    out: torch.Tensor | None, tokens: int, rows: int, gated: bool, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if dtype not in TYPES:
        raise ValueError(f"a result of {dtype} has no kernel; float32, float16 and bfloat16 have")
    if gated and rows % 16:
        raise ValueError(f"{rows} rows of gate and up: they come in sixteens")
    shape = (tokens, rows // 2 if gated else rows)
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    _check("out", out, (dtype,), shape)
    return out


def _check(name: str, tensor: torch.Tensor | None, dtypes: Sequence[torch.dtype], shape: Sequence[int | str]) -> None:
    """Check a tensor, if there is one; a name in `shape` stands for any size from 1 on."""
    if tensor is None:
        return
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, and must be {' or '.join(map(str, dtypes))}")
    fits = tensor.dim() == len(shape) and all(
        size == wanted or (isinstance(wanted, str) and size > 0)
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} is {list(tensor.shape)}, and must be [{', '.join(map(str, shape))}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: call .contiguous()")


def _same_device(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Check that all tensors are on one GPU and begin where a 128-bit load can."""
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, device = next((name, tensor.device) for name, tensor in there.items())
    for name, tensor in there.items():
        if tensor.device.type != _DEVICE:
            raise ValueError(f"{name} is on {tensor.device}; kernels take tensors on {_DEVICE}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, and {first} on {device}")
        if tensor.data_ptr() % _ALIGNMENT:
            raise ValueError(
                f"{name} begins {tensor.data_ptr() % _ALIGNMENT} bytes behind a multiple of {_ALIGNMENT}: clone it"
            )


def _segment(weight: DeviceWeight | None) -> WeightSegment:
    if weight is None:
        return WeightSegment()
    return WeightSegment(address(weight.words), address(weight.scales), address(weight.row_sums), weight.channels)
