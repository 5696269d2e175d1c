"""Products of quantised tokens, or of float16 ones, with low-bit weights by the CUDA kernels, on PyTorch tensors.

What `token_ops` says of streams, memory and refusals holds here.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from planish.plugins.kernel_layout import KernelWeight
from planish.plugins.kernel_library import (
    SMALL_TOKENS,
    LinearTask,
    Order,
    WeightOnlyTask,
    WeightSegment,
    kernel_library,
)
from planish.plugins.on_tensors import DEVICE, TYPES, address, check_devices, check_tensor, launch
from planish.plugins.token_ops import QuantizedTokens

__all__ = ["DeviceWeight", "linear", "weight_only_linear"]


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
        cls, weight: KernelWeight, scale: npt.NDArray[np.float32], device: torch.device | str = DEVICE
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
    check_devices(tensors)
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
    check_tensor("x", x, (torch.float16,), ("tokens", weight.channels))
    if weight.channels % 8:
        raise ValueError(f"{weight.channels} channels: a multiple of 8 has a kernel")
    out = _output(out, len(x), weight.rows, gated, dtype, x.device)
    check_devices({"x": x, "weights": weight.words, "their scales": weight.scales, "out": out})
    task = WeightOnlyTask(
        words=address(weight.words), scales=address(weight.scales), bits=weight.bits, type=TYPES[dtype], gated=gated,
        channels=weight.channels, rows=weight.rows, tokens=len(x), x=address(x), stride=x.shape[1], y=address(out),
    )  # fmt: skip
    launch(kernel_library(), "planish_weight_only_linear", task, x.device)
    return out


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
    check_tensor("out", out, (dtype,), shape)
    return out


def _segment(weight: DeviceWeight | None) -> WeightSegment:
    if weight is None:
        return WeightSegment()
    return WeightSegment(address(weight.words), address(weight.scales), address(weight.row_sums), weight.channels)
