"""Say what this machine has: versions, the processor's integer instructions, GPU, native parts, and missing extras."""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from planish.compiler.doctor_plugins import kernels_library, kernels_state, packer_state
from planish.compiler.optional import EXTRA_OF
from planish.compiler.runtime.processor import PRODUCTS_WITHOUT_SATURATION, cpu_flags

__all__ = ["diagnose"]

#: Distributions whose versions decide what works.
_PACKAGES = (
    "planish",
    "onnxruntime",
    "onnx",
    "onnx-ir",
    "numpy",
    "torch",
    "tokenizers",
    "matplotlib",
    "tensorrt-rtx-cu13",
    "tensorrt",
)

#: Processor flags (as Linux spells them) that decide how fast integer products are.
_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")


def diagnose(folder: Path = Path()) -> dict[str, Any]:
    """Return what `planish doctor` prints; the disk is that of `folder`.

    `advice` lists what would make things faster or possible, each as a sentence.
    """
    flags = [flag for flag in _FLAGS if flag in cpu_flags()]
    missing = _missing_extras()
    parts = {"packer": packer_state(), "kernels": kernels_state(kernels_library())}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": {"cores": psutil.cpu_count(logical=False), "threads": psutil.cpu_count(), "flags": flags},
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": _gpus(),
        "plugins": {name: state for name, (state, _) in parts.items()},
        "disk_free_gb": round(shutil.disk_usage(folder).free / 1e9, 1),
        "missing_extras": missing,
        "advice": _advice(flags, missing) + [todo for _, todo in parts.values() if todo is not None],
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    """Return the GPUs that nvidia-smi lists, with the generation and the driver of each; none without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return []
    rows = (line.split(", ") for line in done.stdout.splitlines())
    return [f"{name}, SM {sm.replace('.', '')}, driver {driver}" for name, sm, driver in rows]


def _missing_extras() -> dict[str, list[str]]:
    """Return extra -> the packages of it that are not installed."""
    missing: dict[str, list[str]] = {}
    for package, extra in EXTRA_OF.items():
        if find_spec(package) is None:
            missing.setdefault(extra, []).append(package)
    return missing


def _advice(flags: list[str], missing: dict[str, list[str]]) -> list[str]:
    advice = [
        f"extra '{extra}' is not complete ({', '.join(packages)}): pip install 'planish[{extra}]'"
        for extra, packages in missing.items()
    ]
    if platform.machine() == "x86_64" and not PRODUCTS_WITHOUT_SATURATION & set(flags):
        advice.append("this processor has no VNNI: integer products run, but not faster than floating point")
    return advice
