"""The linears of LLaMA models, what they move and multiply, and the least time that takes."""

import dataclasses
import functools
import math

import torch

__all__ = ["LAYERS", "Ceilings", "Shape", "copies_for", "floor", "linear_bytes", "rotated_bytes"]

#: Weights in use by turns are more than this many bytes, so that none of them is left in a GPU's L2 (50 MB on H100)...
ROTATED_BYTES = 120_000_000
#: ... and more than this many times the L2 of the GPU at hand: a cache that is not strictly least-recently-used keeps
#: some of what is only a little larger.
_ROTATED_CACHES = 3


@dataclasses.dataclass(frozen=True)
class Shape:
    """One linear of a decoder layer.

    Attributes:
        name: qkv, o, gate_up or down.
        channels: input channels.
        rows: output channels.
        factors: rows and columns that a token is read as by the online transform in front.
    """

    name: str
    channels: int
    rows: int
    factors: tuple[int, int]


#: Model -> the linears of one layer.
LAYERS = {
    "LLaMA-2-7B": (
        Shape("qkv", 4096, 12288, (64, 64)),
        Shape("o", 4096, 4096, (32, 128)),
        Shape("gate_up", 4096, 22016, (64, 64)),
        Shape("down", 11008, 4096, (86, 128)),
    ),
    "LLaMA-3-8B": (
        Shape("qkv", 4096, 6144, (64, 64)),
        Shape("o", 4096, 4096, (32, 128)),
        Shape("gate_up", 4096, 28672, (64, 64)),
        Shape("down", 14336, 4096, (112, 128)),
    ),
}


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the card does at most, measured in the same run.

    Attributes:
        bytes_per_second: read and written, by a copy of 1 GB.
        float16_per_second: float16 operations (a multiply-add is two), by torch.mm.
        int8_per_second: int8 operations, by torch._int_mm.
        launch_us: microseconds from one kernel to the next in a CUDA graph, by kernels that do nothing.
    """

    bytes_per_second: float
    float16_per_second: float
    int8_per_second: float
    launch_us: float


def linear_bytes(shape: Shape, tokens: int, weight_bits: float, token_bits: float, output_bits: float = 16) -> float:
    """Return the bytes that a product reads and writes at least: weights, codes or activations, outputs, row scales."""
    weights = shape.channels * shape.rows * weight_bits / 8
    scales = 4 * shape.rows if weight_bits < 16 else 0
    return weights + scales + tokens * (shape.channels * token_bits + shape.rows * output_bits) / 8


def floor(bytes_moved: float, operations: float, ceilings: Ceilings, int8: bool) -> float:
    """Return the least microseconds that so many bytes and operations take, whichever takes longer."""
    peak = ceilings.int8_per_second if int8 else ceilings.float16_per_second
    return 1e6 * max(bytes_moved / ceilings.bytes_per_second, operations / peak)


def copies_for(bytes_each: float) -> int:
    """Return how many copies of a weight take turns: more than `rotated_bytes` together, and two at least."""
    return max(2, math.floor(rotated_bytes() / bytes_each) + 1)


@functools.cache
def rotated_bytes() -> int:
    """Return how many bytes take turns on the GPU at hand; ROTATED_BYTES where there is none."""
    if not torch.cuda.is_available():
        return ROTATED_BYTES
    return max(ROTATED_BYTES, _ROTATED_CACHES * int(torch.cuda.get_device_properties().L2_cache_size))
