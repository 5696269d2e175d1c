"""Products of quantised tokens with 8-bit weights, by PyTorch: kernels of planish multiply those of 2, 3 and 4 bits.

`lm_head` has 8 bits unless told otherwise. Sums of products are int32 and exact; floats behind them are multiplied in
the order of PlanishMatMul8.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from planish.plugins.kernel_library import Order
from planish.plugins.token_ops import QuantizedTokens, TokenSegment

__all__ = ["ByteWeight", "byte_linear"]

#: The bits whose padding tokens get: that of whole tiles, 64 channels.
_PADDING_BITS = 4
#: torch._int_mm wants more tokens than 16 on a GPU, and cuBLASLt multiplies by tiles of them...
_LEAST_TOKENS = 32
#: ... and rows in multiples of this many.
_ROW_STEP = 8


@dataclasses.dataclass(frozen=True, eq=False)
class ByteWeight:
    """8-bit weights on a GPU, their channels in the order `LANES` of tokens.

    Attributes:
        centred: int8 [padded rows, padded channels], code - 128, and 0 for padding.
        scales: float32 [rows].
        channels: input channels.
    """

    centred: torch.Tensor
    scales: torch.Tensor
    channels: int

    @classmethod
    def of(
        cls, codes: npt.NDArray[np.uint8], scale: npt.NDArray[np.float32], device: torch.device | str
    ) -> "ByteWeight":
        """Copy codes [rows, channels] and their scales [rows] to a GPU.

        Raises:
            NativeBuildError: if the packer, which knows the padding, cannot be compiled.
        """
        rows, channels = codes.shape
        padded = TokenSegment(channels, 8, _PADDING_BITS).padded
        whole = np.full((-(-rows // _ROW_STEP) * _ROW_STEP, padded), 128, np.uint8)
        whole[:rows, :channels] = codes
        # Every eight channels, even ones first.
        lanes = np.ascontiguousarray(whole.reshape(len(whole), -1, 4, 2).swapaxes(2, 3)).reshape(whole.shape)
        centred = (lanes ^ np.uint8(128)).view(np.int8)
        return cls(torch.from_numpy(centred).to(device), torch.from_numpy(np.array(scale)).to(device), channels)

    def segment(self, bits: int, clip: float) -> TokenSegment:
        """Return the segment of tokens, with codes of `bits` bits, that these weights multiply."""
        return TokenSegment(self.channels, bits, _PADDING_BITS, clip)


def byte_linear(tokens: QuantizedTokens, weight: ByteWeight) -> torch.Tensor:
    """Return codes of tokens times weights, float32 [tokens, rows].

    Nothing is synchronised, so the call can be captured into a CUDA graph.

    Args:
        tokens: of one segment, `weight.segment`, in the order `LANES`.
        weight: on the same device.

    Raises:
        ValueError: if the tokens have other channels, or another order.
    """
    (segment,) = tokens.segments
    if segment.channels != weight.channels or tokens.order is not Order.LANES:
        raise ValueError(
            f"tokens of {segment.channels} channels, order {tokens.order.name}, and weights of {weight.channels}: "
            "they must be as many, in the order LANES"
        )
    count, stored = tokens.codes.shape
    # Unsigned subtraction wraps around: what is below the zero point becomes the byte of a negative number.
    centred = tokens.codes.new_zeros(max(count, _LEAST_TOKENS), stored)
    torch.sub(tokens.codes, 1 << segment.bits - 1, out=centred[:count])
    sums = torch._int_mm(centred.view(torch.int8), weight.centred.T)[:count, : len(weight.scales)]
    return sums * weight.scales * tokens.scales
