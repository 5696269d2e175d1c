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
    "pyarrow": "datasets",
    "lm_eval": "eval",
}


def require(name: str) -> ModuleType:
    """Return the module called `name`, which may be part of a package: `pyarrow.parquet`.

    Raises:
        MissingExtraError: if it is not installed; the message names the extra to install.
    """
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(
            f"The package '{package}' is not installed. Install it with: pip install 'planish[{EXTRA_OF[package]}]'"
        ) from error
