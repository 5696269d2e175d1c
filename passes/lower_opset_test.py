"""A graph is written in an older opset where that can say the same."""

import onnx.parser
import onnx_ir as ir
import pytest

from planish.passes.blocks import GraphError
from planish.passes.lower_opset import LowerOpsetPass


def model(body: str, opset: int = 24) -> ir.Model:
    text = f'<ir_version: 12, opset_import: ["": {opset}]> g (float[8] x) => (float[8] y) {{ {body} }}'
    made = ir.from_proto(onnx.parser.parse_model(text))
    for node in made.graph:
        node.name = str(node.outputs[0].name)
    return made


def test_opset_and_ir_version() -> None:
    made = model("a = Cos(x) y = Cast<to = 1>(a)")
    assert LowerOpsetPass(21)(made).modified
    assert (made.graph.opset_imports[""], made.ir_version) == (21, 10)
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    assert not LowerOpsetPass(21)(made).modified
    assert not LowerOpsetPass(23)(made).modified


@pytest.mark.parametrize(
    ("body", "node"),
    [("y = Swish(x)", r"y \(Swish\)"), ('y = Cast<to = 1, round_mode = "up">(x)', r"y \(Cast\)")],
)
def test_what_an_older_opset_cannot_say(body: str, node: str) -> None:
    with pytest.raises(GraphError, match=rf"1 node\(s\) have no form in opset 21: {node}\. Build for a newer TensorRT"):
        LowerOpsetPass(21).call(model(body))
