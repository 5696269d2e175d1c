"""Fold a rotation of the residual stream into every weight that reads or writes it."""

import onnx_ir as ir

from planish.passes.blocks import Blocks, GraphError, initializer_of
from planish.passes.builder import dim
from planish.passes.fold_norm_gain import is_one
from planish.passes.folding import fold
from planish.passes.transforms import Array, Site, orthogonal

__all__ = ["FoldResidualRotationPass"]

_READERS: tuple[Site, ...] = ("attn_in", "ffn_in")
_WRITERS: tuple[Site, ...] = ("attn_out", "ffn_out")


class FoldResidualRotationPass(ir.passes.InPlacePass):
    """Rotates the residual stream, x -> x R: R1 of SpinQuant (arXiv 2405.16406) and QuaRot, at no cost at run time.

    Embeddings become E R, what writes the stream (o, down, their biases) W R, what reads it (q, k, v, gate, up,
    lm_head) R^T W, all as stored in the graph. R is taken as the orthogonal matrix that it was rounded from.

    Before: a float decoder graph, lm_head untied, all norm gains one (FoldNormGainPass). After: the same logits.
    """

    def __init__(self, rotation: Array) -> None:
        """Take `rotation`, R, float32 [hidden, hidden]."""
        super().__init__()
        self._rotation = orthogonal(rotation)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold the rotation.

        Raises:
            GraphError: if a norm gain is not one, the embeddings are tied, or the width of the model is another.
        """
        blocks = Blocks(model.graph)
        embedding = initializer_of(blocks.node("model.embed_tokens"), 0)
        if dim(embedding, 1) != len(self._rotation):
            raise GraphError(
                f"The residual stream has {dim(embedding, 1)} channels, and its rotation has {len(self._rotation)}."
            )
        for name in _norms(blocks.layers):
            if not is_one(blocks.norm(name)[1]):
                raise GraphError(f"The gain of '{name}' is not one. Run FoldNormGainPass before rotating.")
        # The weights of readers are [in, out]: (R^T W)^T = W^T R, so all of them are multiplied by R along one axis.
        self._fold(embedding, 1)
        self._fold(blocks.head(), 1)
        for layer in range(blocks.layers):
            for site in _READERS:
                for reader in blocks.readers(layer, site):
                    self._fold(reader.weight, 0)
            for site in _WRITERS:
                (writer,) = blocks.readers(layer, site)
                self._fold(writer.weight, 1)
                if writer.bias is not None:
                    self._fold(writer.bias, 0)
        return ir.passes.PassResult(model, modified=True)

    def _fold(self, value: ir.Value, axis: int) -> None:
        fold(value, axis, lambda x: x @ self._rotation)


def _norms(layers: int) -> list[str]:
    names = ("input_layernorm", "post_attention_layernorm")
    return [*(f"model.layers.{i}.{name}" for i in range(layers) for name in names), "model.norm"]
