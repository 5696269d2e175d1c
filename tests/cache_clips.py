"""Transforms that only clip the cache, differently in every layer, for keys and for values."""

from planish.compiler.checkpoint.config import LlamaConfig
from planish.passes.transforms import LayerTransforms, Transform, Transforms

__all__ = ["clipping_transforms"]


def clipping_transforms(config: LlamaConfig) -> Transforms:
    """Return identities with clips from 0.6 to 0.9; layer 0 gives keys and values the same."""
    hidden, inner, kv = Transform(config.hidden_size), Transform(config.intermediate_size), Transform(config.kv_size)

    def layer(i: int) -> LayerTransforms:
        return LayerTransforms(
            attn_in=hidden,
            attn_out=Transform(config.q_size),
            ffn_in=hidden,
            ffn_out=inner,
            key=kv,
            value=kv,
            clips={"key": 0.9 - 0.2 * i, "value": 0.9 - 0.3 * i},
        )

    return Transforms(tuple(layer(i) for i in range(config.num_hidden_layers)))
