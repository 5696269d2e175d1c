"""Find the plugin library, and say in words whether it fits what is asked of it, before TensorRT says it in a code."""

import ctypes
import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from planish.compiler.errors import EngineMismatchError
from planish.plugins.tensorrt.plugins import LAYOUT, PLUGINS

__all__ = ["PLUGINS_VARIABLE", "PluginLibrary", "check_library", "library_path", "read_library"]

#: The environment variable that names the library to build engines with.
PLUGINS_VARIABLE = "PLANISH_PLUGINS"


class PluginLibrary(BaseModel):
    """What a library says of itself.

    Attributes:
        tensorrt: version of the TensorRT headers it was compiled with.
        layout: version of the layouts it reads.
        sms: compute capabilities with kernels, times ten.
        plugins: name -> version.
    """

    model_config = ConfigDict(frozen=True)

    tensorrt: tuple[int, int, int]
    layout: int
    sms: tuple[int, ...]
    plugins: dict[str, str]


def library_path() -> Path | None:
    """Return the library that $PLANISH_PLUGINS names, or None where it names none: then engines have no plugins."""
    named = os.environ.get(PLUGINS_VARIABLE)
    return Path(named) if named else None


def read_library(path: Path) -> PluginLibrary:
    """Load a library and return what it says of itself; needs neither TensorRT nor a GPU.

    Raises:
        EngineMismatchError: if it is missing, cannot be loaded, or is none of planish.
    """
    if not path.is_file():
        raise EngineMismatchError(
            f"The plugin library {path} is missing. Compile it with 'make plugins' and let {PLUGINS_VARIABLE} name it, "
            "or build the engine again without."
        )
    try:
        describe = ctypes.CDLL(str(path)).planish_plugins
    except OSError as error:
        raise EngineMismatchError(
            f"The plugin library {path} cannot be loaded here: {error}. Compile it on this machine with 'make plugins'."
        ) from error
    except AttributeError as error:
        raise EngineMismatchError(
            f"{path} is no plugin library of planish. Let {PLUGINS_VARIABLE} name the one that 'make plugins' compiles."
        ) from error
    describe.restype = ctypes.c_char_p
    try:
        return PluginLibrary.model_validate(json.loads(describe()))
    except (ValueError, ValidationError) as error:
        raise EngineMismatchError(
            f"{path} was compiled by a planish that this one does not understand. Compile it again with 'make plugins'."
        ) from error


def check_library(path: Path, tensorrt: str, sm: int) -> PluginLibrary:
    """Return what a library says of itself if it fits this planish, a TensorRT and a GPU.

    Args:
        path: the library.
        tensorrt: version of the TensorRT that will load it.
        sm: compute capability of the GPU, times ten.

    Raises:
        EngineMismatchError: if it does not fit, or see `read_library`.
    """
    library = read_library(path)
    again = "Compile it again with 'make plugins'"
    built_for = ".".join(map(str, library.tensorrt))
    if library.tensorrt[0] != int(tensorrt.partition(".")[0]):
        raise EngineMismatchError(
            f"The plugin library {path} is for TensorRT {built_for}, and installed is TensorRT {tensorrt}: interfaces "
            f"change with the first number. {again}, TENSORRT_INCLUDE_DIR naming the headers of TensorRT {tensorrt}."
        )
    if library.layout != LAYOUT:
        raise EngineMismatchError(
            f"The plugin library {path} reads weights in layout {library.layout}, and this planish packs layout "
            f"{LAYOUT}. {again} from this planish."
        )
    ours = {contract.name: contract.version for contract in PLUGINS}
    wrong = [
        f"{name} {version} (it has {library.plugins.get(name, 'none')})"
        for name, version in ours.items()
        if library.plugins.get(name) != version
    ]
    if wrong:
        raise EngineMismatchError(
            f"The plugin library {path} is of another version: this planish wants {', '.join(wrong)}. {again} from "
            "this planish."
        )
    if sm not in library.sms:
        raise EngineMismatchError(
            f"The plugin library {path} has kernels for SM {', '.join(map(str, library.sms))}, and the GPU here is an "
            f"SM {sm}. Unset {PLUGINS_VARIABLE} to build the engine without plugins."
        )
    return library
