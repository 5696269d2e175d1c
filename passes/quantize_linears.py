"""Quantise linears: MatMul by a float weight becomes a planish product with packed codes.

A linear with high-impact channels becomes two such products, one for each segment of its input channels, and their sum:

    Add(PlanishMatMul4(PlanishQuantizeActivation(Gather(x, high)), codes of high),
        PlanishMatMul3(PlanishQuantizeActivation(Gather(x, rest)), codes of rest))

So every op has one meaning and every lowering of it holds for segments too. A lowering to a kernel that runs both
segments in one loop over the input channels finds them by `segment_pairs`, at the Add, whose inputs are products of the
same `planish.modules`, the high one first. Both Gathers are of one value, and their channels together are the
permutation; FoldChannelOrderPass leaves a Split where the permutation is folded.
"""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from planish.passes.builder import Builder, dim, replace_nodes
from planish.passes.codes import CodesSource
from planish.passes.declare import declare
from planish.passes.formats import LM_HEAD, format_of
from planish.passes.high_impact import HighImpactOf, Segment, no_high_impact, segments
from planish.passes.merge_linears import MODULES, linear_modules
from planish.passes.scheme import LinearFormat, Scheme
from planish.plugins.ops import DOMAIN, matmul, quantize_activation, weight_only_matmul
from planish.plugins.packing import packed_size

__all__ = ["QuantizeLinearsPass"]


class QuantizeLinearsPass(ir.passes.InPlacePass):
    """Replaces ``MatMul(x, W)`` by ``PlanishMatMul(PlanishQuantizeActivation(x), codes)``, or by its weight-only kin.

    Linears whose format is float stay. `left_float` names them afterwards: nothing is skipped silently.

    Args:
        scheme: the bits.
        codes: the quantised weights.
        clips: module -> the share of a token's largest magnitude that its activation grid spans, times the clip of
            the scheme; `Transforms.clip`. Modules of a merged product, which share the grid, must have the same.
        high: module -> the high-impact channels of its input; `Transforms.high`. They are shared likewise.
    """

    def __init__(
        self,
        scheme: Scheme,
        codes: CodesSource,
        clips: Callable[[str], float] = lambda module: 1.0,
        high: HighImpactOf = no_high_impact,
    ) -> None:
        super().__init__()
        self._scheme = scheme
        self._codes = codes
        self._clips = clips
        self._high = high
        self.left_float: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantise every linear that the scheme gives low bits."""
        modified = False
        for node in list(model.graph):
            modules = [LM_HEAD] if _is_lm_head(node) else linear_modules(node)
            if not modules:
                continue
            form = format_of(self._scheme, modules[0])
            if form.is_float:
                self.left_float += modules
                continue
            self._quantize(model, node, modules, form)
            modified = True
        return ir.passes.PassResult(model, modified)

    def _quantize(self, model: ir.Model, node: ir.Node, modules: list[str], form: LinearFormat) -> None:
        name = LM_HEAD if modules == [LM_HEAD] else str(node.outputs[0].name)
        (clip,) = {self._clips(module) for module in modules}
        (high,) = {self._high(module) for module in modules}
        build, old = Builder(), node.outputs[0]
        products = [self._product(model, build, node, name, modules, segment) for segment in segments(form, high, clip)]
        y = products[0] if len(products) == 1 else build.op("Add", products, f"{name}.segments")
        for value in {*products, y}:
            value.type, value.shape = old.type, old.shape
        replace_nodes(model.graph, [node], build, {old: y})

    def _product(
        self, model: ir.Model, build: Builder, node: ir.Node, linear: str, modules: list[str], segment: Segment
    ) -> ir.Value:
        """Add the product of one segment of the linear that `node` computes, and what quantises its activations."""
        x, form, name = node.inputs[0], segment.format, segment.of(linear)
        assert x is not None
        k = segment.size(_input_channels(node))
        if segment.channels is not None:
            channels = build.initializer(segment.channels.astype(np.int32), f"{name}.channels")
            x = build.op("Gather", [x, channels], f"{name}.gathered", axis=-1)
            build.nodes[-1].metadata_props[MODULES] = ",".join(modules)
        weight, scale = self._weight(build, name, [segment.of(module) for module in modules], k, form)
        group = form.group or k
        if form.weight_only:
            op = weight_only_matmul(form.weight_bits)
            y = build.op(op.name, [x, weight, scale], f"{name}.product", domain=DOMAIN, k=k, group=group)
        else:
            quantize = quantize_activation()
            declare(model, quantize)
            codes = build.ops(
                quantize.name, [x], f"{name}.input", 2, domain=DOMAIN, bits=form.activation_bits, clip=form.clip
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
        return y

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
