"""Quantise linears: MatMul by a float weight becomes a planish product with packed codes."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from planish.passes.builder import Builder, dim, replace_nodes
from planish.passes.codes import CodesSource
from planish.passes.declare import declare
from planish.passes.merge_linears import MODULES, linear_modules
from planish.passes.scheme import LinearFormat, Scheme
from planish.plugins.ops import DOMAIN, matmul, quantize_activation, weight_only_matmul
from planish.plugins.packing import packed_size

__all__ = ["LM_HEAD", "QuantizeLinearsPass"]

#: The module name of the output projection.
LM_HEAD = "lm_head"


class QuantizeLinearsPass(ir.passes.InPlacePass):
    """Replaces ``MatMul(x, W)`` by ``PlanishMatMul(PlanishQuantizeActivation(x), codes)``, or by its weight-only kin.

    Linears whose format is float stay. `left_float` names them afterwards: nothing is skipped silently.

    Args:
        scheme: the bits.
        codes: the quantised weights.
        clips: module -> the share of a token's largest magnitude that its activation grid spans, times the clip of
            the scheme; `Transforms.clip`. Modules of a merged product, which share the grid, must have the same.
    """

    def __init__(self, scheme: Scheme, codes: CodesSource, clips: Callable[[str], float] = lambda module: 1.0) -> None:
        super().__init__()
        self._scheme = scheme
        self._codes = codes
        self._clips = clips
        self.left_float: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantise every linear that the scheme gives low bits."""
        modified = False
        for node in list(model.graph):
            modules = [LM_HEAD] if _is_lm_head(node) else linear_modules(node)
            if not modules:
                continue
            form = self._scheme.lm_head if modules == [LM_HEAD] else self._scheme.linear
            if form.is_float:
                self.left_float += modules
                continue
            self._quantize(model, node, modules, form)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _quantize(self, model: ir.Model, node: ir.Node, modules: list[str], form: LinearFormat) -> None:
        x, old_weight = node.inputs
        assert x is not None
        assert old_weight is not None
        name = LM_HEAD if modules == [LM_HEAD] else str(node.outputs[0].name)
        k = _input_channels(node)
        build = Builder()
        weight, scale = self._weight(build, name, modules, k, form)
        group = form.group or k
        if form.weight_only:
            op = weight_only_matmul(form.weight_bits)
            y = build.op(op.name, [x, weight, scale], f"{name}.product", domain=DOMAIN, k=k, group=group)
        else:
            quantize = quantize_activation()
            declare(model, quantize)
            (clip,) = {self._clips(module) for module in modules}
            codes = build.ops(
                quantize.name, [x], f"{name}.input", 2, domain=DOMAIN, bits=form.activation_bits, clip=form.clip * clip
            )
            op = matmul(form.weight_bits)
            y = build.op(
                op.name,
                [*codes, weight, scale],
                f"{name}.product",
                domain=DOMAIN,
                k=k,
                group=group,
                activation_bits=form.activation_bits,
            )
        declare(model, op)
        build.nodes[-1].metadata_props[MODULES] = ",".join(modules)
        y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
        replace_nodes(model.graph, [node], build, {node.outputs[0]: y})

    def _weight(
        self, build: Builder, name: str, modules: list[str], k: int, form: LinearFormat
    ) -> tuple[ir.Value, ir.Value]:
        outputs = sum(self._codes.out_features(module) for module in modules)
        scale_type = ir.DataType.FLOAT if form.group is None else ir.DataType.FLOAT16

        def packed() -> ir.TensorProtocol:
            return ir.Tensor(np.concatenate([self._codes.read(module).packed for module in modules]))

        def scales() -> ir.TensorProtocol:
            return ir.Tensor(np.concatenate([self._codes.read(module).scale for module in modules], axis=1))

        codes_name, scale_name = f"{name}.codes", f"{name}.scale"
        shape = ir.Shape([outputs, packed_size(k, form.weight_bits)])
        scale_shape = ir.Shape([form.groups(k), outputs])
        return (
            build.initializer(ir.LazyTensor(packed, ir.DataType.UINT8, shape, name=codes_name), codes_name),
            build.initializer(ir.LazyTensor(scales, scale_type, scale_shape, name=scale_name), scale_name),
        )


def _is_lm_head(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and not node.domain and node.name == "logits"


def _input_channels(node: ir.Node) -> int:
    """Return the rows of a linear's weight, looking through the Cast and Transpose in front of lm_head."""
    weight = node.inputs[1]
    assert weight is not None
    transposed = False
    while not weight.is_initializer():
        producer = weight.producer()
        assert producer is not None
        transposed ^= producer.op_type == "Transpose"
        weight = producer.inputs[0]
        assert weight is not None
    return dim(weight, 1 if transposed else 0)
