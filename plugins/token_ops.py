"""Tokens quantised by the CUDA kernels, on PyTorch tensors: `quantize_tokens`, in front of `linear_ops`.

Work goes to the current stream of the tensors' GPU. Nothing is allocated but what is returned, and not even that where
`out` is given; nothing is synchronised; so calls can be captured into a CUDA graph. The library that `make plugins`
compiles is loaded on the first call; arguments are checked before it, and refused in words.
"""

import ctypes
import dataclasses
from collections.abc import Sequence

import torch

from planish.plugins.kernel_layout import padded_channels
from planish.plugins.kernel_library import SPREAD_TOKENS, CodeSegment, Order, QuantizeTask, call, kernel_library
from planish.plugins.on_tensors import DEVICE, TYPES, address, check_devices, check_tensor, launch, on_device_of

__all__ = ["QuantizedTokens", "TokenSegment", "best_order", "quantize_tokens", "spread_workspace"]


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


def best_order(tokens: int, bits: int, device: torch.device | str = DEVICE) -> Order:
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
    check_tensor("x", x, tuple(TYPES), ("tokens", "channels"))
    tokens, channels = x.shape
    if sum(segment.channels for segment in segments) != channels or len(segments) not in (1, 2):
        raise ValueError(
            f"one or two segments have all {channels} channels, not {[segment.channels for segment in segments]}"
        )
    for name, tensor in (("residual", residual), ("sum_out", sum_out)):
        check_tensor(name, tensor, (x.dtype,), (tokens, channels))
    if sum_out is not None and residual is None:
        raise ValueError("sum_out is given, and no residual to add")
    check_tensor("gain", gain, (torch.float32,), (channels,))
    check_tensor("permutation", permutation, (torch.int32,), (channels,))
    check_tensor("workspace", workspace, (torch.float32,), (tokens, channels))
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
    check_devices(tensors)
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


def _factors(channels: int, right: torch.Tensor | None, left: torch.Tensor | None) -> tuple[int, int]:
    """Return the rows and columns that a token is read as."""
    if right is None and left is None:
        return 1, channels
    k = right.shape[-1] if right is not None else channels // max(1, len(left) if left is not None else 1)
    m = channels // max(1, k)
    if m * k != channels:
        raise ValueError(f"{channels} channels cannot be read as rows of {k}, the width of the right factor")
    if right is not None:
        check_tensor("right", right, (torch.float32,), (m, k, k) if right.dim() == 3 else (k, k))
    check_tensor("left", left, (torch.float32,), (m, m))
    return m, k
