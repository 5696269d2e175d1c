"""The policy `search`: kinds found by gradient descent, block by block on float inputs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.block import Block
from planish.compiler.learn.gradient.search import Search, Searched, search_block
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.select.float_blocks import visit_float_blocks
from planish.passes.scheme import Scheme

__all__ = ["search_forms"]


def search_forms(
    checkpoint: Checkpoint,
    scheme: Scheme,
    token_ids: npt.NDArray[np.int64],
    folder: Path,
    seed: int,
    progress: Callable[[int, int], None],
    device: torch.device | None = None,
) -> list[Searched]:
    """Return what `search_block` finds at every block; see `visit_float_blocks` for what is kept in `folder`.

    All of it is computed on `device`; None is the CPU.
    """

    def visit(layer: int, block: Block, streams: Streams, outputs: Sequences) -> dict[str, Any]:
        return dataclasses.asdict(search_block(block, streams, outputs, scheme.block(layer), Search(seed=seed)))

    found = visit_float_blocks(checkpoint, token_ids, folder, "search", visit, progress, device)
    return [Searched(**each) for each in found]
