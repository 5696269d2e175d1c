"""Rotate queries and keys in one RotaryEmbedding where they lie side by side."""

import onnx_ir as ir

from planish.passes.builder import Builder, replace_nodes

__all__ = ["MergeRotaryPass"]


class MergeRotaryPass(ir.passes.InPlacePass):
    """Replaces ``q, k, v = Split(x); RotaryEmbedding(q); RotaryEmbedding(k)`` by one rotation of [q, k].

    Heads are rotated alone, so it makes no difference to them how many there are. A bias between Split and
    RotaryEmbedding leaves the two as they are.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge the rotations of every layer."""
        splits = [node for node in model.graph if node.op_type == "Split" and len(node.outputs) == 3]
        merged = [_merge(model.graph, split) for split in splits]
        return ir.passes.PassResult(model, modified=any(merged))


def _merge(graph: ir.Graph, split: ir.Node) -> bool:
    query, key, value = split.outputs
    readers = [list(part.uses()) for part in (query, key)]
    if any(len(uses) != 1 or uses[0].node.op_type != "RotaryEmbedding" for uses in readers):
        return False
    rotate_query, rotate_key = (uses[0].node for uses in readers)
    if rotate_query.inputs[1:] != rotate_key.inputs[1:]:
        return False
    sizes = split.inputs[1]
    if sizes is None or sizes.const_value is None:
        return False
    query_size, key_size, value_size = (int(size) for size in sizes.const_value.numpy())
    name = str(rotate_query.name).removesuffix(".q_rope")
    build = Builder()
    both, new_value = build.ops(
        "Split",
        [split.inputs[0], build.ints([query_size + key_size, value_size], f"{name}.qk_v_sizes")],
        f"{name}.qk_v",
        2,
        axis=-1,
    )
    heads = rotate_query.attributes.get_int("num_heads") + rotate_key.attributes.get_int("num_heads")
    rotated = build.op("RotaryEmbedding", [both, *rotate_query.inputs[1:]], f"{name}.qk_rope", num_heads=heads)
    parts = build.ops(
        "Split", [rotated, build.ints([query_size, key_size], f"{name}.q_k_sizes")], f"{name}.q_k", 2, axis=-1
    )
    replace_nodes(
        graph,
        [split, rotate_query, rotate_key],
        build,
        {value: new_value, rotate_query.outputs[0]: parts[0], rotate_key.outputs[0]: parts[1]},
    )
    return True
