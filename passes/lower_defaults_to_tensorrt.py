"""Lower inputs with default values to inputs that must be given: the parser would freeze them to the default."""

import onnx_ir as ir

__all__ = ["LowerDefaultsToTensorrtPass"]


class LowerDefaultsToTensorrtPass(ir.passes.InPlacePass):
    """Removes the initializers of graph inputs.

    num_logits_to_keep then is a shape input of the engine: a number on the host that sets the length of the logits.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove the default of every input that has one."""
        initializers = model.graph.initializers
        defaults = [value for value in model.graph.inputs if value.name in initializers]
        for value in defaults:
            del initializers[str(value.name)]
            value.const_value = None
        return ir.passes.PassResult(model, modified=bool(defaults))
