"""Spreading the rest of the channels: the same integers, with fewer channels to gather."""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest

from planish.passes.high_impact import HighImpact
from planish.passes.lower_linears_to_ort import LowerLinearsToOrtPass
from planish.passes.quantize_linears import QuantizeLinearsPass
from planish.passes.scheme import Scheme
from planish.passes.spread_rest_segment import SpreadRestSegmentPass
from tests.high_impact import INPUTS, MODULE, Integers, float_linear, shuffled, whole_activations
from tests.onnx_run import session


def quantized(spelling: str, high: HighImpact) -> ir.Model:
    scheme, model = Scheme.parse(spelling), float_linear()
    QuantizeLinearsPass(scheme, Integers(scheme.linear, high), high=lambda module: high)(model)
    return common.RemoveUnusedNodesPass()(model).model


def run(model: ir.Model, x: Any) -> Any:
    return session(ir.to_proto(model)).run(None, {"x": x})[0]


@pytest.mark.parametrize("spelling", ["w3a3", "w2a2", "w3a8", "w2a16", "w3a16"])
def test_the_same_numbers(spelling: str) -> None:
    high = HighImpact(4, shuffled(), 64)
    model = quantized(spelling, high)
    x = whole_activations(Scheme.parse(spelling).linear, high)
    expected = run(model, x)
    assert SpreadRestSegmentPass()(model).modified
    (gather,) = [node for node in model.graph if node.op_type == "Gather"]
    assert gather.name == f"{MODULE}.high.gathered"
    product = next(node for node in model.graph if node.name == f"{MODULE}.product")
    assert (product.attributes.get_int("k"), product.attributes.get_int("group")) == (INPUTS, INPUTS)
    assert sum(node.op_type == "Mul" for node in model.graph) == (not spelling.endswith("a16"))
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        assert value.const_value.numpy().shape == tuple(value.shape or ()), name
        assert value.uses(), name
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    lowered = run(LowerLinearsToOrtPass()(model).model, x)
    np.testing.assert_array_equal(np.rint(lowered * 8.0), np.rint(expected * 8.0))


def test_the_grid_of_the_rest_does_not_see_the_high_channels() -> None:
    """A loud high-impact channel would make the other codes of its token 0."""
    high = HighImpact(4, shuffled(), 64)
    model = quantized("w3a3", high)
    x = whole_activations(Scheme.parse("w3a3").linear, high)
    x[..., high.order[3]] = 1e6
    expected = run(model, x)
    SpreadRestSegmentPass()(model)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    quiet = x.copy()
    quiet[..., high.order[64:]] = 0
    assert np.abs(run(model, quiet) - expected).max() > 1


@pytest.mark.parametrize("spelling", ["w3a3g32", "w2a16g64"])
def test_groups_stay_side_by_side(spelling: str) -> None:
    model = quantized(spelling, HighImpact(4, shuffled(), 128))
    assert not SpreadRestSegmentPass()(model).modified
    assert sum(node.op_type == "Gather" for node in model.graph) == 2


def test_whole_linears_are_left_alone() -> None:
    model = quantized("w3a3", HighImpact(4, shuffled(), 0))
    assert not SpreadRestSegmentPass()(model).modified
