"""Compile the plugin library with CMake, against the headers of the TensorRT that will load it.

`python -m planish.plugins.tensorrt.build FOLDER` compiles it where $TENSORRT_INCLUDE_DIR is set; `make plugins` does.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from planish.plugins.cuda_build import find_tool
from planish.plugins.native import NativeBuildError

__all__ = ["LIBRARY", "build_plugins", "cuda_headers", "tensorrt_headers"]

#: The file that the build makes.
LIBRARY = "libplanish_plugins.so"

_SOURCES = Path(__file__).parent


def tensorrt_headers() -> Path | None:
    """Return the folder of NvInferRuntime.h that $TENSORRT_INCLUDE_DIR names, or None."""
    folder = os.environ.get("TENSORRT_INCLUDE_DIR")
    return Path(folder) if folder and (Path(folder) / "NvInferRuntime.h").is_file() else None


def cuda_headers() -> Path | None:
    """Return the folder of cuda_runtime_api.h that belongs to the nvcc at hand, or None."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        return None
    # nvcc may be a script that calls another; what it would run has its own folder as TOP.
    told = subprocess.run([str(nvcc), "--dryrun", "-c", "none.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    folder = Path(top[1]).resolve() / "include" if top else None
    return folder if folder and (folder / "cuda_runtime_api.h").is_file() else None


def build_plugins(folder: Path, headers: Path, definitions: Mapping[str, str | Path] | None = None) -> Path:
    """Compile the library into `folder` and return its path.

    Args:
        folder: of the build; made if need be.
        headers: the folder of NvInferRuntime.h.
        definitions: further variables of CMakeLists.txt.

    Raises:
        NativeBuildError: if there is no CMake, or it or a compiler fails.
    """
    cmake = shutil.which("cmake")
    if cmake is None:
        raise NativeBuildError("Compiling the TensorRT plugins needs CMake 3.24, and there is none. Install cmake.")
    given = {"TENSORRT_INCLUDE_DIR": headers, "CMAKE_BUILD_TYPE": "Release", **(definitions or {})}
    options = [f"-D{name}={value}" for name, value in given.items()]
    for command in ([cmake, "-S", str(_SOURCES), "-B", str(folder), *options], [cmake, "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NativeBuildError(f"'{' '.join(command)}' failed.\n{(done.stderr or done.stdout).strip()}")
    return folder / LIBRARY


def main() -> None:
    """Compile the library where there are headers and an nvcc; print what was made, or what is missing."""
    headers, nvcc = tensorrt_headers(), find_tool("nvcc")
    if headers is None or nvcc is None:
        missing = "TENSORRT_INCLUDE_DIR names no headers of TensorRT" if headers is None else "there is no nvcc"
        print(f"plugins: not compiled, {missing}; docs/plugins.md says where to get what they need")
        return
    compiler = {"CMAKE_CUDA_COMPILER": nvcc}
    print(f"plugins: {build_plugins(Path(sys.argv[1]), headers, compiler)} for the TensorRT of {headers}")


if __name__ == "__main__":
    main()
