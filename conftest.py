"""What every test runs under: threads, offline mode, and which tests this machine cannot run.

It stands at the top, not in tests/, because the tests of the passes lie beside the passes.
"""

import importlib.util
import os

import pytest

from tests.gpu_here import gpu_is_here

# The environment is set on import, before any test imports torch or tokenizers, which read it once.
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; a thread pool per worker would only make them wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test reaches the network unless `make test-hub` says so.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs a device or a package that is not here."""
    lacks = {}
    if not gpu_is_here():
        if config.option.markexpr == "gpu":
            raise pytest.UsageError("these tests run on an NVIDIA GPU, and this machine has none")
        lacks["gpu"] = pytest.mark.skip(reason="no NVIDIA GPU on this machine")
    if importlib.util.find_spec("tensorrt_rtx") is None:
        lacks["trt"] = pytest.mark.skip(reason="tensorrt_rtx is not installed (extra 'rtx')")
    for item in items:
        for marker, skip in lacks.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)
