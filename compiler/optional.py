"""Import optional packages when they are first needed, and name the extra that brings a missing one."""

import importlib
from types import ModuleType

from planish.compiler.errors import MissingExtraError

__all__ = ["EXTRA_OF", "require"]

#: Optional package (import name) -> the extra of planish that installs it.
EXTRA_OF = {
    "gguf": "gguf",
    "transformers": "gguf",
    "tensorrt_rtx": "rtx",
    "tensorrt": "tensorrt",
    "onnx_graphsurgeon": "tensorrt",
    "polygraphy": "rtx",
    "lm_eval": "eval",
    "matplotlib": "report",
    "ray": "distributed",
}


def require(name: str) -> ModuleType:
    """Return the module called `name`.

    Raises:
        MissingExtraError: if it is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        extra = EXTRA_OF[name.partition(".")[0]]
        raise MissingExtraError(
            f"The package '{name}' is not installed. Install it with: pip install 'planish[{extra}]'"
        ) from error
