"""Insert the transforms that no weight in front can take up, as planish ops that run online."""

import onnx_ir as ir

from planish.passes.blocks import Blocks, Linear, expect_width
from planish.passes.builder import Builder
from planish.passes.online import multiply
from planish.passes.transforms import Site, Transform, Transforms

__all__ = ["INVERSE", "InsertOnlineTransformPass"]

#: Node metadata key of the maps that undo an online transform; its value is the name of that transform's output.
INVERSE = "planish.inverse"

_SITES: tuple[Site, ...] = ("attn_in", "attn_out", "ffn_in", "ffn_out")


class InsertOnlineTransformPass(ir.passes.InPlacePass):
    """Puts ``PlanishTransform*`` and its inverse in front of the linears of every site whose transform has factors.

    The inverse is one op per factor, marked with the metadata `planish.inverse`; FoldTransformIntoWeightsPass takes
    it into the weights. Channel scales are left to FoldChannelScalePass.

    Before: a float decoder graph. After: the same logits; q, k, v (and gate, up) still read one common value.
    """

    def __init__(self, transforms: Transforms) -> None:
        super().__init__()
        self._transforms = transforms

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert every online transform.

        Raises:
            GraphError: if the widths of transforms and weights differ, or one stands there already.
        """
        blocks = Blocks(model.graph)
        blocks.expect(self._transforms)
        modified = False
        for layer, transforms in enumerate(self._transforms.layers):
            for site in _SITES:
                if transforms[site].has_matrix:
                    readers = blocks.readers(layer, site)
                    _insert(model, readers, transforms[site].without_scale(), f"model.layers.{layer}.{site}")
                    modified = True
        return ir.passes.PassResult(model, modified)


def _insert(model: ir.Model, readers: list[Linear], online: Transform, name: str) -> None:
    for reader in readers:
        expect_width(reader, 0, online)
    build, dtype = Builder(), readers[0].weight.dtype
    assert dtype is not None
    x = made = multiply(model, build, readers[0].x, (online.right, online.left), f"{name}.transform", dtype)
    right, left = online.inverse_factors()
    for part, factor in (("left", left), ("right", right)):
        if factor is not None:
            factors = (None, factor) if part == "left" else (factor, None)
            x = multiply(model, build, x, factors, f"{name}.inverse_{part}", dtype)
            build.nodes[-1].metadata_props[INVERSE] = str(made.name)
    first = min((reader.node for reader in readers), key=list(model.graph).index)
    for value in build.initializers:
        model.graph.register_initializer(value)
    model.graph.insert_before(first, build.nodes)
    for reader in readers:
        reader.node.replace_input_with(0, x)
