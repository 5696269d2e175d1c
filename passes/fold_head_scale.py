"""Fold the channel scale of lm_head into the last norm and into lm_head."""

import numpy as np
import onnx_ir as ir

from planish.passes.blocks import Blocks, GraphError, expect_readers
from planish.passes.folding import fold
from planish.passes.transforms import Array

__all__ = ["FoldHeadScalePass"]


class FoldHeadScalePass(ir.passes.InPlacePass):
    """Multiplies the gain of the last norm by a scale c, and divides the input channels of lm_head by it.

    Before: a float decoder graph, lm_head untied, its gain folded if it is to be. After: the same logits.
    """

    def __init__(self, scale: Array) -> None:
        super().__init__()
        self._scale = scale.astype(np.float64)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold the scale.

        Raises:
            GraphError: if the embeddings are tied, something other than lm_head reads the norm, or it has another
                width.
        """
        blocks = Blocks(model.graph)
        node, gain = blocks.norm("model.norm")
        expect_readers(node, {blocks.node("logits")})
        if gain.shape != ir.Shape(self._scale.shape):
            raise GraphError(f"'{gain.name}' has the shape {gain.shape}, and the scale of lm_head {self._scale.shape}.")
        # First, because it is what a tied model fails at, and nothing is folded yet then.
        fold(blocks.head(), 1, lambda w: w / self._scale)
        fold(gain, 0, lambda x: x * self._scale)
        return ir.passes.PassResult(model, modified=True)
