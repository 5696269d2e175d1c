"""GGUF files read as the model they were made from: channel order, rope, tokenizer, chat template."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.errors import (
    CheckpointError,
    MissingExtraError,
    NonFiniteWeightError,
    TokenizerError,
    UnsupportedModelError,
)
from tests.texts import TEXTS
from tests.tiny import CHAT_TEMPLATE, VARIANTS, write_tiny

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """The order GGUF files keep: channel i of a head and its rope partner i + head_dim / 2 lie side by side."""
    head_dim = weights.shape[0] // heads
    order = [
        h * head_dim + i + half * (head_dim // 2) for h in range(heads) for i in range(head_dim // 2) for half in (0, 1)
    ]
    return weights[order]


def write_gguf(
    path: Path,
    model: Checkpoint,
    arch: str = "llama",
    extra: dict[str, np.ndarray] | None = None,
    drop: tuple[str, ...] = (),
    **metadata: Any,
) -> Path:
    """Save `model` as a float32 GGUF; `metadata` keys use '__' for '.', None leaves one out."""
    config = model.config
    values: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope.theta,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
    }
    values |= {key.replace("__", "."): value for key, value in metadata.items()}
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    for name in model.names():
        weights = model.tensor(name)
        if ".q_proj." in name:
            weights = interleaved(weights, config.num_attention_heads)
        if ".k_proj." in name:
            weights = interleaved(weights, config.num_key_value_heads)
        if gguf_name(name) not in drop:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(weights))
    for name, weights in (extra or {}).items():
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("variant", ["gqa", "mha", "mqa", "head_dim", "attention_bias", "mlp_bias", "tied", "untied"])
def test_reads_back_what_was_converted(variant: str, tmp_path: Path) -> None:
    original = open_checkpoint(write_tiny(tmp_path / "hf", **VARIANTS[variant]))
    checkpoint = open_checkpoint(write_gguf(tmp_path / "some-model.gguf", original))
    assert checkpoint.name == "some-model"
    assert checkpoint.config == original.config
    for name in original.names():
        np.testing.assert_array_equal(checkpoint.tensor(name), original.tensor(name), err_msg=name)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q6_K"])
def test_dequantises(kind: str, tmp_path: Path) -> None:
    """Every stored type reads as the float32 that was rounded into it."""
    original = open_checkpoint(write_tiny(tmp_path / "hf", hidden_size=256, intermediate_size=256, head_dim=64))
    name = "model.layers.1.mlp.up_proj.weight"
    path = write_gguf(tmp_path / "m.gguf", original, drop=(gguf_name(name),))
    exact = original.tensor(name)
    quantised = getattr(gguf.GGMLQuantizationType, kind)
    try:
        data = gguf.quants.quantize(exact, quantised)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[quantised]
        data = np.zeros((256, 256 // block * size), np.uint8)
    writer_path = tmp_path / "q.gguf"
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(writer_path, "llama")
    for key, field in reader.fields.items():
        if key.startswith(("llama.", "tokenizer.")):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.add_tensor(gguf_name(name), data, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = open_checkpoint(writer_path).tensor(name)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, gguf.quants.dequantize(data, quantised).reshape(256, 256))
    if kind != "Q6_K":
        step = {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 6e-3, "Q4_0": 0.1, "Q4_1": 0.1}[kind]
        assert abs(read - exact).max() < step


# Rope


def test_linear_rope(tiny: Checkpoint, tmp_path: Path) -> None:
    scaling = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.5}
    rope = open_checkpoint(write_gguf(tmp_path / "m.gguf", tiny, **scaling)).config.rope
    assert (rope.type, rope.factor) == ("linear", 2.5)
    rope = open_checkpoint(write_gguf(tmp_path / "o.gguf", tiny, llama__rope__scale_linear=4.0)).config.rope
    assert (rope.type, rope.factor) == ("linear", 4.0)


def llama3_factors(head_dim: int, theta: float, factor: float, low: float, high: float, old: float) -> np.ndarray:
    """What converters store as rope_freqs.weight: the divisor of every frequency."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < old / high:
            divisors.append(1.0)
        elif wavelength > old / low:
            divisors.append(factor)
        else:
            smooth = (old / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope(factor: float, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    original = open_checkpoint(write_tiny(tmp_path / "hf", head_dim=64, rope_parameters=rope))
    factors = {"rope_freqs.weight": llama3_factors(64, 500000.0, factor, 1, 4, 8192)}
    assert np.unique(factors["rope_freqs.weight"]).size > 2
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", original, extra=factors))
    assert checkpoint.config == original.config
    assert not any("rope" in name for name in checkpoint.names())


def test_other_rope_factors(tiny: Checkpoint, tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": llama3_factors(16, 10000.0, 8, 1, 4, 32)}
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tiny, extra=factors))


# What is refused


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "none.gguf")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.999])
def test_truncated(share: float, tiny: Checkpoint, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(path)


def test_a_pointer_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 144811072\n")
    with pytest.raises(CheckpointError, match="run git lfs pull in "):
        open_checkpoint(tmp_path / "m.gguf")


def test_other_architecture(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'qwen2'"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tiny, arch="qwen2"))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama__expert_count": 8}, "experts"),
        ({"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 4.0}, "rope type 'yarn'"),
        ({"llama__rope__dimension_count": 8}, r"partial_rotary_factor 0\.5"),
        ({"llama__attention__value_length": 8}, "different width"),
        ({"llama__attention__head_count_kv": [2, 1]}, "head count per layer"),
        ({"split__count": 3}, "is one of 3 parts. Join them with llama-gguf-split"),
    ],
)
def test_unsupported_metadata(metadata: dict[str, Any], message: str, tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tiny, **metadata))


def test_missing_metadata(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"llama\.context_length"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tiny, llama__context_length=None))


def test_missing_and_unknown_tensors(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks model.layers.1.self_attn.k_proj.weight"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tiny, drop=("blk.1.attn_k.weight",)))
    with pytest.raises(CheckpointError, match="token_embd"):
        open_checkpoint(write_gguf(tmp_path / "e.gguf", tiny, drop=("token_embd.weight",)))
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_q_norm\.weight"):
        open_checkpoint(write_gguf(tmp_path / "u.gguf", tiny, extra=extra))


def test_bad_weight(tiny: Checkpoint, tmp_path: Path) -> None:
    bad = {"output_norm.weight": np.full(64, np.nan, np.float32)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tiny, drop=tuple(bad), extra=bad))
    with pytest.raises(NonFiniteWeightError, match=r"model\.norm\.weight"):
        checkpoint.tensor("model.norm.weight")


def test_without_the_gguf_package(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"planish\[gguf\]"):
        open_checkpoint(path)


# Tokenizer


def vocabulary(tiny: Checkpoint, tmp_path: Path, pre: str) -> dict[str, Any]:
    """The tiny model's own vocabulary, as metadata."""
    tiny.write_sidecars(tmp_path / "sidecars")
    model = json.loads((tmp_path / "sidecars" / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": pre,
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__token_type": [3 if i < 3 else 1 for i in range(len(tokens))],
        "tokenizer__ggml__merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer__chat_template": CHAT_TEMPLATE,
    }


def write_and_load(path: Path, tmp_path: Path) -> Tokenizer:
    open_checkpoint(path).write_sidecars(tmp_path / "out")
    return Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))


def test_byte_level_tokenizer(tiny: Checkpoint, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny, **vocabulary(tiny, tmp_path, "gpt-2"))
    ours, original = write_and_load(path, tmp_path), Tokenizer.from_file(str(tmp_path / "sidecars/tokenizer.json"))
    for text in [*TEXTS, "the man<|eos|>then\n"]:
        assert ours.encode(text).ids == original.encode(text).ids
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|eos|>"
    assert config["add_bos_token"] is False
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == config["chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("pre", "stated", "adds"), [("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)]
)
def test_begin_token(pre: str, stated: bool | None, adds: bool, tiny: Checkpoint, tmp_path: Path) -> None:
    metadata = {**vocabulary(tiny, tmp_path, pre), "tokenizer__ggml__add_bos_token": stated}
    ours = write_and_load(write_gguf(tmp_path / "m.gguf", tiny, **metadata), tmp_path)
    assert (ours.encode("the man").ids[0] == 0) is adds
    assert ours.encode("the man", add_special_tokens=False).ids[0] != 0


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken"])
def test_splitting_rules_equal_transformers(pre: str, tiny: Checkpoint, tmp_path: Path) -> None:
    """One rule planish knows, and one it leaves to transformers."""
    from transformers import AutoTokenizer

    metadata = {**vocabulary(tiny, tmp_path, pre), "tokenizer__ggml__add_bos_token": False}
    path = write_gguf(tmp_path / "m.gguf", tiny, **metadata)
    ours, theirs = write_and_load(path, tmp_path), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in [*TEXTS, "The tin can, then: 123456"]:
        pieces = [
            rules.pre_tokenize_str(text) for rules in (ours.pre_tokenizer, theirs.backend_tokenizer.pre_tokenizer)
        ]
        assert pieces[0] == pieces[1]
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    # Llama 3 has numbers of three digits, Mistral's Tekken single ones.
    numbers = ["123", "456"] if pre == "llama-bpe" else list("123456")
    assert [piece for piece, _ in ours.pre_tokenizer.pre_tokenize_str("123456")] == numbers


def test_a_splitting_rule_that_nobody_knows(tiny: Checkpoint, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny, **vocabulary(tiny, tmp_path, "deepseek-coder"))
    with pytest.raises(TokenizerError, match=r"the rule 'deepseek-coder' .* Give the original checkpoint"):
        open_checkpoint(path).check_tokenizer()


def test_no_vocabulary(tiny: Checkpoint, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tiny))
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        checkpoint.check_tokenizer()


def test_damaged_vocabulary(tiny: Checkpoint, tmp_path: Path) -> None:
    metadata = vocabulary(tiny, tmp_path, "gpt-2")
    metadata["tokenizer__ggml__merges"] = ["no such"]
    with pytest.raises(TokenizerError, match="damaged"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tiny, **metadata)).check_tokenizer()


# The real model
