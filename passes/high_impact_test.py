"""High-impact channels: what cannot be is refused, and both forms of a linear in segments are exact in integers."""

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from planish.passes.high_impact import HighImpact, module_of, segments
from planish.passes.lower_linears_to_ort import LowerLinearsToOrtPass
from planish.passes.lower_linears_to_tensorrt import LowerLinearsToTensorrtPass
from planish.passes.merge_linears import MODULES
from planish.passes.quantize_linears import QuantizeLinearsPass
from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import LayerTransforms, Transform, Transforms
from tests.fixed_cache import plain_session
from tests.high_impact import INPUTS, MODULE, OUTPUTS, Integers, float_linear, shuffled, whole_activations
from tests.onnx_run import session


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "3, 4 or 8 bits, not 5"),
        ({"order": np.zeros(INPUTS, np.int64)}, r"int64 \[200\], is no permutation"),
        ({"order": np.arange(1, INPUTS + 1)}, "is no permutation"),
        ({"order": np.arange(INPUTS).astype(np.float32)}, r"float32 \[200\], is no permutation"),
        ({"order": np.arange(INPUTS).reshape(2, -1)}, r"\[2, 100\], is no permutation"),
        ({"order": np.zeros(0, np.int64), "count": 0}, "is no permutation"),
        ({"count": 63}, "63 high-impact channels of 200 cannot be: they are a multiple of 64"),
        ({"count": -64}, "-64 high-impact channels"),
        ({"count": 128, "order": np.arange(128)}, "128 high-impact channels of 128 cannot be: .* and not all of them"),
        ({"clip": 0.0}, "is 0.0, and a clip"),
        ({"clip": 1.5}, "is 1.5"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HighImpact(**{"bits": 4, "order": shuffled(), "count": 64, **changes})


@pytest.mark.parametrize(
    ("form", "bits", "message"),
    [
        (LinearFormat(4, 8), 4, "4 bits are no gain where weights have 4"),
        (LinearFormat(8, 8), 8, "8 bits are no gain where weights have 8"),
        (LinearFormat(16, 16), 8, "no gain where weights stay in floating point"),
    ],
)
def test_bits_that_are_no_gain(form: LinearFormat, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segments(form, HighImpact(bits, shuffled(), 64))


@pytest.mark.parametrize(("form", "activation_bits"), [("w3a3", 4), ("w3a8", 8), ("w2a16", 16), ("w2a16g64", 16)])
def test_segments(form: str, activation_bits: int) -> None:
    linear = dataclasses.replace(Scheme.parse(form).linear, clip=0.5)
    high, rest = segments(linear, HighImpact(4, shuffled(), 128, 0.75), 0.25)
    assert (high.format.weight_bits, high.format.activation_bits) == (4, activation_bits)
    assert rest.format == dataclasses.replace(linear, clip=0.125)
    assert (high.format.group, high.format.clip) == (linear.group, 0.375)
    np.testing.assert_array_equal(np.concatenate([high.channels, rest.channels]), shuffled())
    assert (high.size(INPUTS), rest.size(INPUTS)) == (128, 72)
    assert [module_of(each.of(MODULE)) for each in (high, rest)] == [MODULE, MODULE]
    assert (high.of(MODULE), rest.of(MODULE)) == (f"{MODULE}.high", MODULE)


@pytest.mark.parametrize("high", [None, HighImpact(8, shuffled(), 0)])
def test_none_of_them_is_the_whole_linear(high: HighImpact | None) -> None:
    (whole,) = segments(LinearFormat(8, 8), high, 0.5)
    assert (whole.channels, whole.size(INPUTS), whole.of(MODULE), whole.format) == (
        None,
        INPUTS,
        MODULE,
        LinearFormat(8, 8, clip=0.5),
    )


def test_they_belong_to_inputs_of_linears_of_their_width() -> None:
    sites = {site: Transform(INPUTS) for site in ("attn_in", "attn_out", "ffn_in", "ffn_out", "key", "value")}
    high = HighImpact(4, shuffled(), 64)
    layer = LayerTransforms(**sites, high={"ffn_out": high})
    transforms = Transforms((layer, LayerTransforms(**sites)))
    assert transforms.high(MODULE) is high
    assert transforms.high("model.layers.0.mlp.up_proj") is None
    assert transforms.high("model.layers.1.mlp.down_proj") is None
    assert transforms.high("lm_head") is None
    moved = transforms.with_high({1: {"ffn_in": high}})
    assert moved.high("model.layers.1.mlp.gate_proj") is moved.high("model.layers.1.mlp.up_proj") is high
    assert moved.high(MODULE) is None
    with pytest.raises(ValueError, match="the site key has no high-impact channels"):
        LayerTransforms(**sites, high={"key": high})
    with pytest.raises(ValueError, match="ffn_out has 200 channels, and the order of their impact 128"):
        LayerTransforms(**sites, high={"ffn_out": HighImpact(4, shuffled(128), 64)})


@pytest.mark.parametrize("count", [64, 128])
@pytest.mark.parametrize(
    ("spelling", "bits"),
    [("w3a3", 4), ("w2a2", 3), ("w4a4", 8), ("w3a8", 4), ("w2a4g32", 4), ("w2a16", 4), ("w2a16g64", 3), ("w3a16", 8)],
)
def test_every_form_is_the_sum_of_two_integer_products(spelling: str, bits: int, count: int) -> None:
    form, high = Scheme.parse(spelling).linear, HighImpact(bits, shuffled(), count)
    codes, x = Integers(form, high), whole_activations(form, high)
    exact = np.zeros((*x.shape[:-1], OUTPUTS))
    for segment in segments(form, high):
        zero = 1 << segment.format.weight_bits - 1
        exact += x[..., segment.channels].astype(np.float64) @ (codes.codes[segment.of(MODULE)].T.astype(float) - zero)

    def quantized() -> ir.Model:
        model = float_linear()
        QuantizeLinearsPass(Scheme.parse(spelling), codes, high=lambda module: high)(model)
        return common.RemoveUnusedNodesPass()(model).model

    (y,) = session(ir.to_proto(quantized())).run(None, {"x": x})
    (lowered,) = session(ir.to_proto(LowerLinearsToOrtPass()(quantized()).model)).run(None, {"x": x})
    standard = LowerLinearsToTensorrtPass()(quantized()).model
    standard.functions.clear()
    (plain,) = plain_session(ir.to_proto(standard)).run(None, {"x": x})
    for found in (y, lowered, plain):
        # Activations are multiples of 1/8: the integers are those that this leaves no doubt about.
        np.testing.assert_array_equal(np.rint(found * 8.0), exact * 8)
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())


def test_a_lowering_finds_both_segments_at_their_sum() -> None:
    high = HighImpact(4, shuffled(), 64)
    model = float_linear()
    QuantizeLinearsPass(Scheme.parse("w3a3"), Integers(LinearFormat(3, 3), high), high=lambda module: high)(model)
    total = model.graph.outputs[0].producer()
    assert total is not None
    assert total.op_type == "Add"
    products = [value.producer() for value in total.inputs if value is not None]
    assert [product.op_type for product in products if product] == ["PlanishMatMul4", "PlanishMatMul3"]
    assert {product.metadata_props[MODULES] for product in products if product} == {MODULE}
    order = []
    for product in products:
        assert product is not None
        quantize = product.inputs[0].producer() if product.inputs[0] else None
        gather = quantize.inputs[0].producer() if quantize and quantize.inputs[0] else None
        assert gather is not None
        assert gather.inputs[0] is model.graph.inputs[0]
        channels = gather.inputs[1].const_value if gather.inputs[1] else None
        assert channels is not None
        order.append(channels.numpy())
    np.testing.assert_array_equal(np.concatenate(order), high.order)
