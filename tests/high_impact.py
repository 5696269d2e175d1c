"""High-impact channels chosen at random: of whole models, and of one linear whose products are whole numbers."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.passes.builder import Builder
from planish.passes.codes import PackedWeight
from planish.passes.high_impact import HighImpact, segments
from planish.passes.scheme import LinearFormat
from planish.passes.transforms import HighImpacts, Transforms
from planish.plugins.ops import OPSET
from planish.plugins.packing import pack

__all__ = [
    "INPUTS",
    "MODULE",
    "OUTPUTS",
    "WIDE",
    "Integers",
    "float_linear",
    "random_high_impact",
    "shuffled",
    "whole_activations",
]

Array = npt.NDArray[Any]

#: One linear.
MODULE, INPUTS, OUTPUTS = "model.layers.0.mlp.down_proj", 200, 24

#: What to override in a tiny checkpoint so that two steps of channels fit in; no width is a multiple of 128.
WIDE: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 328, "num_attention_heads": 6}


def random_high_impact(transforms: Transforms, bits: int = 4, step: int = 64) -> HighImpacts:
    """Return high-impact channels for the sites of every layer: 64 or 128 of them, and none at `ffn_in` of layer 0."""
    rng = np.random.default_rng(11)

    def high(width: int, count: int, clip: float = 1.0) -> HighImpact:
        return HighImpact(bits, rng.permutation(width), count, clip)

    found: HighImpacts = {}
    for i, layer in enumerate(transforms.layers):
        found[i] = {
            "attn_in": high(layer.attn_in.width, step, 0.9),
            "attn_out": high(layer.attn_out.width, 2 * step),
            "ffn_out": high(layer.ffn_out.width, 2 * step, 0.95),
        }
        if i:
            found[i]["ffn_in"] = high(layer.ffn_in.width, step)
    return found


def shuffled(n: int = INPUTS) -> Array:
    """Return an order of channels."""
    return np.random.default_rng(2).permutation(n)


class Integers:
    """Random codes of every segment, all scales 1, so that products are whole numbers."""

    def __init__(self, form: LinearFormat, high: HighImpact) -> None:
        rng = np.random.default_rng(1)
        self.codes: dict[str, Array] = {}
        self._forms: dict[str, LinearFormat] = {}
        for segment in segments(form, high):
            codes = rng.integers(0, 1 << segment.format.weight_bits, (OUTPUTS, segment.size(INPUTS)))
            self.codes[segment.of(MODULE)] = codes.astype(np.uint8)
            self._forms[segment.of(MODULE)] = segment.format

    def out_features(self, module: str) -> int:
        return OUTPUTS

    def read(self, module: str) -> PackedWeight:
        form, codes = self._forms[module], self.codes[module]
        dtype = np.float32 if form.group is None else np.float16
        return PackedWeight(pack(codes, form.weight_bits), np.ones((form.groups(codes.shape[1]), OUTPUTS), dtype))


def float_linear() -> ir.Model:
    """Return a graph of one float product, the input of whose quantised form is that of `MODULE`."""
    build = Builder()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "sequence", INPUTS]))
    weight = build.initializer(np.zeros((INPUTS, OUTPUTS), np.float32), f"{MODULE}.weight")
    y = build.op("MatMul", [x, weight], MODULE)
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", OUTPUTS])
    graph = ir.Graph(
        [x], [y], nodes=build.nodes, initializers=build.initializers, opset_imports={"": OPSET}, name="linear"
    )
    return ir.Model(graph, ir_version=11)


def whole_activations(form: LinearFormat, high: HighImpact, tokens: int = 7) -> Array:
    """Return activations that are codes times a power of two, another one for each token and segment."""
    rng = np.random.default_rng(3)
    x = np.zeros((1, tokens, INPUTS), np.float32)
    for segment in segments(form, high):
        top = (1 << min(segment.format.activation_bits, 8) - 1) - 1
        codes = rng.integers(-top, top + 1, (1, tokens, segment.size(INPUTS)))
        codes[..., 5] = top
        x[..., segment.channels] = codes * np.exp2(rng.integers(-3, 4, (1, tokens, 1)))
    return x
