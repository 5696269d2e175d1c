"""Compile the C++ of planish where it is needed, once, into a cache folder.

What runs on the host (packing weights for kernels) has no build step at installation: the first call compiles it with
the C++ compiler at hand, in a second or two, and later calls of any process load the result. The file's name holds a
hash of all that went into it, so an edited source or another compiler makes another file, and nothing is ever stale.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from planish.plugins.errors import PlanishError

__all__ = ["SOURCES", "NativeBuildError", "build_library", "cache_folder", "find_compiler", "host_library"]

#: The folder of the C++ and CUDA sources.
SOURCES = Path(__file__).parent / "cuda"

_COMPILERS = ("c++", "g++", "clang++")
#: No -march: the cache folder may be shared by machines of different age.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")


class NativeBuildError(PlanishError):
    """C++ or CUDA sources of planish could not be compiled."""

    exit_code = 29


def cache_folder() -> Path:
    """Return the folder for compiled files: `planish` below $XDG_CACHE_HOME, or below ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "planish"


def find_compiler() -> str:
    """Return the C++ compiler: $CXX, or the first of c++, g++ and clang++ on the path.

    Raises:
        NativeBuildError: if there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    tried = f"CXX names '{wanted}', which is no program" if wanted else f"none of {', '.join(_COMPILERS)} is there"
    raise NativeBuildError(
        f"Packing weights for GPU kernels needs a C++17 compiler, and {tried}. Install g++ or clang, or set CXX."
    )


def build_library(source: Path, folder: Path | None = None) -> Path:
    """Compile one C++ source, which may include the headers of `SOURCES`, into a shared library, and return its path.

    Args:
        source: the .cpp file.
        folder: where the library goes; None is `cache_folder()`.

    Raises:
        NativeBuildError: if there is no compiler, it fails, or the folder cannot be written.
    """
    compiler = find_compiler()
    folder = folder or cache_folder()
    library = folder / f"{source.stem}-{_fingerprint(source, compiler)}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Two processes may compile at once: each writes a file of its own, and the last renaming wins.
        handle, unfinished = tempfile.mkstemp(suffix=".part", dir=folder)
    except OSError as error:
        raise NativeBuildError(
            f"Compiled code goes into {folder}, which cannot be written: {error.strerror}. Set XDG_CACHE_HOME."
        ) from error
    os.close(handle)
    command = [compiler, *_FLAGS, f"-I{SOURCES}", str(source), "-o", unfinished]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        Path(unfinished).unlink()
        raise NativeBuildError(f"'{' '.join(command)}' failed. It needs a C++17 compiler.\n{done.stderr.strip()}")
    os.chmod(unfinished, 0o755)
    os.replace(unfinished, library)
    return library


@functools.cache
def host_library() -> ctypes.CDLL:
    """Return the library of cuda/host_library.cpp, compiled on the first call.

    Raises:
        NativeBuildError: if it cannot be compiled.
    """
    library = ctypes.CDLL(str(build_library(SOURCES / "host_library.cpp")))
    size, bits, array = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    for name, arguments, result in (
        ("planish_matrix_words", (size, size, bits), size),
        ("planish_padded_channels", (size, bits), size),
        ("planish_pack_weight", (array, size, size, bits, array, array), None),
        ("planish_unpack_weight", (array, size, size, bits, array), None),
    ):
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library


def _fingerprint(source: Path, compiler: str) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    for part in (version, " ".join(_FLAGS).encode(), *(path.read_bytes() for path in [source, *_included()])):
        digest.update(part + b"\0")
    return digest.hexdigest()[:16]


def _included() -> list[Path]:
    """Return what a source may include: headers, and units that are no more than C++."""
    return sorted(path for pattern in ("*.cuh", "*.h", "*.cu") for path in SOURCES.glob(pattern))
