"""What TensorRT measured in earlier builds: kept in the cache folder, so that the next build measures less."""

import os
import tempfile
from pathlib import Path
from typing import Any

from planish.plugins.native import cache_folder

__all__ = ["keep_timings", "timing_cache"]


def timing_cache(tensorrt: str, sm: int) -> Path:
    """Return the file for a version of TensorRT and a GPU; measurements hold for no other."""
    return cache_folder() / f"tensorrt-{tensorrt}-sm{sm}.timings"


def keep_timings(config: Any, path: Path) -> None:
    """Write the timing cache of an IBuilderConfig, which holds what it was given and what this build added."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two builds may end at once: each writes a file of its own, and the last renaming wins.
    handle, unfinished = tempfile.mkstemp(suffix=".part", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(memoryview(cache.serialize()))
    os.replace(unfinished, path)
