"""The policy `search`: kinds found by gradient descent, block by block on float inputs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.block import Block
from planish.compiler.learn.search import Search, Searched, search_block
from planish.compiler.learn.streams import Streams
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
) -> list[Searched]:
    """Return what `search_block` finds at every block; see `visit_float_blocks` for what is kept in `folder`."""

    def visit(block: Block, streams: Streams, outputs: Tensor) -> dict[str, Any]:
        return dataclasses.asdict(search_block(block, streams, outputs, scheme, Search(seed=seed)))

    found = visit_float_blocks(checkpoint, token_ids, folder, "search", visit, progress)
    return [Searched(**each) for each in found]
