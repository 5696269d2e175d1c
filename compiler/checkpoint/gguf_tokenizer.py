"""A tokenizer.json made from the vocabulary and the rules that a GGUF file's metadata holds."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from planish.compiler.errors import TokenizerError
from planish.compiler.optional import require

__all__ = ["build_tokenizer", "tokenizer_config"]

#: Values of tokenizer.ggml.token_type for tokens that are matched in the text as a whole.
_CONTROL, _USER_DEFINED = 3, 4

#: How Llama 3 splits text before merging (from its published tokenizer.json).
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TOKEN_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> str:
    """Return the tokenizer.json of a GGUF model.

    Byte-level vocabularies whose splitting rule is known here are built directly, all others by transformers.

    Raises:
        TokenizerError: if the file has no vocabulary or one that cannot be converted.
        MissingExtraError: if transformers is needed and not installed.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        raise TokenizerError(
            f"{path} holds no tokenizer (tokenizer.ggml.tokens). Use a file that was converted with it."
        )
    byte_level, pre = metadata.get("tokenizer.ggml.model") == "gpt2", metadata.get("tokenizer.ggml.pre", "default")
    rules = _split_rules(pre)
    if byte_level and rules is not None:
        tokenizer = _byte_level(metadata, rules)
    elif byte_level and pre not in ("default", *_rules_of_transformers()):
        raise TokenizerError(
            f"{path} splits text by the rule '{pre}' (tokenizer.ggml.pre), unknown to planish and to transformers. "
            "Give the original checkpoint, with its tokenizer.json."
        )
    else:
        tokenizer = _by_transformers(path)
    if _adds_bos(metadata):
        tokenizer.post_processor = _bos_template(metadata)
    return str(tokenizer.to_str())


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Say whether the begin token is put before every text, by the defaults of llama.cpp."""
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    if stated is None:
        stated = metadata.get("tokenizer.ggml.model") == "llama" or _is_llama3(metadata)
    return bool(stated) and "tokenizer.ggml.bos_token_id" in metadata


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer_config.json of a GGUF model."""
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    config: dict[str, Any] = {
        # The class that takes tokenizer.json as it is; model-specific ones bring rules of their own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": _adds_bos(metadata),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get("llama.context_length"),
    }
    for name, key in _TOKEN_KEYS.items():
        index = metadata.get(f"tokenizer.ggml.{key}")
        if index is not None and index < len(tokens):
            config[name] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config


def _is_llama3(metadata: Mapping[str, Any]) -> bool:
    return metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")


def _split_rules(pre: str) -> list[Any] | None:
    """Return the pre-tokenizers of a byte-level vocabulary, or None for a rule that is not known here."""
    from tokenizers import Regex, pre_tokenizers

    if pre == "smollm":
        return [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    if pre in ("llama-bpe", "llama3", "llama-v3"):
        split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
        return [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if pre == "gpt-2":
        return [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return None


def _byte_level(metadata: Mapping[str, Any], rules: list[Any]) -> Any:
    """Build a byte-level BPE tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    try:
        tokenizer = Tokenizer(
            # Llama 3 takes a piece that is a token as it is, without asking whether merges lead to it.
            models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=_is_llama3(metadata))
        )
    except Exception as error:  # the tokenizers package raises bare Exception
        raise TokenizerError(f"The tokenizer in the GGUF file is damaged ({error}). Download it again.") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _rules_of_transformers() -> Collection[str]:
    """Return the splitting rules that transformers follows; a rule that it does not know, it leaves out in silence."""
    require("transformers")
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return ()
    return tuple(GGUF_PRE_TOKENIZER_SPLITS)


def _by_transformers(path: Path) -> Any:
    """Let transformers build the tokenizer."""
    transformers = require("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.resolve().parent, gguf_file=path.name)
        return tokenizer.backend_tokenizer
    except Exception as error:  # transformers raises many kinds for files it cannot convert
        raise TokenizerError(
            f"The tokenizer in {path} cannot be converted ({error}). Give planish the original checkpoint."
        ) from error


def _bos_template(metadata: Mapping[str, Any]) -> Any:
    """Return a post-processor that puts the begin token before every text."""
    from tokenizers import processors

    index = metadata["tokenizer.ggml.bos_token_id"]
    token = metadata["tokenizer.ggml.tokens"][index]
    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", f"{token}:1", "$B:1"], special_tokens=[(token, index)]
    )
