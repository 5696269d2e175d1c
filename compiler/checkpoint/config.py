"""What a LLaMA checkpoint computes, read from config.json and checked to be what planish implements."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.errors import CheckpointError, UnsupportedModelError

__all__ = ["LlamaConfig", "Rope"]


@dataclass(frozen=True)
class Rope:
    """The rotary position embedding: its type and the parameters of that type (None where unused)."""

    type: str = "default"
    theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers that define one LlamaForCausalLM, with every default filled in.

    The defaults are those of transformers' LlamaConfig, so a partial config.json means the same.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "LlamaConfig":
        """Read the content of a config.json, in the spelling of transformers 4 or 5.

        `pretraining_tp` is ignored: it changes the order of sums, not what is computed.

        Raises:
            UnsupportedModelError: if the model is anything that planish does not implement.
            CheckpointError: if a value has the wrong type or range.
        """
        _refuse_other_models(raw)
        hidden_size = _count(raw, "hidden_size", cls.hidden_size)
        heads = _count(raw, "num_attention_heads", cls.num_attention_heads)
        kv_heads = _count(raw, "num_key_value_heads", heads)
        head_dim = _count(raw, "head_dim", hidden_size // heads)
        if raw.get("head_dim") is None and hidden_size % heads:
            raise UnsupportedModelError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, and "
                "config.json gives no head_dim. Set head_dim in config.json."
            )
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; "
                "planish needs every KV head to serve the same number of query heads."
            )
        if head_dim % 2:
            raise UnsupportedModelError(f"head_dim {head_dim} is odd; rotary embeddings need pairs of channels.")
        max_positions = _count(raw, "max_position_embeddings", cls.max_position_embeddings)
        return cls(
            vocab_size=_count(raw, "vocab_size", cls.vocab_size),
            hidden_size=hidden_size,
            intermediate_size=_count(raw, "intermediate_size", cls.intermediate_size),
            num_hidden_layers=_count(raw, "num_hidden_layers", cls.num_hidden_layers),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_number(raw, "rms_norm_eps", cls.rms_norm_eps),
            rope=_read_rope(raw, max_positions),
            max_position_embeddings=max_positions,
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            bos_token_id=_token(raw, "bos_token_id", cls.bos_token_id),
            eos_token_ids=_tokens(raw, "eos_token_id", (2,)),
            pad_token_id=_token(raw, "pad_token_id", None),
        )

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def groups(self) -> int:
        """How many query heads share one KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def max_context(self) -> int:
        """The longest context, in tokens, at which the compiled model computes what transformers computes.

        For rope type 'linear', max_position_embeddings counts positions after they are divided by `factor`,
        so the context is longer by that factor. For 'dynamic', transformers changes the frequencies from step
        to step once the context is longer than max_position_embeddings, which would make cached keys stale:
        planish supports it up to that length, where nothing is rescaled yet.
        """
        if self.rope.type == "linear":
            return int(self.max_position_embeddings * (self.rope.factor or 1.0))
        return self.max_position_embeddings

    def inv_freq(self) -> npt.NDArray[np.float32]:
        """Return the angle per position of every rotated pair of channels, float32 of shape [head_dim / 2].

        Equal, up to the last bits of float32, to what transformers' ROPE_INIT_FUNCTIONS give. Cosines and
        sines need no further scaling for these rope types.
        """
        rope = self.rope
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        powers = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
        frequencies: npt.NDArray[np.float32] = np.float32(1.0) / powers
        if rope.type == "linear":
            return frequencies / np.float32(rope.factor or 1.0)
        if rope.type == "llama3":
            return _llama3_frequencies(frequencies, rope)
        return frequencies

    def with_num_layers(self, n: int) -> "LlamaConfig":
        """Return this config cut to its first `n` layers.

        Raises:
            UnsupportedModelError: if the model does not have `n` layers.
        """
        if not 1 <= n <= self.num_hidden_layers:
            raise UnsupportedModelError(
                f"Cannot keep {n} layers of a model that has {self.num_hidden_layers}. "
                f"Ask for 1 to {self.num_hidden_layers} layers."
            )
        return dataclasses.replace(self, num_hidden_layers=n)


def _refuse_other_models(raw: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for anything that is not a plain float LlamaForCausalLM."""
    model_type = raw.get("model_type", "llama")
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if not isinstance(architectures, list):
        architectures = [architectures]
    if model_type != "llama" or architectures != ["LlamaForCausalLM"]:
        raise UnsupportedModelError(
            f"The architecture {'/'.join(map(str, architectures))} (model_type '{model_type}') is not "
            "supported; planish compiles LlamaForCausalLM (model_type 'llama')."
        )
    # 'swish' is another name for the same function.
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act '{activation}' is not supported; planish implements 'silu'.")
    if raw.get("quantization_config") is not None:
        quantization = raw["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedModelError(
            f"The checkpoint is already quantised (quantization_config, method '{method}'). "
            "Give planish the float checkpoint it was made from."
        )


def _read_rope(raw: Mapping[str, Any], max_positions: int) -> Rope:
    """Read `rope_theta` + `rope_scaling`, or `rope_parameters`; as in transformers, rope_scaling wins."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"The rope parameters in config.json must be an object, not {scaling!r}.")
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise UnsupportedModelError("Rope parameters that differ between layers are not supported.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_PARAMETERS:
        raise UnsupportedModelError(
            f"rope type '{kind}' is not supported; planish implements {', '.join(_ROPE_PARAMETERS)}."
        )
    rotary = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if rotary not in (None, 1):
        raise UnsupportedModelError(
            f"partial_rotary_factor {rotary} is not supported; planish rotates the whole head (factor 1)."
        )
    given = dict(scaling)
    if kind == "llama3":
        # transformers lets a value beside the rope parameters win, and falls back on the model's own length.
        given.setdefault("original_max_position_embeddings", max_positions)
        if "original_max_position_embeddings" in raw:
            given["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    rope = Rope(
        type=kind,
        theta=_number(scaling, "rope_theta", _number(raw, "rope_theta", Rope.theta)),
        **{name: read(given, name) for name, read in _ROPE_PARAMETERS[kind].items()},
    )
    if kind == "llama3" and (rope.high_freq_factor or 0) <= (rope.low_freq_factor or 0):
        raise CheckpointError(
            f"rope type 'llama3' needs high_freq_factor ({rope.high_freq_factor}) above low_freq_factor "
            f"({rope.low_freq_factor}). Correct config.json."
        )
    return rope


def _llama3_frequencies(frequencies: npt.NDArray[np.float32], rope: Rope) -> npt.NDArray[np.float32]:
    """Divide low frequencies by the factor, keep high ones, blend between (the rule of Llama 3.1)."""
    original, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    assert rope.factor is not None
    assert original is not None
    assert low is not None
    assert high is not None
    turns = np.float32(original) / (np.float32(2 * math.pi) / frequencies)
    # Clipped, the blend is 0 for what turns too seldom in the original context and 1 for what turns often.
    keep = np.clip((turns - np.float32(low)) / np.float32(high - low), np.float32(0), np.float32(1))
    divided = frequencies / np.float32(rope.factor)
    blended: npt.NDArray[np.float32] = (1 - keep) * divided + keep * frequencies
    return blended


def _tokens(raw: Mapping[str, Any], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Read a token, or several; null is none."""
    value = raw.get(name, default)
    tokens = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise CheckpointError(f"{name} in config.json must be the number of a token, or a list of some, not {value!r}.")
    return tokens


def _token(raw: Mapping[str, Any], name: str, default: int | None) -> int | None:
    """Read a token; null is none."""
    found = _tokens(raw, name, () if default is None else (default,))
    if len(found) > 1:
        raise CheckpointError(f"{name} in config.json must be the number of one token, not {list(found)}.")
    return found[0] if found else None


def _count(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Read a positive whole number; null counts as absent."""
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"'{name}' in config.json must be a positive whole number, not {value!r}.")
    return value


def _number(raw: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Read a positive finite number; null counts as absent."""
    value = raw.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"'{name}' in config.json must be a positive number, not {value!r}.")
    return float(value)


#: rope type -> the parameters its formula needs besides theta, and how each is read.
_ROPE_PARAMETERS: dict[str, dict[str, Callable[[Mapping[str, Any], str], Any]]] = {
    "default": {},
    "linear": {"factor": _number},
    "dynamic": {"factor": _number},
    "llama3": {
        "factor": _number,
        "low_freq_factor": _number,
        "high_freq_factor": _number,
        "original_max_position_embeddings": _count,
    },
}
