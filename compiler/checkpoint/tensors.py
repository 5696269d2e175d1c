"""Which tensors a LLaMA checkpoint must hold, and the checks they pass before anything is compiled."""

from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import CheckpointError, NonFiniteWeightError, UnsupportedModelError

__all__ = ["check_finite", "check_tensors", "expected_tensors", "is_derived"]

#: float type -> (unsigned integer of its width, mask without the sign bit, bits of infinity).
_BITS: dict[np.dtype[Any], tuple[Any, int, int]] = {
    np.dtype(np.float32): (np.uint32, 0x7FFFFFFF, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7FFF, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7FFF, 0x7F80),
}

#: Weights examined at a time, so that the check needs no copy of a whole tensor.
_CHUNK = 1 << 16

#: Names listed in one message before the rest is only counted.
_LISTED = 4


def expected_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of a model with this config, in the order of the forward pass.

    Names are those of transformers; matrices are [out, in]. `lm_head.weight` is there only if it is not tied.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    linears = [
        ("self_attn.q_proj", (config.q_size, hidden), config.attention_bias),
        ("self_attn.k_proj", (config.kv_size, hidden), config.attention_bias),
        ("self_attn.v_proj", (config.kv_size, hidden), config.attention_bias),
        ("self_attn.o_proj", (hidden, config.q_size), config.attention_bias),
        ("mlp.gate_proj", (inner, hidden), config.mlp_bias),
        ("mlp.up_proj", (inner, hidden), config.mlp_bias),
        ("mlp.down_proj", (hidden, inner), config.mlp_bias),
    ]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name, shape, bias in linears:
            shapes[f"{prefix}.{name}.weight"] = shape
            if bias:
                shapes[f"{prefix}.{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def is_derived(name: str) -> bool:
    """Say whether a stored tensor is only a cache of what config.json says, as old checkpoints have."""
    return name.endswith(".rotary_emb.inv_freq")


def check_tensors(source: str, config: LlamaConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the tensors in `found` (name -> shape) are those of the model, no more and no fewer.

    Raises:
        CheckpointError: if one is missing or has another shape.
        UnsupportedModelError: if there are others, which planish would leave out of the computation.
    """
    expected = expected_tensors(config)
    missing = [name for name in expected if name not in found]
    if missing:
        hint = " (or set tie_word_embeddings to true, if the embedding is meant)" if "lm_head.weight" in missing else ""
        raise CheckpointError(
            f"{source} lacks {_listing(missing)}, which config.json asks for. Download or save it again{hint}."
        )
    wrong = [
        f"{name} is {list(found[name])} and should be {list(shape)}"
        for name, shape in expected.items()
        if tuple(found[name]) != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{source} disagrees with config.json: {_listing(wrong)}. Use the config.json that belongs to the weights."
        )
    # A tied lm_head that is stored anyway is the embedding once more.
    extra = [name for name in found if name not in expected and not is_derived(name) and name != "lm_head.weight"]
    if extra:
        raise UnsupportedModelError(
            f"{source} holds tensors that a LlamaForCausalLM with this config.json does not use: "
            f"{_listing(extra)}. planish would ignore them, so it does not compile this model."
        )


def check_finite(name: str, weights: npt.NDArray[Any]) -> None:
    """Check that a float32, float16 or bfloat16 tensor holds no NaN and no infinity.

    Raises:
        NonFiniteWeightError: naming the tensor and the first bad element.
    """
    unsigned, magnitude, infinity = _BITS[weights.dtype]
    bits = weights.reshape(-1).view(unsigned)
    for start in range(0, bits.size, _CHUNK):
        # Without the sign, float bits order as integers do: everything from infinity up is not finite.
        chunk = bits[start : start + _CHUNK] & unsigned(magnitude)
        if chunk.max() >= infinity:
            at = start + int(np.argmax(chunk >= infinity))
            index = [int(i) for i in np.unravel_index(at, weights.shape)]
            raise NonFiniteWeightError(
                f"The tensor {name} holds {weights[tuple(index)]} at {index}. The checkpoint is damaged or "
                "its training diverged: download it again or take an earlier one."
            )


def _listing(items: Iterable[str]) -> str:
    """Join the first few items and count the rest."""
    names = list(items)
    rest = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
