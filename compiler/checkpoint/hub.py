"""A checkpoint on the Hugging Face Hub: downloaded into the Hub's own cache, then opened as a folder."""

from pathlib import Path

from planish.compiler.checkpoint.base import Checkpoint
from planish.compiler.checkpoint.folder import FolderCheckpoint
from planish.compiler.checkpoint.sidecars import PATTERNS
from planish.compiler.errors import CheckpointError

__all__ = ["open_hub"]


def open_hub(repository: str) -> Checkpoint:
    """Download `repository` (org/name) unless it is cached, and open it.

    Raises:
        CheckpointError: if it does not exist, is not open to this user, or the Hub cannot be reached.
    """
    # Imported here because it pulls in an HTTP client, which nothing else needs.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(
            repository, allow_patterns=["model*.safetensors", "model.safetensors.index.json", *PATTERNS]
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"The Hub model {repository} is gated. Accept its licence on its page and log in: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"The Hub has no model {repository}, or it is private. Check the spelling, or log in: hf auth login"
        ) from error
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{repository} is no folder here, and as a Hub id it cannot be downloaded ({error}). "
            "Connect to the network, or download it elsewhere and give the folder."
        ) from error
    return FolderCheckpoint(Path(folder), name=repository)
