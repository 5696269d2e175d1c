"""Fold channel scales into what makes the channels and what reads them."""

import numpy as np
import onnx_ir as ir

from planish.passes.blocks import Blocks, expect_width
from planish.passes.folding import Map, fold
from planish.passes.transforms import Array, Site, Transforms

__all__ = ["FoldChannelScalePass"]

_NORMS: dict[Site, str] = {"attn_in": "input_layernorm", "ffn_in": "post_attention_layernorm"}


class FoldChannelScalePass(ir.passes.InPlacePass):
    """Multiplies the channels of a site by its scale c, and divides the weights that read them by it.

    At attn_in and ffn_in c goes into the norm gain. At ffn_out it goes into the output channels of up_proj and its
    bias, because silu(gate) * up is linear in up (SmoothRot).

    Before: a float decoder graph whose online transforms are not inserted yet. After: the same logits.
    """

    def __init__(self, transforms: Transforms) -> None:
        super().__init__()
        self._transforms = transforms

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every scale there is.

        Raises:
            GraphError: if the widths of scales and weights differ.
        """
        blocks = Blocks(model.graph)
        blocks.expect(self._transforms)
        modified = False
        for layer, transforms in enumerate(self._transforms.layers):
            for site in ("attn_in", "ffn_in", "ffn_out"):
                transform = transforms[site]
                if transform.scale is None:
                    continue
                readers = blocks.readers(layer, site)
                times, over = _maps(transform.scale)
                for reader in readers:
                    expect_width(reader, 0, transform)
                    fold(reader.weight, 0, over)
                if site == "ffn_out":
                    up = blocks.linear(layer, "mlp.up_proj")
                    fold(up.weight, 1, times)
                    if up.bias is not None:
                        fold(up.bias, 0, times)
                else:
                    _, gain = blocks.norm(f"model.layers.{layer}.{_NORMS[site]}")
                    fold(gain, 0, times)
                modified = True
        return ir.passes.PassResult(model, modified)


def _maps(scale: Array) -> tuple[Map, Map]:
    exact = scale.astype(np.float64)
    return (lambda x: x * exact), (lambda w: w / exact)
