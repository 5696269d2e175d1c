"""Insert a map of keys behind RoPE, and its inverse on the queries."""

import onnx_ir as ir

from planish.passes.blocks import Blocks, GraphError, of_query_heads
from planish.passes.builder import Builder
from planish.passes.online import multiply
from planish.passes.transforms import Array, Transforms

__all__ = ["InsertKeyMapPass"]


class InsertKeyMapPass(ir.passes.InPlacePass):
    """Maps the keys of every KV head behind RoPE, k -> k K, and the queries that meet them, q -> q K^-T.

    Scores stay what they are; what goes into the cache is k K. K is one for all KV heads or one for each; it cannot
    be folded into the weights, because RoPE stands between (R3 of SpinQuant, P_h of FlatQuant).

    Before: a float decoder graph, its cache not quantised. After: the same logits; Attention reads mapped queries
    and keys.
    """

    def __init__(self, transforms: Transforms) -> None:
        super().__init__()
        self._transforms = transforms

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert every key map.

        Raises:
            GraphError: if a map is not one of the heads of this model, or stands there already.
        """
        blocks = Blocks(model.graph)
        blocks.expect(self._transforms)
        modified = False
        for layer, transforms in enumerate(self._transforms.layers):
            key = transforms.key
            if key.right is None:
                continue
            inverse, _ = of_query_heads(key, blocks, layer).inverse_factors()
            assert inverse is not None
            prefix = f"model.layers.{layer}.self_attn"
            dtype = blocks.linear(layer, "self_attn.k_proj").weight.dtype
            assert dtype is not None
            attention = blocks.node(f"{prefix}.attend")
            for i, (part, rope, right) in enumerate(_parts(inverse, key.right)):
                x = blocks.node(f"{prefix}.{rope}").outputs[0]
                if attention.inputs[i] is not x:
                    raise GraphError(f"'{attention.name}' does not read '{x.name}': there is a key map already.")
                build = Builder()
                y = multiply(model, build, x, (right, None), f"{prefix}.{part}_map", dtype)
                for value in build.initializers:
                    model.graph.register_initializer(value)
                model.graph.insert_before(attention, build.nodes)
                attention.replace_input_with(i, y)
            modified = True
        return ir.passes.PassResult(model, modified)


def _parts(inverse: Array, right: Array) -> tuple[tuple[str, str, Array], ...]:
    return ("query", "q_rope", inverse.swapaxes(-1, -2)), ("key", "k_rope", right)
