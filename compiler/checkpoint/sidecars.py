"""The files beside the weights that make a model usable: configuration, tokenizer, chat template."""

import tempfile
from pathlib import Path

from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.checkpoint.files import copy_file, read_json, remedy_for
from planish.compiler.errors import CheckpointError, TokenizerError
from planish.compiler.optional import require

__all__ = ["PATTERNS", "check_tokenizer_files", "copy_sidecars", "end_tokens", "sidecar_files"]

#: What belongs to the model besides its weights, as glob patterns.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)

#: Any of these is a tokenizer; the first is what the runtime reads, the others are converted to it.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def sidecar_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint folder that are copied into a bundle, by name."""
    return sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})


def check_tokenizer_files(folder: Path) -> None:
    """Check that `folder` holds a readable tokenizer.json, or a file from which one can be made.

    Raises:
        TokenizerError: if not.
    """
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise TokenizerError(
            f"{folder} holds no tokenizer (none of {', '.join(_TOKENIZERS)}). "
            "Copy the tokenizer files of the model there."
        )
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers package raises bare Exception
        raise TokenizerError(f"{path} cannot be read ({error}). {remedy_for(path)}") from error


def copy_sidecars(source: Path, target: Path) -> None:
    """Copy the sidecars of a checkpoint folder; make a tokenizer.json if there is only an older format.

    Raises:
        TokenizerError: if there is no tokenizer, or it cannot be read.
        MissingExtraError: if converting needs transformers and it is not installed.
        CheckpointError: if generation_config.json cannot be read.
    """
    check_tokenizer_files(source)
    _generation_end_tokens(source)
    target.mkdir(parents=True, exist_ok=True)
    for path in sidecar_files(source):
        copy_file(path, target / path.name)
    if not (source / "tokenizer.json").is_file():
        _convert_tokenizer(source, target / "tokenizer.json")


def end_tokens(folder: Path, config: LlamaConfig) -> tuple[int, ...]:
    """Return the tokens that end a text: those of generation_config.json in `folder`, else those of config.json."""
    generation = _generation_end_tokens(folder)
    return config.eos_token_ids if generation is None else generation


def _generation_end_tokens(folder: Path) -> tuple[int, ...] | None:
    """Return the end tokens of generation_config.json; None where it names none.

    Raises:
        CheckpointError: if it cannot be read, or names what is no token.
    """
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.is_file() else None
    if eos is None:
        return None
    tokens = eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int for token in tokens):
        raise CheckpointError(
            f"'eos_token_id' in {path} is {eos!r}, and should be the number of a token, or a list of numbers. "
            "Correct it, or download it again."
        )
    return tuple(tokens)


def _convert_tokenizer(source: Path, target: Path) -> None:
    """Write `target` (tokenizer.json) from a SentencePiece or vocab/merges tokenizer in `source`."""
    transformers = require("transformers")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            transformers.AutoTokenizer.from_pretrained(source).save_pretrained(scratch)
            copy_file(Path(scratch) / "tokenizer.json", target)
        except Exception as error:  # transformers raises many kinds for files it cannot convert
            raise TokenizerError(
                f"The tokenizer in {source} cannot be converted to tokenizer.json ({error}). "
                "Convert it with transformers and put tokenizer.json beside it."
            ) from error
