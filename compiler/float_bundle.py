"""A float export as a bundle, so that whatever takes a bundle takes it too."""

import shutil
from importlib.metadata import version
from pathlib import Path

from planish.compiler.bundle import Bundle
from planish.compiler.export import export_float
from planish.compiler.layout import RECIPE_FILE
from planish.compiler.manifest import Manifest
from planish.compiler.pipeline import open_source
from planish.compiler.progress import Progress, Silent
from planish.compiler.recipe import Recipe
from planish.compiler.work_folder import check_output, check_space, raise_disk_full

__all__ = ["export_bundle"]

_FLOAT = "w16a16k16v16"


def export_bundle(
    model: str | Path, out: str | Path, *, num_layers: int | None = None, progress: Progress | None = None
) -> Bundle:
    """Export a checkpoint in float32 to a bundle that holds the portable model alone.

    Args:
        model: a checkpoint folder, a GGUF file, a Hub id, or `smollm2`.
        out: the output folder, new or empty.
        num_layers: keep only this many of the first decoder blocks; None keeps all.
        progress: is told how far the run is.

    Raises:
        PlanishError: one of its subclasses in `planish.compiler.errors`.
    """
    out, progress = Path(out), progress or Silent()
    check_output(out)
    recipe = Recipe.read(model=str(model), scheme=_FLOAT, num_layers=num_layers).repeatable()
    checkpoint = open_source(recipe)
    checkpoint.check_tokenizer()
    unfinished = out.with_name(out.name + ".partial")
"""Placeholder."""
