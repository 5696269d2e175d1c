"""A checkpoint on the Hugging Face Hub: downloaded into the Hub's own cache, then opened as a folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from planish.compiler.checkpoint.base import Checkpoint
from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.checkpoint.files import read_json
from planish.compiler.checkpoint.folder import FolderCheckpoint
from planish.compiler.checkpoint.sidecars import PATTERNS
from planish.compiler.errors import CheckpointError

__all__ = ["hub_config", "open_hub"]


def open_hub(repository: str) -> Checkpoint:
    """Download `repository` (org/name) unless it is cached, and open it.

    Raises:
        CheckpointError: if it does not exist, is not open to this user, or the Hub cannot be reached.
    """
    # Imported here because it pulls in an HTTP client, which nothing else needs.
    from huggingface_hub import snapshot_download

    with _clear_errors(repository):
        folder = snapshot_download(
            repository, allow_patterns=["model*.safetensors", "model.safetensors.index.json", *PATTERNS]
        )
    if not any(Path(folder).glob("*.safetensors")):
        raise CheckpointError(
            f"{repository} has no safetensors files. Load the model with transformers, save it with save_pretrained, "
            "which writes them, and give the folder."
        )
    return FolderCheckpoint(Path(folder), name=repository)


def hub_config(repository: str) -> LlamaConfig:
    """Download only the config.json of `repository` (org/name), and read it.

    Raises:
        CheckpointError: as `open_hub`.
        UnsupportedModelError: if the model is something planish does not compile.
    """
    from huggingface_hub import hf_hub_download

    with _clear_errors(repository):
        path = hf_hub_download(repository, "config.json")
    return LlamaConfig.from_dict(read_json(Path(path)))


@contextlib.contextmanager
def _clear_errors(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"The Hub model {repository} is gated. Accept its licence on its page and log in: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"The Hub has no model {repository}, or it is private. Check the spelling, or log in: hf auth login"
        ) from error
    except (EntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{repository} is no folder here, and as a Hub id it cannot be downloaded ({error}). "
            "Connect to the network, or download it elsewhere and give the folder."
        ) from error
