"""Take queries, keys and values apart once, after rotating all of them as one tensor of heads.

Rotating only queries and keys means to cut the values off before and to put them beside the keys again after. A head
is as good as a token to RotaryEmbedding, so each head gets its own row of the tables: that of its token, or cos = 1
and sin = 0 for a value, which keeps it bit for bit.
"""

import numpy as np
import onnx_ir as ir

from planish.passes.builder import Builder

__all__ = ["HeadTables", "rotate_heads"]

#: cos and sin of the tokens -> cos and sin of the heads, once for all layers.
HeadTables = dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value]]


def rotate_heads(
    build: Builder,
    name: str,
    tables: HeadTables,
    parts: tuple[ir.Value, ir.Value, ir.Value],
    heads: tuple[int, int],
    head_dim: int,
) -> tuple[ir.Value, ir.Value] | None:
    """Return queries and [keys, values], float32 [batch, sequence, heads, head_dim], or None where they lie apart.

    Args:
        build: takes the new nodes.
        name: what the names of the new nodes begin with.
        tables: the tables of the layers before; this layer's are added.
        parts: query, key and value [batch, sequence, ...] as MergeRotaryPass leaves them.
        heads: of queries, and of keys.
        head_dim: width of a head.
    """
    query, key, value = parts
    cut = _producer(query, "Split")
    rotary = cut and _producer(cut.inputs[0], "RotaryEmbedding")
    first_cut = rotary and _producer(rotary.inputs[0], "Split")
    if not cut or not rotary or not first_cut:
        return None
    together = list(cut.outputs) == [query, key] and list(first_cut.outputs) == [rotary.inputs[0], value]
    if not together or set(rotary.attributes) != {"num_heads"} or len(rotary.inputs) != 3:
        return None
    cos, sin = rotary.inputs[1:]
    assert cos is not None
    assert sin is not None
    if (cos, sin) not in tables:
        tables[cos, sin] = _head_tables(build, cos, sin, sum(heads), heads[1], head_dim)
    total = heads[0] + 2 * heads[1]
    as_tokens = build.op(
        "Reshape", [first_cut.inputs[0], build.ints([0, -1, head_dim], f"{name}.as_tokens_shape")], f"{name}.as_tokens"
    )
    rotated = build.op("RotaryEmbedding", [as_tokens, *tables[cos, sin]], f"{name}.rotated", num_heads=1)
    by_head = build.op(
        "Reshape", [rotated, build.ints([0, -1, total, head_dim], f"{name}.by_head_shape")], f"{name}.by_head"
    )
    sizes = build.ints([heads[0], 2 * heads[1]], f"{name}.sizes")
    queries, others = build.ops("Split", [by_head, sizes], f"{name}.q_kv", 2, axis=2)
    return queries, others


def _head_tables(
    build: Builder, cos: ir.Value, sin: ir.Value, rotated: int, kept: int, head_dim: int
) -> tuple[ir.Value, ir.Value]:
    """Repeat each token's row for its `rotated` heads, and add `kept` rows that change nothing."""
    kept_heads = np.zeros((1, 1, rotated + kept, 1), np.float32)
    kept_heads[:, :, rotated:] = 1
    rotated_heads = build.initializer(1 - kept_heads, "rotation.rotated_heads")
    axis, shape = build.ints([2], "rotation.head_axis"), build.ints([0, -1, head_dim // 2], "rotation.shape")

    def by_head(table: ir.Value, role: str) -> ir.Value:
        row = build.op("Unsqueeze", [table, axis], f"rotation.{role}_of_token")
        return build.op("Mul", [row, rotated_heads], f"rotation.{role}_of_rotated")

    ones = build.initializer(kept_heads, "rotation.kept_heads")
    cos_by_head = build.op("Add", [by_head(cos, "cos"), ones], "rotation.cos_of_head")
    return (
        build.op("Reshape", [cos_by_head, shape], "rotation.cos"),
        build.op("Reshape", [by_head(sin, "sin"), shape], "rotation.sin"),
    )


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None
