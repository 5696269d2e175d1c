"""Give lm_head a weight of its own, so that folding into it leaves the embeddings alone, and the other way round."""

import onnx_ir as ir

from planish.passes.blocks import Blocks
from planish.passes.builder import Builder
from planish.passes.folding import FoldedTensor

__all__ = ["HEAD_WEIGHT", "UntieEmbeddingsPass"]

#: The name of lm_head's own weight, as in an untied checkpoint.
HEAD_WEIGHT = "lm_head.weight"


class UntieEmbeddingsPass(ir.passes.InPlacePass):
    """Gives `lm_head` an initializer of its own, `lm_head.weight`, where it shares `model.embed_tokens.weight`.

    Before: a float decoder graph. After: lm_head's weight is read by nothing else. Its content is the embeddings',
    read from the same place.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Untie the graph, unless it is untied already."""
        graph = model.graph
        shared = Blocks(graph).head()
        if shared.name == HEAD_WEIGHT or len(shared.uses()) == 1:
            return ir.passes.PassResult(model, modified=False)
        assert shared.const_value is not None
        own = Builder().initializer(FoldedTensor(shared.const_value, (), HEAD_WEIGHT), HEAD_WEIGHT)
        graph.register_initializer(own)
        for use in list(shared.uses()):
            # The embedding itself is a Gather; what lm_head reads is transposed, and cast first where it is float16.
            if use.node.op_type in ("Cast", "Transpose"):
                use.node.replace_input_with(use.idx, own)
        return ir.passes.PassResult(model, modified=True)
