"""Compile the CUDA kernels with nvcc, for every architecture they are for, into one shared library.

nvcc 13 comes with the CUDA toolkit, or from wheels into any environment; docs/kernels.md names them. Compiling needs no
GPU. `make plugins` runs this module.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from planish.plugins.native import SOURCES, NativeBuildError, host_library

__all__ = ["ARCHITECTURES", "build_cubin", "build_kernels", "find_tool"]

#: Compute capabilities that kernels are compiled for. No PTX goes in: it would be translated anew on every other GPU.
ARCHITECTURES = ("80", "86", "87", "89", "90a", "100a", "120a")
#: The translation units.
UNITS = (
    "arguments",
    "launch",
    "quantize_tokens",
    "small_linear",
    "large_linear",
    "nibble_linear",
    "wgmma_linear",
    "weight_only",
    "kv_arguments",
    "append_kv",
    "attend_kv",
)

#: Major version of CUDA that knows all of `ARCHITECTURES`.
_CUDA = 13
#: IEEE division and square root (nvcc's default, no fast math): codes must be those of the portable op.
_FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings", "--cudart", "static")


def find_tool(name: str) -> Path | None:
    """Return nvcc, cuobjdump or nvdisasm of CUDA 13 from $CUDA_HOME, the path or the wheels of this environment.

    An older one is taken only if there is no other; None is none at all.
    """
    home = os.environ.get("CUDA_HOME")
    wheels = [Path(folder) / "nvidia" / "cu13" / "bin" for folder in sys.path]
    folders = [*([Path(home) / "bin"] if home else []), *map(Path, os.get_exec_path()), *wheels]
    found = [Path(tool) for folder in folders if (tool := shutil.which(name, path=str(folder)))]
    return next((tool for tool in found if _major(tool) >= _CUDA), found[0] if found else None)


def _major(tool: Path) -> int:
    """Return the major version of CUDA that a tool is of; 0 if it does not say."""
    said = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)", said)
    return int(release[1]) if release else 0


def build_kernels(library: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> Path:
    """Compile all kernels for `architectures` into the shared library `library`, and return its path.

    Raises:
        NativeBuildError: if there is no nvcc, or it fails.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures]
    sources = [str(SOURCES / f"{unit}.cu") for unit in UNITS]
    _nvcc(*targets, "-shared", "-Xcompiler", "-fPIC", *sources, "-o", str(library))
    return library


def build_cubin(unit: str, architecture: str, folder: Path) -> Path:
    """Compile one of `UNITS` for one architecture into a cubin in `folder`, and return its path.

    Raises:
        NativeBuildError: if there is no nvcc, or it fails.
    """
    cubin = folder / f"{unit}-{architecture}.cubin"
    _nvcc(f"-arch=sm_{architecture}", "-cubin", str(SOURCES / f"{unit}.cu"), "-o", str(cubin))
    return cubin


def _nvcc(*arguments: str) -> None:
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise NativeBuildError(
            "Compiling the kernels needs nvcc of CUDA 13, and there is none. Install the CUDA toolkit and set "
            "CUDA_HOME, or install the wheels that docs/kernels.md names."
        )
    done = subprocess.run([str(nvcc), *_FLAGS, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        older = f" It is of CUDA {_major(nvcc)}, and {_CUDA} is wanted." if _major(nvcc) < _CUDA else ""
        raise NativeBuildError(
            f"{nvcc} failed on {' '.join(arguments)}.{older}\n{(done.stderr or done.stdout).strip()}"
        )


def main() -> None:
    """Compile the packer, and the kernels where there is an nvcc; print what was made."""
    print(f"packer: {host_library()._name}")
    library = Path(sys.argv[1])
    if find_tool("nvcc") is None:
        print("kernels: not compiled, there is no nvcc; docs/kernels.md says where to get one")
    else:
        print(f"kernels: {build_kernels(library)} for sm_{', sm_'.join(ARCHITECTURES)}")


if __name__ == "__main__":
    main()
