"""What a GGUF file's metadata says about the model, in the words of config.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import CheckpointError, UnsupportedModelError

__all__ = ["hf_config"]

#: What Llama 3.1 and later use besides the factor: the metadata holds only the factors these lead to.
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


def hf_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: npt.NDArray[np.float32] | None,
) -> dict[str, Any]:
    """Return the config.json of a GGUF model.

    Args:
        metadata: the file's key-value pairs.
        shapes: shape of every tensor, under transformers' names.
        rope_factors: what the frequency of each pair of channels is divided by, float32 [head_dim / 2].

    Raises:
        CheckpointError: if the metadata lacks something that every file has.
        UnsupportedModelError: if the architecture is not llama, or the rope factors are not those of Llama 3.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedModelError(f"The GGUF architecture '{architecture}' is not supported; planish reads 'llama'.")
    if metadata.get("llama.expert_count"):
        raise UnsupportedModelError("Mixtures of experts are not supported; planish compiles LlamaForCausalLM.")
    if "model.embed_tokens.weight" not in shapes:
        raise CheckpointError("The GGUF file lacks token_embd.weight. Download it again.")
    vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
    heads = _required(metadata, "attention.head_count")
    kv_heads = metadata.get("llama.attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise UnsupportedModelError("A head count per layer is not supported; planish needs one for all layers.")
    rotated = metadata.get("llama.rope.dimension_count", hidden_size // heads)
    head_dim = metadata.get("llama.attention.key_length", rotated)
    if metadata.get("llama.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("Keys and values of different width are not supported.")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": _required(metadata, "feed_forward_length"),
        "num_hidden_layers": _required(metadata, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(_required(metadata, "attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": _required(metadata, "context_length"),
        "rope_theta": _decimal(metadata.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(metadata),
        "attention_bias": any(".self_attn." in name and name.endswith(".bias") for name in shapes),
        "mlp_bias": any(".mlp." in name and name.endswith(".bias") for name in shapes),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    if rope_factors is not None:
        config["rope_scaling"] = _llama3_scaling(config, rope_factors)
    return config


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    """Return `llama.<key>`."""
    try:
        return metadata[f"llama.{key}"]
    except KeyError:
        raise CheckpointError(f"The GGUF file lacks the metadata llama.{key}. Download or convert it again.") from None


def _decimal(value: float) -> float:
    """Undo the detour over float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the scaling that the metadata names; linear scaling is also found under the key of old files."""
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = metadata.get("llama.rope.scaling.factor")
    if "llama.rope.scale_linear" in metadata:
        kind, factor = "linear", metadata["llama.rope.scale_linear"]
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": None if factor is None else _decimal(factor)}


def _llama3_scaling(config: Mapping[str, Any], factors: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Find the llama3 parameters whose frequencies are the default ones divided by `factors`."""
    # The lowest frequencies are divided by the whole factor.
    scaling = {
        **_LLAMA3,
        "factor": _decimal(factors.max()),
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
    scaled = LlamaConfig.from_dict({**config, "rope_scaling": scaling}).inv_freq()
    plain = LlamaConfig.from_dict({**config, "rope_scaling": None}).inv_freq()
    if factors.shape != plain.shape or not np.allclose(plain / factors, scaled, rtol=1e-5, atol=0):
        raise UnsupportedModelError(
            "The GGUF file scales rope frequencies by factors (rope_freqs.weight) that are not those of "
            "Llama 3.1 or later. Give planish the original checkpoint."
        )
    return scaling
