"""The kernels of the packed cache as Python calls them: the structures and functions of `cuda/planish_kv.h`."""

import ctypes
import functools

from planish.plugins.kernel_library import kernel_library

__all__ = [
    "COUNTER_BYTES",
    "PAGE_TOKENS",
    "AppendTask",
    "AttendTask",
    "CacheArrays",
    "TokenCounts",
    "bind_kv",
    "kv_library",
]

#: Tokens of a page.
PAGE_TOKENS = 64
#: The first bytes of a workspace of attention, zero before its first use.
COUNTER_BYTES = 4096

_int, _long, _float, _array = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class CacheArrays(ctypes.Structure):
    """`struct planish_kv_cache`."""

    _fields_ = [
        ("keys", _array),
        ("key_scales", _array),
        ("values", _array),
        ("value_scales", _array),
        ("pages", _array),
        ("first_keys", _array),
        ("first_values", _array),
        ("first", _int),
        ("capacity", _int),
        ("kv_heads", _int),
        ("head_dim", _int),
        ("key_bits", _int),
        ("value_bits", _int),
    ]


class TokenCounts(ctypes.Structure):
    """`struct planish_kv_tokens`."""

    _fields_ = [("batch", _int), ("tokens", _int), ("past", _array), ("counts", _array)]


class AppendTask(ctypes.Structure):
    """`struct planish_append`."""

    _fields_ = [
        ("cache", CacheArrays),
        ("news", TokenCounts),
        ("queries", _array),
        ("keys", _array),
        ("values", _array),
        ("query_stride", _long),
        ("stride", _long),
        ("rotated", _array),
        ("heads", _int),
        ("type", _int),
        ("cosines", _array),
        ("sines", _array),
        ("key_map", _array),
        ("query_map", _array),
        ("map_count", _int),
        ("key_clip", _float),
        ("value_clip", _float),
    ]


class AttendTask(ctypes.Structure):
    """`struct planish_attend`."""

    _fields_ = [
        ("cache", CacheArrays),
        ("news", TokenCounts),
        ("queries", _array),
        ("stride", _long),
        ("y", _array),
        ("heads", _int),
        ("type", _int),
        ("score_scale", _float),
        ("splits", _int),
        ("workspace_bytes", _long),
        ("workspace", _array),
    ]


def bind_kv(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the functions of a library with this C interface their types, and return it."""
    library.planish_append_kv.argtypes = (ctypes.POINTER(AppendTask), ctypes.c_void_p)
    library.planish_attend_kv.argtypes = (ctypes.POINTER(AttendTask), ctypes.c_void_p)
    library.planish_plan_attend.argtypes = (ctypes.POINTER(AttendTask),)
    library.planish_attend_workspace.argtypes = (ctypes.POINTER(AttendTask), ctypes.POINTER(_long))
    for name in ("planish_append_kv", "planish_attend_kv", "planish_plan_attend", "planish_attend_workspace"):
        getattr(library, name).restype = ctypes.c_int
    library.planish_last_error.restype = ctypes.c_char_p
    return library


@functools.cache
def kv_library() -> ctypes.CDLL:
    """Return the library of all kernels, loaded on the first call.

    Raises:
        NativeBuildError: if it is not there, or cannot be loaded.
    """
    return bind_kv(kernel_library())
