"""Fold the gains of the norms into the weights behind them, so that the residual stream can be rotated."""

import numpy as np
import onnx_ir as ir

from planish.passes.blocks import Blocks, expect_readers
from planish.passes.folding import Map, fold
from planish.passes.transforms import Site

__all__ = ["FoldNormGainPass", "is_one"]

_NORMS: dict[str, Site] = {"input_layernorm": "attn_in", "post_attention_layernorm": "ffn_in"}


class FoldNormGainPass(ir.passes.InPlacePass):
    """Multiplies q, k, v and gate, up and lm_head by the gain of the norm they read: W diag(g), from the right.

    RMSNorm(x R) = RMSNorm(x) R holds for a rotation R only where the gain is one (QuaRot, arXiv 2404.00456).

    Before: a float decoder graph, lm_head untied. After: all gains are ones and the logits are what they were.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every gain that is not folded yet.

        Raises:
            GraphError: if the embeddings are tied, or something other than linears reads a norm.
        """
        blocks = Blocks(model.graph)
        # First, because it is what a tied model fails at, and nothing is folded yet then.
        node, gain = blocks.norm("model.norm")
        expect_readers(node, {blocks.node("logits")})
        modified = _fold(gain, [blocks.head()], axis=1)
        for layer in range(blocks.layers):
            for norm, site in _NORMS.items():
                node, gain = blocks.norm(f"model.layers.{layer}.{norm}")
                readers = blocks.readers(layer, site)
                expect_readers(node, {reader.node for reader in readers})
                modified |= _fold(gain, [reader.weight for reader in readers], axis=0)
        return ir.passes.PassResult(model, modified)


def _fold(gain: ir.Value, weights: list[ir.Value], axis: int) -> bool:
    tensor = gain.const_value
    assert tensor is not None
    if is_one(gain):
        return False
    for weight in weights:
        fold(weight, axis, _times(tensor))
    gain.const_value = ir.tensor(np.ones(tensor.shape.numpy(), tensor.dtype.numpy()), name=gain.name)
    return True


def _times(gain: ir.TensorProtocol) -> Map:
    return lambda w: w * gain.numpy().astype(np.float64)


def is_one(gain: ir.Value) -> bool:
    """Return whether a norm has the gain 1 in every channel; a gain is small, so it is read."""
    assert gain.const_value is not None
    return bool(np.all(gain.const_value.numpy() == 1))
