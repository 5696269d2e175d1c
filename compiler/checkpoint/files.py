"""Files beside the weights: reading JSON, copying what belongs to the model, and fingerprints."""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from planish.compiler.errors import CheckpointError

__all__ = ["copy_file", "fingerprint_files", "read_json", "remedy_for", "write_json", "write_text"]

#: A fingerprint reads files up to this size whole, and of larger ones a window every stride (all in bytes).
_WHOLE, _WINDOW, _STRIDE = 256 << 20, 64 << 10, 4 << 20
#: How the small text begins that a clone has in the place of a large file until `git lfs pull`.
_LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file is missing, unreadable or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist. Download the checkpoint again, with all its files.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object. Download it again.")
    return content


def remedy_for(path: Path) -> str:
    """Return what to do about a file that is not what its name says."""
    with path.open("rb") as file:
        pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    return f"It is a Git LFS pointer: run git lfs pull in {path.parent}." if pointer else "Download it again."


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, under a temporary name first."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text, under a temporary name first."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8", newline="\n")
    os.replace(partial, path)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content, under a temporary name first."""
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)


def fingerprint_files(paths: Iterable[Path], starts: Mapping[Path, Collection[int]] = MappingProxyType({})) -> str:
    """Return a sha256 (hex) over the names, sizes and contents of files; their folder does not count.

    Files up to 256 MiB count whole, so any change is seen. Of a larger file the first and last 64 KiB count, 64 KiB
    every 4 MiB, and as many from where its tensors start: training, merging or replacing the weights of any tensor is
    seen, a hand edit of single values may not be.

    Args:
        paths: the files.
        starts: where the tensors of some of them start, in bytes.
    """
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _WHOLE:
                while block := file.read(1 << 20):
                    digest.update(block)
            else:
                for start in sorted({*range(0, size - _WINDOW, _STRIDE), size - _WINDOW, *starts.get(path, ())}):
                    file.seek(start)
                    digest.update(file.read(_WINDOW))
    return digest.hexdigest()
