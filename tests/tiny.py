"""Tiny random LLaMA checkpoints, saved by transformers, of every variant planish supports."""

from pathlib import Path
from typing import Any

__all__ = ["BASE", "CHAT_TEMPLATE", "VARIANTS", "cut_and_padded", "write_tiny"]

#: The config of every tiny model unless overridden. No width but the hidden one is a power of two.
BASE: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

#: Name -> what to override to get this variant.
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 24},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False, "hidden_size": 72, "num_attention_heads": 6},
    "rope_linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    "rope_dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    # Wavelengths of the 8 pairs are 6, 20, 63, ... positions: one is kept, one blended, the rest divided.
    "rope_llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
_MERGES = ("t h", "Ġ t", "h e", "i n", "Ġt he", "Ġ a", "e r", "a n")


def write_tiny(
    folder: Path, seed: int = 0, shards: bool = False, dtype: str = "float32", **config_overrides: Any
) -> Path:
    """Save a random LlamaForCausalLM and its tokenizer into `folder`.

    Weights are larger than transformers' initial ones, norm gains and biases are random too, so that whatever
    is left out or swapped shows in the logits.

    Args:
        folder: where to; made if need be.
        seed: of the random weights.
        shards: split the weights over several safetensors files with an index.
        dtype: 'float32', 'float16' or 'bfloat16'.
        config_overrides: arguments of transformers' LlamaConfig that replace those of `BASE`.

    Returns:
        `folder`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{**BASE, **config_overrides}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.25 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_((0.5 if "embed" in name else 0.15) * noise)
    model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="80KB" if shards else "1GB")
    _write_tokenizer(folder)
    return folder


def cut_and_padded(folder: Path) -> None:
    """Have the tokenizer.json of `folder` say that texts are cut and padded, to 12 tokens."""
    from tokenizers import Tokenizer

    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(12)
    tokenizer.enable_padding(length=12, pad_id=_SPECIAL.index("<|pad|>"), pad_token="<|pad|>")
    tokenizer.save(path)


def _write_tokenizer(folder: Path) -> None:
    """Save a byte-level BPE tokenizer with a few merges, an end token and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(merge.split()) for merge in _MERGES]
    pieces = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    bos, eos, pad = _SPECIAL
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
