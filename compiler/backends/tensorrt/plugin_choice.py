"""Whether an engine has plugins: what the user asked for, and what is there."""

from pathlib import Path
from typing import Literal, get_args

from planish.compiler.backends.tensorrt.parser_versions import Version, read_version
from planish.compiler.backends.tensorrt.plugin_library import PLUGINS_VARIABLE, check_library, library_path
from planish.compiler.errors import EngineBuildError, EngineMismatchError

__all__ = ["PLUGIN_CHOICES", "PluginChoice", "chosen_library", "plugs_without_library"]

#: `auto`: where a plugin library is named; `none`: not even then; `require`: or there is no engine.
PluginChoice = Literal["auto", "none", "require"]
PLUGIN_CHOICES: tuple[PluginChoice, ...] = get_args(PluginChoice)

#: The first TensorRT in which a plugin may write its cache in place: IPluginV3OneBuildV2 of NvInferRuntime.h.
_FIRST: Version = (10, 3)


def chosen_library(choice: PluginChoice, tensorrt: str, sm: int) -> Path | None:
    """Return the plugin library to build with here, checked; None is none.

    Args:
        choice: what was asked for.
        tensorrt: version of the TensorRT that will load it.
        sm: compute capability of the GPU, times ten.

    Raises:
        EngineMismatchError: if it is required and not named, if it does not fit, or if that TensorRT cannot have it.
    """
    path = None if choice == "none" else library_path()
    if path is not None:
        if read_version(tensorrt) < _FIRST:
            raise EngineMismatchError(
                f"Plugins of planish need TensorRT {_FIRST[0]}.{_FIRST[1]} or later, and {tensorrt} is installed. "
                "Build with --plugins none, or install a later TensorRT."
            )
        check_library(path, tensorrt, sm)
    elif choice == "require":
        raise EngineMismatchError(
            f"Plugins are required, and {PLUGINS_VARIABLE} names no plugin library. Compile one with 'make plugins' "
            f"and let {PLUGINS_VARIABLE} name it, or build with --plugins auto."
        )
    return path


def plugs_without_library(choice: PluginChoice, version: Version) -> bool:
    """Return whether a model that is lowered for a TensorRT elsewhere has plugin nodes: only if they are required.

    Raises:
        EngineBuildError: if they are required, and that TensorRT cannot have them.
    """
    if choice == "require" and version < _FIRST:
        raise EngineBuildError(
            f"Plugins of planish need TensorRT {_FIRST[0]}.{_FIRST[1]} or later, and the model is for "
            f"{version[0]}.{version[1]}. Leave out --plugins, or name a later TensorRT."
        )
    return choice == "require"
