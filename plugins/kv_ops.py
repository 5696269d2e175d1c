"""The kernels of the packed cache on PyTorch tensors: `append_kv` and `attend_kv` over a `PackedCache`.

Work goes to the current stream of the tensors' GPU, nothing is synchronised, and how many tokens a sequence has is read
there: so calls can be captured into a CUDA graph and replayed while the cache grows. What the kernels can check without
reading memory of the GPU is refused in words.
"""

import ctypes
import dataclasses

import torch

from planish.plugins.kernel_library import call
from planish.plugins.kv_library import (
    COUNTER_BYTES,
    PAGE_TOKENS,
    AppendTask,
    AttendTask,
    CacheArrays,
    TokenCounts,
    kv_library,
)
from planish.plugins.on_tensors import DEVICE, TYPES, address, check_on_gpu, check_together, launch, on_device_of
from planish.plugins.packing import packed_size

__all__ = ["PackedCache", "append_kv", "attend_kv", "attention_workspace"]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedCache:
    """Packed keys and values of some sequences; a block is a sequence, or a page of 64 tokens.

    Attributes:
        codes: of keys and of values, uint8 [blocks, kv_heads, block tokens, bytes], layout of `packing.pack`.
        scales: of both, float16 [blocks, kv_heads, block tokens, 2], scale then zero.
        firsts: float16 [batch, kv_heads, first, head_dim] of both, which stand in for the first packed tokens.
        pages: int32 [batch, pages], the block of each page; None where a sequence is a block.
        head_dim: channels of a head.
        bits: of keys and of values.
    """

    codes: tuple[torch.Tensor, torch.Tensor]
    scales: tuple[torch.Tensor, torch.Tensor]
    firsts: tuple[torch.Tensor, torch.Tensor]
    pages: torch.Tensor | None
    head_dim: int
    bits: tuple[int, int]

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        bits: tuple[int, int],
        *,
        first: int = 0,
        pages: torch.Tensor | None = None,
        blocks: int | None = None,
        device: torch.device | str = DEVICE,
    ) -> "PackedCache":
        """Return a cache, not initialised, for `capacity` tokens to a sequence.

        Args:
            batch: sequences.
            kv_heads: heads of keys and values.
            capacity: a multiple of 16; not used where there are pages.
            head_dim: 64, 96 or 128.
            bits: of keys and of values, 2, 3, 4 or 8.
            first: tokens that are kept in float16, a multiple of 16.
            pages: int32 [batch, pages]; None is none.
            blocks: how many blocks there are where there are pages.
            device: where it goes.
        """
        count, tokens = (batch, capacity) if pages is None else (blocks or pages.numel(), PAGE_TOKENS)
        shape = (count, kv_heads, tokens)
        keys, values = (
            torch.empty(*shape, packed_size(head_dim, each), dtype=torch.uint8, device=device) for each in bits
        )
        scales = [torch.empty(*shape, 2, dtype=torch.float16, device=device) for _ in bits]
        firsts = [torch.empty(batch, kv_heads, first, head_dim, dtype=torch.float16, device=device) for _ in bits]
        return cls((keys, values), (scales[0], scales[1]), (firsts[0], firsts[1]), pages, head_dim, bits)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.codes[0].shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence has room for."""
        return self.codes[0].shape[2] if self.pages is None else self.pages.shape[1] * PAGE_TOKENS

    @property
    def tensors(self) -> dict[str, torch.Tensor | None]:
        """All tensors by name, and where there are no pages, None."""
        sides = (("key", 0), ("value", 1))
        codes = {f"{name} codes": self.codes[i] for name, i in sides}
        scales = {f"{name} scales": self.scales[i] for name, i in sides}
        return {**codes, **scales, **{f"first {name}s": self.firsts[i] for name, i in sides}, "pages": self.pages}

    def arrays(self, batch: int) -> CacheArrays:
        """Return the structure that the kernels take, for a call of `batch` sequences.

        Raises:
            ValueError: if a tensor is elsewhere, or does not have its shape and type, or there are other sequences.
        """
        shape = self.codes[0].shape[:3]
        sequences = len(self.codes[0]) if self.pages is None else len(self.pages)
        if sequences != batch:
            raise ValueError(f"there are {batch} sequences, and the cache has {sequences}")
        for i, name in enumerate(("key", "value")):
            size = packed_size(self.head_dim, self.bits[i])
            _check(f"{name} codes", self.codes[i], torch.uint8, (*shape, size))
            _check(f"{name} scales", self.scales[i], torch.float16, (*shape, 2))
            first_shape = (batch, shape[1], self.firsts[0].shape[2], self.head_dim)
            _check(f"first {name}s", self.firsts[i], torch.float16, first_shape)
        if self.pages is not None:
            _check("pages", self.pages, torch.int32, tuple(self.pages.shape))
        first = self.firsts[0].shape[2]
        return CacheArrays(
            keys=address(self.codes[0]), key_scales=address(self.scales[0]), values=address(self.codes[1]),
            value_scales=address(self.scales[1]), pages=address(self.pages),
            first_keys=address(self.firsts[0]) if first else None,
            first_values=address(self.firsts[1]) if first else None, first=first, capacity=self.capacity,
            kv_heads=self.kv_heads, head_dim=self.head_dim, key_bits=self.bits[0], value_bits=self.bits[1],
        )  # fmt: skip


def append_kv(
    cache: PackedCache,
    past: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor | None = None,
    *,
    counts: torch.Tensor | None = None,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
    maps: tuple[torch.Tensor, torch.Tensor] | None = None,
    clips: tuple[float, float] = (1.0, 1.0),
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Append keys, behind RoPE and key map, and values; return the queries behind RoPE and map, or None without any.

    Queries, keys and values may be parts of one merged output: tokens at any distance, the same for keys and values.

    Args:
        cache: written to; `cuda/kv_append.cuh` has the formulas.
        past: int32 [batch], tokens that come before; also the position of the first new one.
        keys: float32, float16 or bfloat16 [batch, tokens, kv_heads, head_dim].
        values: like keys.
        queries: [batch, tokens, heads, head_dim], of the same type; None is none.
        counts: int32 [batch], new tokens of each sequence; None is all.
        angles: cosines and sines, float32 [positions, head_dim / 2]; None is no RoPE.
        maps: of keys, K, and of queries, K^-T: float32 [1 or kv_heads, head_dim, head_dim]; None is none.
        clips: share of the range that the grids of keys and of values span.
        out: where the queries go; None makes it.

    Raises:
        ValueError: if an argument does not fit; the message says which.
        KernelError: if the launch failed.
        NativeBuildError: if the kernels are not compiled.
    """
    heads = 0 if queries is None else queries.shape[2]
    stride = _vectors("keys", keys, cache.kv_heads, cache.head_dim, keys)
    if _vectors("values", values, cache.kv_heads, cache.head_dim, keys) != stride:
        raise ValueError(f"tokens of values are {values.stride(1)} elements apart, and those of keys {stride}")
    query_stride = 0
    if queries is not None:
        query_stride = _vectors("queries", queries, heads, cache.head_dim, keys)
        out = _output(out, queries, cache.head_dim)
    cosines, sines = angles or (None, None)
    key_map, query_map = maps or (None, None)
    for name, table in (("cosines", cosines), ("sines", sines)):
        if table is not None:
            _check(name, table, torch.float32, (len(table), cache.head_dim // 2))
    for name, matrix in (("key map", key_map), ("query map", query_map)):
        if matrix is not None:
            _check(name, matrix, torch.float32, (len(matrix), cache.head_dim, cache.head_dim))
    if key_map is not None and query_map is not None and len(key_map) != len(query_map):
        raise ValueError(f"{len(key_map)} key maps and {len(query_map)} query maps: as many of one as of the other")
    check_together({
        **cache.tensors, "past": past, "counts": counts, "keys": keys, "values": values, "queries": queries,
        "cosines": cosines, "sines": sines, "key map": key_map, "query map": query_map, "out": out,
    })  # fmt: skip
    task = AppendTask(
        cache=cache.arrays(len(keys)), news=_counts(past, counts, keys), queries=address(queries), keys=address(keys),
        values=address(values), query_stride=query_stride, stride=stride, rotated=address(out) if heads else None,
        heads=heads, type=TYPES[keys.dtype], cosines=address(cosines), sines=address(sines),
        key_map=address(key_map), query_map=address(query_map), map_count=0 if key_map is None else len(key_map),
        key_clip=clips[0], value_clip=clips[1],
    )  # fmt: skip
    launch(kv_library(), "planish_append_kv", task, keys.device)
    return out if heads else None


def attention_workspace(cache: PackedCache, batch: int, tokens: int, heads: int) -> torch.Tensor:
    """Return a workspace of `attend_kv` with room for such queries, uint8 [bytes], for any number of calls.

    Calls of other shapes can share it if it has room for them too, one after the other on one stream.

    Raises:
        ValueError: if an argument does not fit.
        KernelError: if the GPU cannot be asked.
        NativeBuildError: if the kernels are not compiled.
    """
    device = cache.codes[0].device
    news = TokenCounts(batch=batch, tokens=tokens)
    task = AttendTask(cache=cache.arrays(batch), news=news, heads=heads, score_scale=1.0)
    _plan(task, device)
    workspace = torch.empty(task.workspace_bytes, dtype=torch.uint8, device=device)
    workspace[:COUNTER_BYTES] = 0
    return workspace


def attend_kv(
    cache: PackedCache,
    past: torch.Tensor,
    queries: torch.Tensor,
    *,
    counts: torch.Tensor | None = None,
    scale: float | None = None,
    workspace: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return attention of the new tokens over the packed cache, which has them already, like queries.

    Args:
        cache: what `append_kv` wrote; `cuda/kv_attend.cuh` has the formulas.
        past: int32 [batch], as it was for the append.
        queries: float32, float16 or bfloat16 [batch, tokens, heads, head_dim], behind RoPE and query map.
        counts: int32 [batch], as for the append; queries behind them give zeros.
        scale: of the scores; None is 1 / sqrt(head_dim).
        workspace: of `attention_workspace`, for calls that follow one another on a stream; None makes one.
        out: where the result goes; None makes it.

    Raises:
        ValueError: if an argument does not fit; the message says which.
        KernelError: if the launch failed.
        NativeBuildError: if the kernels are not compiled.
    """
    batch, tokens, heads, _ = queries.shape
    stride = _vectors("queries", queries, heads, cache.head_dim, queries)
    out = _output(out, queries, cache.head_dim)
    check_together({
        **cache.tensors, "past": past, "counts": counts, "queries": queries, "workspace": workspace, "out": out,
    })  # fmt: skip
    task = AttendTask(
        cache=cache.arrays(batch), news=_counts(past, counts, queries), queries=address(queries), stride=stride,
        y=address(out), heads=heads, type=TYPES[queries.dtype], score_scale=scale or cache.head_dim**-0.5,
    )  # fmt: skip
    _plan(task, queries.device)
    if workspace is None:
        workspace = attention_workspace(cache, batch, tokens, heads)
    _check("workspace", workspace, torch.uint8, (max(len(workspace), task.workspace_bytes),))
    task.workspace = address(workspace)
    launch(kv_library(), "planish_attend_kv", task, queries.device)
    return out


def _vectors(name: str, x: torch.Tensor, heads: int, head_dim: int, like: torch.Tensor) -> int:
    """Check vectors of heads, and return how many elements lie from token to token."""
    if x.dtype not in TYPES or x.dtype != like.dtype:
        raise ValueError(f"{name} are {x.dtype}, and must be float32, float16 or bfloat16, like all beside them")
    batch, tokens = like.shape[:2]
    if x.shape != (batch, tokens, heads, head_dim):
        raise ValueError(f"{name} are {list(x.shape)}, and must be {[batch, tokens, heads, head_dim]}")
    # A dimension of one element has any stride.
    stride = x.stride(1) if tokens > 1 else x.stride(0) if batch > 1 else heads * head_dim
    together = x.stride(3) == 1 and (heads == 1 or x.stride(2) == head_dim)
    if not together or (batch > 1 and x.stride(0) != tokens * stride):
        raise ValueError(f"{name} have strides {x.stride()}: heads of a token lie side by side, tokens at one distance")
    check_on_gpu(name, x, "are")
    return stride


def _output(out: torch.Tensor | None, like: torch.Tensor, head_dim: int) -> torch.Tensor:
    if out is None:
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)
    _check("out", out, like.dtype, (*like.shape[:3], head_dim))
    return out


def _counts(past: torch.Tensor, counts: torch.Tensor | None, like: torch.Tensor) -> TokenCounts:
    batch, tokens = like.shape[:2]
    _check("past", past, torch.int32, (batch,))
    if counts is not None:
        _check("counts", counts, torch.int32, (batch,))
    return TokenCounts(batch=batch, tokens=tokens, past=address(past), counts=address(counts))


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} are {tensor.dtype} {list(tensor.shape)}, and must be {dtype} {list(shape)}, contiguous"
        )
    check_on_gpu(name, tensor, "are")


def _plan(task: AttendTask, device: torch.device) -> None:
    with on_device_of(device):
        call(kv_library(), "planish_plan_attend", ctypes.byref(task))
