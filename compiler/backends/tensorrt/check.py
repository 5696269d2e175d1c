"""Say in words whether an engine can be loaded here, before TensorRT says it in a code."""

from pathlib import Path

from planish.compiler.backends.tensorrt.device import Device, first_device
from planish.compiler.backends.tensorrt.engine_json import EngineRecord, FileRecord, PluginsRecord, record_file
from planish.compiler.backends.tensorrt.flavour import FLAVOURS, flavour_of
from planish.compiler.backends.tensorrt.plugin_library import check_library
from planish.compiler.errors import BundleCorruptError, EngineMismatchError

__all__ = ["check_engine"]


def check_engine(folder: Path, flavour: str) -> EngineRecord:
    """Return the record of the engine in `folder` if this machine can load it with `flavour`.

    Raises:
        BundleFormatError: if a newer planish wrote it.
        BundleCorruptError: if a file is missing or changed.
        MissingExtraError: if the package of `flavour` is not installed.
        EngineMismatchError: if it was built by another package or version, or for other GPUs than the one here; or if
            it is still to be built.
    """
    wanted = flavour_of(flavour)
    record = EngineRecord.read(folder)
    if record.engine is None:
        raise EngineMismatchError(
            f"{folder} holds a model for TensorRT {record.tensorrt}, and no engine is built of it yet: it was lowered "
            "with --tensorrt-version. docs/deploy.md says how to build one where it is to run; for the TensorRT that "
            "is installed here, build the target again without --tensorrt-version."
        )
    built_by = FLAVOURS[record.flavour].title if record.flavour in FLAVOURS else record.flavour
    built = f"This engine was built for SM {_list(record.sms)} with {built_by} {record.tensorrt}"
    again = f"Compile the bundle again with --target {flavour}"
    if record.flavour != flavour:
        raise EngineMismatchError(f"{built}, not with {wanted.title}. {again}.")
    installed = str(wanted.load().__version__)
    if installed != record.tensorrt:
        raise EngineMismatchError(
            f"{built}; installed is {wanted.title} {installed}, and engines load only in the version that built "
            f"them. {again}, or install {wanted.title} {record.tensorrt}."
        )
    try:
        device = first_device()
    except EngineMismatchError as error:
        raise EngineMismatchError(f"{built}. {error}") from error
    _check_device(record, device, built, again)
    _check_file(folder, record.engine)
    if record.plugins is not None:
        _check_plugins(folder, record.plugins, installed, device)
    return record


def _check_device(record: EngineRecord, device: Device, built: str, again: str) -> None:
    if device.sm not in record.sms:
        raise EngineMismatchError(
            f"{built}; this machine has a {device.name}, SM {device.sm}. {again} on this machine."
        )
    if record.cuda is not None and device.cuda < record.cuda:
        raise EngineMismatchError(
            f"{built} for CUDA {record.cuda}; the driver of the {device.name} here goes up to CUDA {device.cuda}. "
            "Upgrade the NVIDIA driver."
        )


def _check_plugins(folder: Path, record: PluginsRecord, installed: str, device: Device) -> None:
    assert record.library is not None, "an engine with plugins has their library beside it"
    _check_file(folder, record.library)
    path = folder / record.library.file
    has = check_library(path, installed, device.sm).plugins
    wrong = [f"{name} {version}" for name, version in record.versions.items() if has.get(name) != version]
    if wrong:
        raise EngineMismatchError(
            f"The engine needs the plugins {', '.join(wrong)}, which this planish has in other versions. Compile the "
            "bundle again with --target tensorrt."
        )


def _check_file(folder: Path, record: FileRecord) -> None:
    path = folder / record.file
    if not path.is_file():
        raise BundleCorruptError(f"{path} is missing. Compile the bundle again.")
    if record_file(path) != record:
        raise BundleCorruptError(f"{path} is not the file that engine.json describes. Compile the bundle again.")


def _list(sms: tuple[int, ...]) -> str:
    return ", ".join(map(str, sms))
