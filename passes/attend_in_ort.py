"""Attention over a packed cache in ops that ONNX Runtime runs well: one form for decoding, one for prefill.

- One new token (decoding): every cached token is read once, so the cost is unpacking. The fields of the packed bytes
  (see `planish.plugins.fields`) take the place of the codes; scale and zero act on the scores and the probabilities,
  which are 1 / head_dim of the size.
- Several (prefill): the scores are large and the cache is small, so keys and values are dequantised first; those of
  the new tokens never were packed, and cached ones are usually none. Queries are taken in blocks that see the keys up
  to their own end, which skips most of the masked half.
"""

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from planish.passes.builder import Builder
from planish.plugins.fields import FIELD_MULTIPLIERS, field_matrix
from planish.plugins.ops import DOMAIN, unpack

__all__ = ["ORT_DOMAIN", "Cache", "Heads", "QueryBlocks", "decode_branch", "prefill_branch", "query_blocks"]

#: The domain of ONNX Runtime's own operators.
ORT_DOMAIN = "com.microsoft"

#: Query blocks of a prefill. Of n blocks, (n - 1) / 2n of the scores are never computed; more blocks make smaller
#: products, and beyond four the gain is eaten up.
_BLOCKS = 4


@dataclasses.dataclass(frozen=True)
class Heads:
    """Attention heads of a layer: query heads, key-value heads, and their width."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Cache:
    """A layer's cache: keys then values where there are two.

    Attributes:
        bits: of key and of value codes.
        codes, scale, zero: of the new tokens, [batch, sequence, 2 * kv_heads, head_dim or 1], not packed yet.
        past, present: packed codes, uint8 [batch, kv_heads, tokens, bytes].
        past_scale, present_scale: float16 [batch, 4 * kv_heads, 1, tokens].
    """

    bits: tuple[int, int]
    codes: ir.Value
    scale: ir.Value
    zero: ir.Value
    past: tuple[ir.Value, ir.Value]
    past_scale: ir.Value
    present: tuple[ir.Value, ir.Value]
    present_scale: ir.Value


@dataclasses.dataclass(frozen=True)
class QueryBlocks:
    """What all layers share: is it decoding, and the blocks of a prefill.

    Attributes:
        decoding: bool [], exactly one new token.
        enough: bool [], there is a new token for every block; no block may be empty.
        sizes: int64 [blocks], queries in each block.
        key_ends: int64 [1] each, where the keys that a block sees end.
        mask: the whole additive mask, float32 [batch, 1, sequence, total].
        masks: the part of each block.
    """

    decoding: ir.Value
    enough: ir.Value
    sizes: ir.Value
    key_ends: list[ir.Value]
    mask: ir.Value
    masks: list[ir.Value]


def query_blocks(build: Builder, input_ids: ir.Value, mask: ir.Value) -> QueryBlocks:
    """Add the nodes that cut the queries into blocks, once for all layers."""
    sequence = build.op("Shape", [input_ids], "blocks.sequence", start=1, end=2)
    total = build.op("Shape", [mask], "blocks.total", start=3, end=4)
    tokens = build.op("Squeeze", [sequence], "blocks.tokens")
    decoding = build.op("Equal", [tokens, build.ints(1, "blocks.one")], "blocks.decoding")
    enough = build.op("GreaterOrEqual", [tokens, build.ints(_BLOCKS, "blocks.number")], "blocks.enough")
    count = build.ints([_BLOCKS], "blocks.count")

    def share(parts: range, name: str) -> ir.Value:
        scaled = build.op("Mul", [sequence, build.ints(list(parts), f"{name}.parts")], f"{name}.scaled")
        return build.op("Div", [scaled, count], name)

    starts, ends = share(range(_BLOCKS), "blocks.starts"), share(range(1, _BLOCKS + 1), "blocks.ends")
    sizes = build.op("Sub", [ends, starts], "blocks.sizes")
    past = build.op("Sub", [total, sequence], "blocks.past")
    key_ends = build.op("Add", [ends, past], "blocks.key_ends")
    each_end = build.ops("Split", [key_ends], "blocks.key_end", _BLOCKS, axis=0, num_outputs=_BLOCKS)
    rows = build.ops("Split", [mask, sizes], "blocks.mask_rows", _BLOCKS, axis=2)
    zero, axis = build.ints([0], "blocks.zero"), build.ints([3], "blocks.key_axis")
    masks = [
        build.op("Slice", [row, zero, end, axis], f"blocks.mask_{i}")
        for i, (row, end) in enumerate(zip(rows, each_end, strict=True))
    ]
    return QueryBlocks(decoding, enough, sizes, list(each_end), mask, masks)


def decode_branch(
    build: Builder, name: str, query: ir.Value, blocks: QueryBlocks, cache: Cache, heads: Heads
) -> ir.Graph:
    """Return the branch for one new token; its constants go to `build`."""
    inner = Builder()
    groups = heads.heads // heads.kv_heads
    shape = build.ints([0, heads.kv_heads, groups, heads.head_dim], f"{name}.by_group")
    by_group = inner.op("Reshape", [query, shape], f"{name}.query")
    key_bits, value_bits = cache.bits
    softmax_scale = 1 / math.sqrt(heads.head_dim)
    sum_matrix = build.initializer(np.full((heads.head_dim, 1), softmax_scale, np.float32), f"{name}.sum_matrix")
    query_sum = inner.op("MatMul", [by_group, sum_matrix], f"{name}.query_sum")
    fields_query = by_group
    if key_bits < 8:  # the field of an 8-bit code is the code
        key_matrix = np.ascontiguousarray(field_matrix(key_bits, heads.head_dim).T, np.float32)
        fields_query = inner.op(
            "MatMul", [by_group, build.initializer(key_matrix, f"{name}.key_matrix")], f"{name}.fields_query"
        )

    scales = inner.op("Cast", [cache.present_scale], f"{name}.scales", to=ir.DataType.FLOAT)
    rows = inner.ops("Split", [scales], f"{name}.scale_row", 4, axis=1, num_outputs=4)
    key_scale, value_scale, key_zero, value_zero = rows
    fields = _fields(build, inner, cache, 0, f"{name}.key")
    products = inner.op(
        "FusedMatMul", [fields_query, fields], f"{name}.products", domain=ORT_DOMAIN, transB=1, alpha=softmax_scale
    )
    scaled = inner.op("Mul", [products, key_scale], f"{name}.scaled")
    shift = inner.op("Mul", [query_sum, key_zero], f"{name}.shift")
    scores = inner.op("Sum", [scaled, shift, blocks.mask], f"{name}.scores")
    shares = inner.op("Softmax", [scores], f"{name}.shares", axis=-1)

    weighted = inner.op("Mul", [shares, value_scale], f"{name}.weighted")
    summed = inner.op("MatMul", [weighted, _fields(build, inner, cache, 1, f"{name}.value")], f"{name}.fields_sum")
    if value_bits < 8:
        value_matrix = field_matrix(value_bits, heads.head_dim).astype(np.float32)
        summed = inner.op("MatMul", [summed, build.initializer(value_matrix, f"{name}.value_matrix")], f"{name}.summed")
    zeros = inner.op("Mul", [shares, value_zero], f"{name}.zeros")
    zero_sum = inner.op("ReduceSum", [zeros, build.ints([-1], f"{name}.last")], f"{name}.zero_sum")
    by_head = inner.op("Add", [summed, zero_sum], f"{name}.by_head")
    flat = build.ints([0, 1, heads.heads * heads.head_dim], f"{name}.flat")
    return _branch(inner, inner.op("Reshape", [by_head, flat], f"{name}.y"), name)


def _fields(build: Builder, inner: Builder, cache: Cache, part: int, name: str) -> ir.Value:
    """Return the fields of the packed keys (0) or values (1), float32 [batch, kv_heads, total, fields]."""
    packed = cache.present[part]
    fields = []
    for multiplier in FIELD_MULTIPLIERS[cache.bits[part]]:
        if multiplier == 1:
            fields.append(packed)
        else:
            factor = build.initializer(np.asarray(multiplier, np.uint8), f"{name}.times_{multiplier}")
            fields.append(inner.op("Mul", [packed, factor], f"{name}.field_{multiplier}"))
    joined = inner.op("Concat", fields, f"{name}.joined", axis=-1) if len(fields) > 1 else packed
    return inner.op("Cast", [joined], f"{name}.fields", to=ir.DataType.FLOAT)


def prefill_branch(
    build: Builder, name: str, query: ir.Value, blocks: QueryBlocks, cache: Cache, heads: Heads
) -> ir.Graph:
    """Return the branch for several new tokens; its constants go to `build`."""
    inner = Builder()
    by_head = build.ints([0, 0, heads.heads, heads.head_dim], f"{name}.by_head")
    split_query = inner.op("Reshape", [query, by_head], f"{name}.query")
    heads_first = inner.op("Transpose", [split_query], f"{name}.query_t", perm=[0, 2, 1, 3])
    keys, values = _dequantized(inner, name, cache)
    whole = Builder()
    attended = whole.op("Attention", [heads_first, keys, values, blocks.mask], f"{name}.attention")
    joined = inner.op(
        "If",
        [blocks.enough],
        f"{name}.attended",
        then_branch=_in_blocks(build, f"{name}.blocks", heads_first, keys, values, blocks),
        else_branch=_branch(whole, attended, f"{name}.whole"),
    )
    by_token = inner.op("Transpose", [joined], f"{name}.by_token", perm=[0, 2, 1, 3])
    flat = build.ints([0, 0, heads.heads * heads.head_dim], f"{name}.flat")
    return _branch(inner, inner.op("Reshape", [by_token, flat], f"{name}.y"), name)


def _in_blocks(
    build: Builder, name: str, query: ir.Value, keys: ir.Value, values: ir.Value, blocks: QueryBlocks
) -> ir.Graph:
    inner = Builder()
    queries = inner.ops("Split", [query, blocks.sizes], f"{name}.query", _BLOCKS, axis=2)
    zero, axis = build.ints([0], f"{name}.zero"), build.ints([2], f"{name}.token_axis")
    attended = []
    for i, (block, end, mask) in enumerate(zip(queries, blocks.key_ends, blocks.masks, strict=True)):
        seen = [
            inner.op("Slice", [kv, zero, end, axis], f"{name}.{role}_{i}")
            for kv, role in ((keys, "keys"), (values, "values"))
        ]
        attended.append(inner.op("Attention", [block, *seen, mask], f"{name}.attention_{i}"))
    return _branch(inner, inner.op("Concat", attended, f"{name}.attended", axis=2), name)


def _dequantized(inner: Builder, name: str, cache: Cache) -> tuple[ir.Value, ir.Value]:
    """Return all keys and values, float32 [batch, kv_heads, total, head_dim]."""

    def dequantize(codes: ir.Value, scale: ir.Value, zero: ir.Value, role: str) -> ir.Value:
        as_float = inner.op("Cast", [codes], f"{name}.{role}_float", to=ir.DataType.FLOAT)
        scaled = inner.op("Mul", [as_float, scale], f"{name}.{role}_scaled")
        return inner.op("Add", [scaled, zero], f"{name}.{role}")

    new = dequantize(cache.codes, cache.scale, cache.zero, "new")
    new_heads = inner.op("Transpose", [new], f"{name}.new_heads", perm=[0, 2, 1, 3])
    new_parts = inner.ops("Split", [new_heads], f"{name}.new_part", 2, axis=1, num_outputs=2)
    scales = inner.op("Cast", [cache.past_scale], f"{name}.past_scales", to=ir.DataType.FLOAT)
    columns = inner.op("Transpose", [scales], f"{name}.past_columns", perm=[0, 1, 3, 2])
    key_scale, value_scale, key_zero, value_zero = inner.ops(
        "Split", [columns], f"{name}.past_column", 4, axis=1, num_outputs=4
    )
    whole = []
    for role, bits, packed, scale, zero, added in zip(
        ("key", "value"),
        cache.bits,
        cache.past,
        (key_scale, value_scale),
        (key_zero, value_zero),
        new_parts,
        strict=True,
    ):
        codes = inner.op(unpack(bits).name, [packed], f"{name}.past_{role}_codes", domain=DOMAIN)
        past = dequantize(codes, scale, zero, f"past_{role}")
        whole.append(inner.op("Concat", [past, added], f"{name}.{role}s", axis=2))
    return whole[0], whole[1]


def _branch(inner: Builder, y: ir.Value, name: str) -> ir.Graph:
    assert not inner.initializers, "constants of a branch belong to the outer graph"
    y.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], [y], nodes=inner.nodes, name=name)
