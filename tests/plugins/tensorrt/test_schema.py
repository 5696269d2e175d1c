"""onnx's checker knows the plugins by their contracts."""

from collections.abc import Iterator

import onnx
import onnx.defs
import onnx.helper as make
import pytest

from planish.plugins.ops import DOMAIN
from planish.plugins.tensorrt.plugins import KV_ATTEND, LINEAR, PLUGINS, QUANTIZE_TOKENS
from planish.plugins.tensorrt.schema import onnx_schema, register_schemas
from tests.plugin_attributes import GOOD


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_schemas(PLUGINS)
    yield
    for contract in PLUGINS:
        onnx.defs.deregister_schema(contract.name, 1, DOMAIN)


def model(**changes: object) -> onnx.ModelProto:
    """Return a model of one PlanishQuantizeTokens without factors."""
    attributes = {**GOOD[QUANTIZE_TOKENS.name], "plugin_namespace": "planish", "plugin_version": "1", **changes}
    node = make.make_node(
        QUANTIZE_TOKENS.name, ["x"], ["codes", "scales", "sums"], domain=DOMAIN,
        **{name: value for name, value in attributes.items() if value is not None},
    )  # fmt: skip
    x = make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 576])
    codes = make.make_tensor_value_info("codes", onnx.TensorProto.INT32, [2, 208])
    graph = make.make_graph([node], "one", [x], [codes])
    return make.make_model(
        graph, opset_imports=[make.make_opsetid("", 24), make.make_opsetid(DOMAIN, 1)], ir_version=11
    )


def test_the_checker_takes_a_node() -> None:
    onnx.checker.check_model(model())


def test_the_checker_refuses_a_missing_attribute() -> None:
    with pytest.raises(onnx.checker.ValidationError, match="activation_bits"):
        onnx.checker.check_model(model(activation_bits=None))


def test_the_checker_refuses_an_attribute_of_another_type() -> None:
    with pytest.raises(onnx.checker.ValidationError, match="clip"):
        onnx.checker.check_model(model(clip="wide"))


def test_a_schema_tells_the_contract() -> None:
    schema = onnx_schema(KV_ATTEND)
    assert [each.name for each in schema.inputs] == [each.name for each in KV_ATTEND.inputs]
    assert schema.inputs[0].description.startswith("[batch, tokens, heads * head_dim]")
    assert set(schema.attributes) == {each.name for each in KV_ATTEND.attributes} | {
        "plugin_namespace",
        "plugin_version",
    }
    others = onnx_schema(LINEAR).inputs[-1]
    assert others.option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    assert "high_words if high_channels > 0" in others.description
