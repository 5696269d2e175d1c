"""Merge linears that read the same input into one matrix product: q, k, v and gate, up."""

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from planish.passes.builder import Builder, dim, replace_nodes

__all__ = ["MODULES", "MergeLinearsPass", "linear_modules"]

#: Node metadata key that lists the checkpoint modules whose outputs a merged product concatenates, comma-separated.
MODULES = "planish.modules"

_MERGED_NAMES = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


def linear_modules(node: ir.Node) -> list[str]:
    """Return the checkpoint modules that a MatMul by an initializer computes; empty for any other node."""
    if node.op_type != "MatMul" or node.domain:
        return []
    if MODULES in node.metadata_props:
        return node.metadata_props[MODULES].split(",")
    weight = node.inputs[1]
    if weight is not None and weight.is_initializer() and weight.name and weight.name.endswith(".weight"):
        return [weight.name.removesuffix(".weight")]
    return []


class MergeLinearsPass(ir.passes.InPlacePass):
    """Replaces the MatMuls of q, k, v (and of gate, up) by one MatMul and a Split; biases stay behind the Split.

    The logits do not change beyond the rounding of the matrix product: each output column is the same sum.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge every group of linears with a common input."""
        readers: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            modules = linear_modules(node)
            if len(modules) == 1 and node.inputs[0] is not None:
                readers[node.inputs[0]].append(node)
        modified = False
        for nodes in readers.values():
            suffixes = tuple(linear_modules(node)[0].rpartition(".")[2] for node in nodes)
            if suffixes in _MERGED_NAMES:
                _merge(model.graph, nodes, _MERGED_NAMES[suffixes])
                modified = True
        return ir.passes.PassResult(model, modified)


def _merge(graph: ir.Graph, nodes: list[ir.Node], merged: str) -> None:
    build = Builder()
    modules = [linear_modules(node)[0] for node in nodes]
    name = f"{modules[0].rpartition('.')[0]}.{merged}"
    weights = [node.inputs[1] for node in nodes]
    tensors = [weight.const_value for weight in weights if weight is not None and weight.const_value is not None]
    sizes = [dim(weight, 1) for weight in weights]

    def concatenate() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=1))

    shape = ir.Shape([dim(weights[0], 0), sum(sizes)])
    weight = build.initializer(
        ir.LazyTensor(concatenate, tensors[0].dtype, shape, name=f"{name}.weight"), f"{name}.weight"
    )
    product = build.op("MatMul", [nodes[0].inputs[0], weight], name)
    build.nodes[-1].metadata_props[MODULES] = ",".join(modules)
    parts = build.ops("Split", [product, build.ints(sizes, f"{name}.sizes")], f"{name}.split", len(sizes), axis=-1)
    replace_nodes(graph, nodes, build, {node.outputs[0]: part for node, part in zip(nodes, parts, strict=True)})
    for old in weights:
        assert old is not None
        assert old.name is not None
        if not old.uses():
            del graph.initializers[old.name]
