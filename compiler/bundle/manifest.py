"""planish.json: what a bundle is, and the size and hash of each of its files."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from planish.compiler.bundle.layout import MANIFEST_FILE
from planish.compiler.checkpoint.files import write_json
from planish.compiler.errors import BundleCorruptError, BundleFormatError

__all__ = ["FORMAT_VERSION", "FileRecord", "Manifest"]

#: Raised whenever an older planish could misread a bundle.
FORMAT_VERSION = 1

_AGAIN = "Compile the model again, or copy the bundle again from where it came."


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the sha256 (hex) of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Read `path` and describe it."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What planish.json says.

    Attributes:
        planish_version: the planish that wrote the bundle.
        model: the name of the model.
        checkpoint: the fingerprint of the checkpoint it was made from.
        scheme: the scheme, such as w4a4k4v4.
        lm_head: the format of the output projection, such as w8a8.
        targets: what the model was lowered to; each is a folder below engines/.
        max_context: the longest context, in tokens.
        files: path relative to the bundle -> its record, for every other file that planish wrote.
    """

    planish_version: str
    model: str
    checkpoint: str
    scheme: str
    lm_head: str
    targets: tuple[str, ...]
    max_context: int
    files: dict[str, FileRecord] = dataclasses.field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Hash every file below `folder`, which holds only what planish wrote, and write planish.json there."""
        paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
        dataclasses.replace(self, files={}).recording(folder, paths).write_records(folder)

    def recording(self, folder: Path, paths: Iterable[Path]) -> "Manifest":
        """Return this manifest with records of `paths`, files below the bundle `folder`, beside those it has."""
        made = {path.relative_to(folder).as_posix(): FileRecord.of(path) for path in paths}
        return dataclasses.replace(self, files=dict(sorted({**self.files, **made}.items())))

    def write_records(self, folder: Path) -> None:
        """Write planish.json to `folder` with the records as they are."""
        write_json(folder / MANIFEST_FILE, {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read planish.json in `folder`.

        Raises:
            BundleFormatError: if it was written in a newer format.
            BundleCorruptError: if it cannot be read.
        """
        path = folder / MANIFEST_FILE
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version = int(content.pop("format_version"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise BundleCorruptError(f"{path} cannot be read ({type(error).__name__}: {error}). {_AGAIN}") from error
        if version > FORMAT_VERSION:
            raise BundleFormatError(
                f"{folder} has bundle format {version}, written by planish {content.get('planish_version', '?')}; this "
                f"planish reads formats up to {FORMAT_VERSION}. Upgrade it: pip install --upgrade planish"
            )
        try:
            files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
            return cls(targets=tuple(content.pop("targets")), files=files, **content)
        except (TypeError, KeyError, AttributeError) as error:
            raise BundleCorruptError(f"{path} is damaged ({error}). {_AGAIN}") from error

    def verify(self, folder: Path) -> None:
        """Check that every file is there and has its recorded size and hash.

        Raises:
            BundleCorruptError: naming the first file that is missing or differs.
        """
        for name, recorded in self.files.items():
            path = folder / name
            if not path.is_file():
                raise BundleCorruptError(f"{folder} lacks {name}, which its {MANIFEST_FILE} lists. {_AGAIN}")
            size = path.stat().st_size
            if size != recorded.size:
                raise BundleCorruptError(f"{path} has {size} bytes instead of {recorded.size}. {_AGAIN}")
            if FileRecord.of(path) != recorded:
                raise BundleCorruptError(f"{path} is not the file that was compiled: its sha256 differs. {_AGAIN}")
