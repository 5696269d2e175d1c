"""What a compile of a named model would take on this machine, and whether the machine has it."""

import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.checkpoint.files import read_json
from planish.compiler.checkpoint.hub import hub_config
from planish.compiler.pipeline.estimate import Work, estimate
from planish.compiler.pipeline.recipe import Recipe
from planish.compiler.report.words import size
from planish.compiler.select.overrides import override_scheme, resolve_overrides

__all__ = ["forecast"]

#: Side of the matrices, and seconds, of the product that is timed.
_SIDE, _TIMED = 1024, 0.3


def forecast(recipe: Recipe, folder: Path = Path()) -> dict[str, Any]:
    """Return what a compile of `recipe` into `folder` takes, and what is missing for it.

    Of a model on the Hub only the config is downloaded. `sizes`, `bundle`, `disk` and `memory` are bytes, `seconds` is
    for the processor; `disk_free` and `memory_total` are what there is; `lacks` says in a sentence each what is too
    little.

    Raises:
        CheckpointError: if there is no such model, or its config cannot be read.
        PlanishError: whatever else is wrong with the recipe; see `Recipe`.
    """
    scheme, config = recipe.parsed_scheme(), _config(recipe.model)
    if recipe.num_layers is not None:
        config = config.with_num_layers(recipe.num_layers)
    # Overrides of transforms alone name sites too, and are checked with the others.
    scheme = override_scheme(scheme, resolve_overrides(recipe.overrides, config.num_hidden_layers))
    found = estimate(config, scheme, Work.of(recipe, config))
    free, memory = shutil.disk_usage(folder).free, psutil.virtual_memory().total
    lacks = []
    if free < found.disk:
        lacks.append(f"The disk has {size(free)} free, and the compile needs about {size(found.disk)}.")
    if memory < found.memory:
        lacks.append(f"This machine has {size(memory)} of memory, and the compile needs about {size(found.memory)}.")
    return {
        "model": recipe.model,
        "scheme": str(scheme),
        "select": recipe.select,
        "targets": list(recipe.targets),
        "sizes": found.sizes,
        "bundle": found.bundle,
        "disk": found.disk,
        "disk_free": free,
        "memory": found.memory,
        "memory_total": memory,
        "seconds": round(found.seconds(_speed())),
        "lacks": lacks,
    }


def _config(model: str) -> LlamaConfig:
    path = Path(model)
    if path.is_dir():
        return LlamaConfig.from_dict(read_json(path / "config.json"))
    if path.exists() or path.suffix == ".gguf" or model.count("/") != 1:
        return open_checkpoint(model).config
    return hub_config(model)


def _speed() -> float:
    """Return how many FLOPs per second a large float32 product runs at, at its best in a third of a second."""
    a, b = (torch.rand(_SIDE, _SIDE) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + _TIMED
    while (started := time.perf_counter()) < end:
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * _SIDE**3 / best
