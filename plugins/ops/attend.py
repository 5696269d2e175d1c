"""PlanishAttendK{key_bits}V{value_bits}: attention of float queries over the packed cache.

Keys and values are codes * scale + zero; scores are q.k / sqrt(head_dim) plus the mask; query heads share KV heads
in consecutive groups.
"""

import functools

from planish.plugins.ops.op import Op
from planish.plugins.ops.unpack import unpack

__all__ = ["attend"]


def _dequantize(name: str, bits: int) -> str:
    return f"""
        {name}_codes = {unpack(bits).call} ({name})
        {name}_codes_float = Cast <to = 1> ({name}_codes)
        {name}_scale_float = Cast <to = 1> ({name}_scale)
        {name}_step, {name}_zero = Split <axis = -1, num_outputs = 2> ({name}_scale_float)
        {name}_scaled = Mul ({name}_codes_float, {name}_step)
        {name}_float = Add ({name}_scaled, {name}_zero)
    """


@functools.cache
def attend(key_bits: int, value_bits: int) -> Op:
    """Return the attention op for a cache of `key_bits`-bit keys and `value_bits`-bit values (2, 3, 4 or 8)."""
    packed = "uint8 [batch, kv_heads, total, head_dim * bits / 8]"
    scale = "float16 [batch, kv_heads, total, 2]"
    return Op(
        name=f"PlanishAttendK{key_bits}V{value_bits}",
        inputs={
            "query": "float32 [batch, sequence, heads * head_dim], after RoPE",
            "key": packed,
            "key_scale": scale,
            "value": packed,
            "value_scale": scale,
            "mask": "float32 [batch, 1, sequence, total], 0 where attended to, -inf elsewhere",
        },
        outputs={"y": "float32 [batch, sequence, heads * head_dim]"},
        attributes={"heads": "int, query heads", "head_dim": "int"},
        body=f"""
        keep = Constant <value_ints = [0, 0]> ()
        only = Constant <value_ints = [1]> ()
        merged = Constant <value_ints = [0, 0, -1]> ()
        heads_scalar = Constant <value_int: int = @heads> ()
        heads = Reshape (heads_scalar, only)
        head_dim_scalar = Constant <value_int: int = @head_dim> ()
        head_dim = Reshape (head_dim_scalar, only)
        by_head = Concat <axis = 0> (keep, heads, head_dim)
        {_dequantize("key", key_bits)}
        {_dequantize("value", value_bits)}
        query_by_head = Reshape (query, by_head)
        query_heads_first = Transpose <perm = [0, 2, 1, 3]> (query_by_head)
        y_heads_first = Attention (query_heads_first, key_float, value_float, mask)
        y_by_head = Transpose <perm = [0, 2, 1, 3]> (y_heads_first)
        y = Reshape (y_by_head, merged)
        """,
        uses=tuple(unpack(bits) for bits in sorted({key_bits, value_bits})),
    )
