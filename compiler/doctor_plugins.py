"""Whether the native parts are there and fit together: the packer of weights, and the library of GPU kernels."""

import ctypes
import re
from pathlib import Path

import planish.plugins
from planish.plugins.errors import PlanishError
from planish.plugins.native import SOURCES, find_compiler

__all__ = ["kernels_library", "kernels_state", "packer_state"]

#: Where `make plugins` puts the kernels, from the folder that holds the package's own.
_LIBRARY = Path("build") / "plugins" / "libplanish_kernels.so"
#: A function that the C interface declares.
_DECLARED = re.compile(r"^\w[\w *]*?(planish_\w+)\(", re.MULTILINE)


def kernels_library() -> Path:
    """Return where the library of kernels is, or would be."""
    return Path(planish.plugins.__path__[0]).resolve().parent / _LIBRARY


def kernels_state(library: Path) -> tuple[str, str | None]:
    """Return in words what is at `library`, and what to do about it, None if all is well.

    It fits if it loads and exports every function that planish_kernels.h declares.
    """
    if not library.is_file():
        return "not built", f"the GPU kernels are not built: make plugins (needs nvcc of CUDA 13) writes {library}"
    declared = _DECLARED.findall((SOURCES / "planish_kernels.h").read_text(encoding="utf-8"))
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        return f"{library} cannot be loaded", f"{library} cannot be loaded ({error}): build it again with make plugins"
    missing = [name for name in declared if not hasattr(loaded, name)]
    if missing:
        return (
            f"{library} is of another planish",
            f"{library} lacks {', '.join(missing)}, which planish_kernels.h declares: build it again with make plugins",
        )
    return f"{library}, its {len(declared)} functions are those of planish_kernels.h", None


def packer_state() -> tuple[str, str | None]:
    """Return in words what compiles the packer of weights, and what to do if nothing does."""
    try:
        return f"compiled when first needed, by {find_compiler()}", None
    except PlanishError as error:
        return "no C++ compiler", str(error)
