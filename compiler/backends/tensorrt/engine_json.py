"""engine.json: what an engine was built from, with what, and for what."""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from planish.compiler.errors import BundleCorruptError, BundleFormatError

__all__ = [
    "ENGINE_FILE",
    "ENGINE_FORMAT",
    "ENGINE_JSON",
    "EngineRecord",
    "Fallback",
    "FileRecord",
    "InputRecord",
    "OutputRecord",
    "PluginsRecord",
    "record_file",
]

ENGINE_FILE = "model.engine"
ENGINE_JSON = "engine.json"
#: Version of engine.json; raised when older readers would misread it.
ENGINE_FORMAT = 3

_CHUNK = 1 << 20


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """A file beside engine.json: its name, size in bytes and SHA-256."""

    file: str
    bytes: int
    sha256: str


class InputRecord(_Record):
    """An engine input: its dtype as numpy calls it, and the profile that says which shapes it takes.

    `is_shape` marks an input whose value, given on the host, sets a shape; min, opt and max then are values.
    """

    dtype: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]
    is_shape: bool = False


class OutputRecord(_Record):
    """An engine output: its dtype as numpy calls it, and its shape; -1 marks a dimension that follows the inputs."""

    dtype: str
    shape: tuple[int, ...]


class Fallback(_Record):
    """Something that TensorRT holds or computes otherwise than the portable model does."""

    what: str
    instead: str
    why: str


class PluginsRecord(_Record):
    """The plugins that an engine needs, and the library, which lies beside it.

    Attributes:
        library: the file; None where there is no engine yet.
        tensorrt: version of the TensorRT headers it was compiled with, likewise.
        layout: version of the layouts in memory that it reads.
        versions: name -> version of the plugins in the engine.
    """

    library: FileRecord | None
    tensorrt: tuple[int, int, int] | None
    layout: int
    versions: dict[str, str]


class EngineRecord(_Record):
    """The contents of engine.json.

    Attributes:
        format: ENGINE_FORMAT of the writer.
        planish: version of planish.
        flavour: the target, 'rtx' or 'tensorrt'.
        tensorrt: version of the package that built the engine; only the same version loads it. Without an engine,
            the version that the model was lowered for.
        cuda: CUDA major version of that package.
        system: operating system and processor architecture, such as 'Linux x86_64'.
        sms: compute capabilities the engine runs on, times ten.
        engine: the engine; None where the model was lowered for a TensorRT elsewhere, which is to build it.
        onnx: the model it is built from, and the file of its weights.
        inputs: name -> dtype and profile.
        outputs: name -> dtype and shape.
        max_batch: sequences at most.
        max_prompt: new tokens of a call at most.
        max_context: slots of the cache.
        fallbacks: what differs from the portable model, and why.
        build_seconds: what the build took.
        plugins_asked: what was asked for: `auto`, `none` or `require`.
        plugins: what was done: the plugins and their library; None if the engine has none.
    """

    format: int
    planish: str
    flavour: str
    tensorrt: str
    cuda: int | None
    system: str
    sms: tuple[int, ...]
    engine: FileRecord | None
    onnx: tuple[FileRecord, ...]
    inputs: dict[str, InputRecord]
    outputs: dict[str, OutputRecord]
    max_batch: int
    max_prompt: int
    max_context: int
    fallbacks: tuple[Fallback, ...]
    build_seconds: float
    plugins_asked: str = "auto"
    plugins: PluginsRecord | None = None

    @classmethod
    def read(cls, folder: Path) -> "EngineRecord":
        """Read engine.json of `folder`.

        Raises:
            BundleFormatError: if a newer planish wrote it.
            BundleCorruptError: if it is missing or not what planish writes.
        """
        path = folder / ENGINE_JSON
        try:
            text = path.read_text()
        except OSError as error:
            raise BundleCorruptError(f"There is no engine in {folder}: {error}. Compile the bundle again.") from error
        try:
            newest = _FormatOnly.model_validate_json(text)
            if newest.format > ENGINE_FORMAT:
                raise BundleFormatError(
                    f"{path} has format {newest.format}; this planish reads up to {ENGINE_FORMAT}. Upgrade planish."
                )
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise BundleCorruptError(f"{path} is damaged: {error}. Compile the bundle again.") from error

    def write(self, folder: Path) -> None:
        """Write engine.json into `folder`."""
        (folder / ENGINE_JSON).write_text(self.model_dump_json(indent=2) + "\n")


class _FormatOnly(BaseModel):
    format: int


def record_file(path: Path) -> FileRecord:
    """Return the record of a file, reading it once."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return FileRecord(file=path.name, bytes=path.stat().st_size, sha256=digest.hexdigest())
