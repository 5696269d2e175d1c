"""Fold a map of the values of each head into v_proj and o_proj."""

import onnx_ir as ir

from planish.passes.blocks import Blocks, expect_width, of_query_heads
from planish.passes.folding import fold
from planish.passes.transforms import Transforms

__all__ = ["FoldValueMapPass"]


class FoldValueMapPass(ir.passes.InPlacePass):
    """Maps the values of every KV head, v -> v V, in v_proj and its bias, and back, V^-1, in the rows of o_proj.

    Attention weights sum values of one KV head, so V passes through them: R2 of SpinQuant, P_v of FlatQuant, here
    also with a V for each KV head. The cache then holds v V.

    Before: a float decoder graph. After: the same logits.
    """

    def __init__(self, transforms: Transforms) -> None:
        super().__init__()
        self._transforms = transforms

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold the value map of every layer that has one.

        Raises:
            GraphError: if the widths of transforms and weights differ.
        """
        blocks = Blocks(model.graph)
        blocks.expect(self._transforms)
        modified = False
        for layer, transforms in enumerate(self._transforms.layers):
            value = transforms.value
            if value.right is None:
                continue
            v, (o,) = blocks.linear(layer, "self_attn.v_proj"), blocks.readers(layer, "attn_out")
            of_queries = of_query_heads(value, blocks, layer)
            expect_width(v, 1, value)
            expect_width(o, 0, of_queries)
            fold(v.weight, 1, value.apply)
            if v.bias is not None:
                fold(v.bias, 0, value.apply)
            fold(o.weight, 0, of_queries.apply_to_weight)
            modified = True
        return ir.passes.PassResult(model, modified)
