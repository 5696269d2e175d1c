"""Write a graph in an older opset than it was made in."""

import onnx
import onnx_ir as ir

from planish.passes.blocks import GraphError

__all__ = ["LowerOpsetPass"]

#: Opset -> the IR version of the first release of ONNX that has it: onnx.helper.VERSION_TABLE.
_IR_VERSIONS = {21: 10, 22: 10, 23: 11, 24: 12}


class LowerOpsetPass(ir.passes.InPlacePass):
    """Gives the graph an older opset, in which each of its nodes means the same.

    Newer versions of an op add types, attributes and inputs to it. So a node may stay as it is if the older version
    has the inputs and attributes that the node gives. What an op means has changed between opsets as well, but for no
    op that LLaMA's graphs have since opset 18; onnx's checker and the tests hold the result against the original.
    """

    def __init__(self, opset: int) -> None:
        """Take the opset, 21 at least: that is the first with the blocked DequantizeLinear of 4-bit weights."""
        super().__init__()
        assert opset in _IR_VERSIONS
        self._opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower the opset, unless the graph has an older one already.

        Raises:
            GraphError: if a node says what the older opset cannot.
        """
        imports = model.graph.opset_imports
        if imports[""] <= self._opset:
            return ir.passes.PassResult(model, modified=False)
        problems = [f"{node.name} ({node.op_type})" for node in model.graph if not self._has(node)]
        if problems:
            raise GraphError(
                f"{len(problems)} node(s) have no form in opset {self._opset}: {', '.join(problems)}. Build for a "
                "newer TensorRT."
            )
        imports[""] = self._opset
        model.ir_version = min(model.ir_version, _IR_VERSIONS[self._opset])
        return ir.passes.PassResult(model, modified=True)

    def _has(self, node: ir.Node) -> bool:
        if node.domain != "":
            return True
        try:
            schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=self._opset)
        except onnx.defs.SchemaError:
            return False
        return len(node.inputs) <= schema.max_input and set(node.attributes) <= set(schema.attributes)
