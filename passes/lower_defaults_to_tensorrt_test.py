"""An input with a default value becomes one that must be given."""

from pathlib import Path

import onnx_ir as ir

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.export.float_model import float_model
from planish.passes.lower_defaults_to_tensorrt import LowerDefaultsToTensorrtPass
from tests.tiny import write_tiny


def test_the_default_is_gone_and_the_input_stays(tmp_path: Path) -> None:
    model = float_model(open_checkpoint(write_tiny(tmp_path)))
    inputs = [value.name for value in model.graph.inputs]
    assert "num_logits_to_keep" in model.graph.initializers
    assert LowerDefaultsToTensorrtPass()(model).modified
    assert "num_logits_to_keep" not in model.graph.initializers
    written = ir.to_proto(model).graph
    assert [value.name for value in written.input] == inputs
    assert not LowerDefaultsToTensorrtPass()(model).modified
