"""Fuse a residual Add with the RMSNorm that reads it."""

import onnx_ir as ir

from planish.passes.builder import Builder, replace_nodes

__all__ = ["FuseResidualNormPass"]


class FuseResidualNormPass(ir.passes.InPlacePass):
    """Replaces ``s = Add(x, y); RMSNormalization(s)`` by ONNX Runtime's SkipSimplifiedLayerNormalization."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every pair."""
        norms = [node for node in model.graph if node.op_type == "RMSNormalization"]
        fused = [_fuse(model.graph, norm) for norm in norms]
        if any(fused):
            model.graph.opset_imports["com.microsoft"] = 1
        return ir.passes.PassResult(model, modified=any(fused))


def _fuse(graph: ir.Graph, norm: ir.Node) -> bool:
    x, gain = norm.inputs
    add = x.producer() if x is not None else None
    if add is None or add.op_type != "Add":
        return False
    build = Builder()
    normed, _, _, total = build.ops(
        "SkipSimplifiedLayerNormalization",
        [*add.inputs, gain],
        str(norm.name),
        4,
        domain="com.microsoft",
        epsilon=norm.attributes.get_float("epsilon"),
    )
    total.name = str(add.outputs[0].name)
    # The mean and variance outputs are not computed in inference.
    build.nodes[-1].outputs[1].name = build.nodes[-1].outputs[2].name = ""
    replace_nodes(graph, [add, norm], build, {add.outputs[0]: total, norm.outputs[0]: normed})
    return True
