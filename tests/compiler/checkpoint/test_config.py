"""The parsed config means what transformers' LlamaConfig means, and what planish lacks is refused by name."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import CheckpointError, UnsupportedModelError
from tests.tiny import BASE, VARIANTS

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

#: Configs of real models and partial ones, in the spelling their config.json has.
REAL: dict[str, dict[str, Any]] = {
    "nothing": {},
    "one_value": {"hidden_size": 2048},
    "null_values": {
        "num_key_value_heads": None,
        "head_dim": None,
        "rope_scaling": None,
        "eos_token_id": None,
    },
    "llama2_old_linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "old_dynamic": {"rope_theta": 500000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama32_old": {
        "hidden_size": 2048,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "max_position_embeddings": 131072,
        "eos_token_id": [128001, 128008, 128009],
        "bos_token_id": 128000,
        "tie_word_embeddings": True,
    },
    "llama32_new": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "llama3_length_beside": {
        "rope_parameters": {**LLAMA3, "rope_theta": 500000.0},
        "original_max_position_embeddings": 4096,
    },
    "llama3_length_missing": {
        "rope_parameters": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
    },
    "both_thetas": {"rope_theta": 77.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
}


def theirs_and_ours(raw: dict[str, Any]) -> tuple[transformers.LlamaConfig, LlamaConfig]:
    # from_dict may change nested dicts, so each side gets its own.
    copies = [{k: dict(v) if isinstance(v, dict) else v for k, v in raw.items()} for _ in range(2)]
    return transformers.LlamaConfig.from_dict(copies[0]), LlamaConfig.from_dict(copies[1])


@pytest.mark.parametrize("name", [*VARIANTS, *REAL])
def test_equals_transformers(name: str) -> None:
    theirs, ours = theirs_and_ours(REAL[name] if name in REAL else {**BASE, **VARIANTS[name]})
    for field in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "bos_token_id",
        "pad_token_id",
    ):
        assert getattr(ours, field) == getattr(theirs, field), field
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert ours.rope.type == theirs.rope_parameters["rope_type"]
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("name", [*VARIANTS, *REAL])
def test_frequencies_equal_transformers(name: str) -> None:
    theirs, ours = theirs_and_ours(REAL[name] if name in REAL else {**BASE, **VARIANTS[name]})
    rotary = LlamaRotaryEmbedding(theirs)
    assert rotary.attention_scaling == 1.0
    frequencies = ours.inv_freq()
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, rotary.inv_freq.numpy(), rtol=1e-6, atol=0)


def test_llama3_variant_has_all_three_bands() -> None:
    plain = LlamaConfig.from_dict(BASE).inv_freq()
    ratio = plain / LlamaConfig.from_dict({**BASE, **VARIANTS["rope_llama3"]}).inv_freq()
    assert ratio[0] == 1
    assert 1 < ratio[1] < 8
    np.testing.assert_allclose(ratio[2:], 8, rtol=1e-6)


def test_dynamic_rescales_only_beyond_max_context() -> None:
    raw = {**BASE, **VARIANTS["rope_dynamic"]}
    theirs, ours = theirs_and_ours(raw)
    rotary = LlamaRotaryEmbedding(theirs)
    within, beyond = torch.arange(ours.max_context)[None], torch.arange(ours.max_context + 1)[None]
    rotary(torch.zeros(1), within)
    np.testing.assert_allclose(ours.inv_freq(), rotary.inv_freq.numpy(), rtol=1e-6)
    rotary(torch.zeros(1), beyond)
    assert not np.allclose(ours.inv_freq(), rotary.inv_freq.numpy(), rtol=1e-4)


def test_sizes() -> None:
    config = LlamaConfig.from_dict({**BASE, "head_dim": 24})
    assert (config.q_size, config.kv_size, config.groups) == (96, 48, 2)
    assert config.max_context == 256
    linear = LlamaConfig.from_dict({**BASE, **VARIANTS["rope_linear"]})
    assert linear.max_context == 640


def test_with_num_layers() -> None:
    config = LlamaConfig.from_dict(BASE)
    assert config.with_num_layers(1).num_hidden_layers == 1
    assert config.with_num_layers(2) == config
    for n in (0, 3):
        with pytest.raises(UnsupportedModelError, match="1 to 2 layers"):
            config.with_num_layers(n)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM.*qwen2"),
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope type 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 100, "num_attention_heads": 3, "num_key_value_heads": 1}, "hidden_size 100"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"architectures": "LlamaForSequenceClassification"}, "The architecture LlamaForSequenceClassification "),
        ({"architectures": 5}, "The architecture 5 "),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope type"),
    ],
)
def test_unsupported_is_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        LlamaConfig.from_dict({**BASE, **raw})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"hidden_size": "64"}, "'hidden_size'.*'64'"),
        ({"eos_token_id": "<|eos|>"}, "eos_token_id in config.json must be the number of a token"),
        ({"eos_token_id": [[1]]}, "eos_token_id"),
        ({"bos_token_id": {"content": "<s>"}}, "bos_token_id"),
        ({"bos_token_id": [1, 2]}, "the number of one token"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers'"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": "linear"}, "must be an object"),
    ],
)
def test_impossible_values_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        LlamaConfig.from_dict({**BASE, **raw})


def test_pretraining_tp_is_no_obstacle() -> None:
    assert LlamaConfig.from_dict({**BASE, "pretraining_tp": 2}) == LlamaConfig.from_dict(BASE)
