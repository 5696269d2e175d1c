"""The library of CUDA kernels as Python calls it: the structures and functions of `cuda/planish_kernels.h`.

Loading it needs neither a GPU nor PyTorch; calling it needs a GPU. `make plugins` compiles it.
"""

import ctypes
import enum
import functools
import os
from pathlib import Path

from planish.plugins.errors import PlanishError
from planish.plugins.native import SOURCES, NativeBuildError

__all__ = [
    "SMALL_TOKENS",
    "SPREAD_TOKENS",
    "CodeSegment",
    "KernelError",
    "LinearTask",
    "Order",
    "QuantizeTask",
    "WeightOnlyTask",
    "WeightSegment",
    "bind",
    "call",
    "kernel_library",
    "library_path",
]

#: The most tokens of planish_small_linear and planish_weight_only_linear's kernel for few of them.
SMALL_TOKENS = 16
#: The most tokens whose block-diagonal map planish_quantize_tokens spreads over the GPU, given a workspace.
SPREAD_TOKENS = 32
_BUILT = SOURCES.resolve().parents[1] / "build" / "plugins" / "libplanish_kernels.so"

_int, _long, _float, _array = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class KernelError(PlanishError):
    """A CUDA kernel could not be launched."""

    exit_code = 32


class Order(enum.IntEnum):
    """How codes of tokens lie in memory: `enum planish_order`."""

    LANES = 0
    COLUMNS = 1
    NIBBLES = 2


class CodeSegment(ctypes.Structure):
    """`struct planish_code_segment`."""

    _fields_ = [("channels", _int), ("padded", _int), ("bits", _int), ("clip", _float)]


class QuantizeTask(ctypes.Structure):
    """`struct planish_quantize`."""

    _fields_ = [
        ("x", _array),
        ("residual", _array),
        ("sum", _array),
        ("gain", _array),
        ("epsilon", _float),
        ("right", _array),
        ("left", _array),
        ("right_count", _int),
        ("m", _int),
        ("k", _int),
        ("permutation", _array),
        ("segments", CodeSegment * 2),
        ("segment_count", _int),
        ("type", _int),
        ("order", _int),
        ("channels", _int),
        ("tokens", _long),
        ("codes", _array),
        ("stride", _long),
        ("scales", _array),
        ("zero_sums", _array),
        ("workspace", _array),
    ]


class WeightSegment(ctypes.Structure):
    """`struct planish_weight_segment`."""

    _fields_ = [("words", _array), ("scales", _array), ("row_sums", _array), ("channels", _int)]


class LinearTask(ctypes.Structure):
    """`struct planish_linear`."""

    _fields_ = [
        ("high", WeightSegment),
        ("low", WeightSegment),
        ("low_bits", _int),
        ("type", _int),
        ("order", _int),
        ("gated", _int),
        ("rows", _long),
        ("tokens", _long),
        ("codes", _array),
        ("stride", _long),
        ("token_scales", _array),
        ("token_zero_sums", _array),
        ("y", _array),
    ]


class WeightOnlyTask(ctypes.Structure):
    """`struct planish_weight_only`."""

    _fields_ = [
        ("words", _array),
        ("scales", _array),
        ("bits", _int),
        ("type", _int),
        ("gated", _int),
        ("channels", _int),
        ("rows", _long),
        ("tokens", _long),
        ("x", _array),
        ("stride", _long),
        ("y", _array),
    ]


def library_path() -> Path:
    """Return where the library is looked for: `$PLANISH_KERNELS`, or where `make plugins` puts it."""
    return Path(os.environ.get("PLANISH_KERNELS") or _BUILT)


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the functions of a library with this C interface their types, and return it."""
    for name, task in (
        ("planish_quantize_tokens", QuantizeTask),
        ("planish_small_linear", LinearTask),
        ("planish_large_linear", LinearTask),
        ("planish_weight_only_linear", WeightOnlyTask),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.POINTER(task), ctypes.c_void_p), ctypes.c_int
    library.planish_best_order.argtypes = (_long, _int, ctypes.POINTER(_int))
    library.planish_best_order.restype = ctypes.c_int
    library.planish_last_error.restype = ctypes.c_char_p
    return library


@functools.cache
def kernel_library() -> ctypes.CDLL:
    """Return the library, loaded on the first call.

    Raises:
        NativeBuildError: if it is not there, or cannot be loaded.
    """
    path = library_path()
    if not path.exists():
        raise NativeBuildError(
            f"The CUDA kernels are not compiled: there is no {path}. Run `make plugins`, or set PLANISH_KERNELS to "
            "a libplanish_kernels.so."
        )
    try:
        return bind(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise NativeBuildError(f"{path} is no library of these kernels: {error}. Run `make plugins` again.") from error


def call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    """Call a function of the library.

    Raises:
        ValueError: if it refuses its arguments.
        KernelError: if the launch failed.
    """
    status = getattr(library, name)(*arguments)
    if not status:
        return
    message = library.planish_last_error().decode()
    if status == 1:
        raise ValueError(message)
    raise KernelError(f"{message}. See docs/kernels.md for the GPUs that they are compiled for.")
