"""Fit transforms to the float model in a walk of their own, so that numbers of channels can be chosen behind them.

How many channels are high is one decision for all blocks, and it needs transforms at all of them, before any block is
flattened. These serve that decision alone. A block is flattened with transforms fitted to what the quantised blocks in
front of it give, which is what it will see.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.block import Angles, Block
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.learn.transforms.site_factors import fit_factors
from planish.compiler.progress import Progress
from planish.compiler.select.float_blocks import visit_float_blocks
from planish.compiler.select.plan_file import load_transforms, save_transforms, site_widths
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, LayerTransforms, Site, Transforms

__all__ = ["fit_transforms"]


def fit_transforms(
    checkpoint: Checkpoint,
    scheme: Scheme,
    forms: Sequence[dict[Site, Form]],
    token_ids: npt.NDArray[np.int64],
    folder: Path,
    progress: Progress,
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[Transforms, list[dict[str, float]]]:
    """Return the transforms of every block, without clips, and by block what was measured for the form `smooth`.

    A killed run goes on behind the last block; see `visit_float_blocks`.

    Args:
        checkpoint: the float model.
        scheme: what will be rounded to.
        forms: by site, for every block.
        token_ids: calibration sequences, int64 [sequences, seq].
        folder: keeps what is made.
        progress: is told how far the run is.
        seed: of the rotations.
        device: where a block and a batch are; None is the CPU.

    Raises:
        CalibrationError: if there are too few sequences, or what flows through a block is not finite.
    """
    angles, widths = Angles.of(checkpoint.config, token_ids.shape[1], device), site_widths(checkpoint.config)

    def visit(layer: int, block: Block, streams: Streams, outputs: Sequences) -> Any:
        factors, scales = fit_factors(block, streams, outputs, angles, scheme.block(layer), forms[layer], seed + layer)
        stored = {site: factors[site].stored(widths[site]) for site in SITES}
        kept = folder / f"fitted-{layer}"
        kept.mkdir(exist_ok=True)
        save_transforms(Transforms((LayerTransforms(**stored, clips={}, high={}),)), kept)
        return scales

    measured = visit_float_blocks(
        checkpoint,
        token_ids,
        folder,
        "fitted",
        visit,
        lambda done, total: progress.step("fit transforms", done, total),
        device,
    )
    one = checkpoint.config.with_num_layers(1)
    layers = (load_transforms(folder / f"fitted-{layer}", one).layers[0] for layer in range(len(measured)))
    return Transforms(tuple(layers)), measured
