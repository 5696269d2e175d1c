"""A node of every plugin, by its attributes."""

from planish.plugins.tensorrt.plugins import KV_APPEND, KV_ATTEND, LINEAR, QUANTIZE_TOKENS

__all__ = ["GOOD"]

#: Plugin -> attributes without a problem.
GOOD: dict[str, dict[str, float]] = {
    QUANTIZE_TOKENS.name: {
        "layout": 1, "bits": 3, "channels": 512, "high_channels": 64, "activation_bits": 3, "clip": 0.75,
        "high_activation_bits": 4, "high_clip": 1.0, "m": 9, "k": 64, "right_count": 9, "has_left": 1, "permuted": 1,
        "added": 1, "normed": 1, "epsilon": 1e-5,
    },
    LINEAR.name: {
        "layout": 1, "bits": 3, "channels": 512, "high_channels": 64, "rows": 112, "code_bits": 4, "type": 0,
        "gated": 1,
    },
    KV_APPEND.name: {
        "layout": 1, "kv_heads": 3, "head_dim": 64, "context": 48, "key_bits": 3, "value_bits": 2,
        "key_clip": 1.0, "value_clip": 0.5,
    },
    KV_ATTEND.name: {
        "layout": 1, "kv_heads": 3, "head_dim": 64, "context": 48, "key_bits": 3, "value_bits": 2, "heads": 9,
    },
}  # fmt: skip
