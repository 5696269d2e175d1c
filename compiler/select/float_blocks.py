"""Visit the decoder blocks one after the other on float inputs, keeping on disk what was found at each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.files import write_json
from planish.compiler.learn.block import Angles, Block, read_block
from planish.compiler.learn.flattening import finite_outputs, held_out_sequences, naming_block
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.stream_files import StreamFiles
from planish.compiler.learn.streams import Streams

__all__ = ["visit_float_blocks"]


@torch.no_grad()
def visit_float_blocks(
    checkpoint: Checkpoint,
    token_ids: npt.NDArray[np.int64],
    folder: Path,
    name: str,
    visit: Callable[[Block, Streams, Tensor], Any],
    progress: Callable[[int, int], None],
) -> list[Any]:
    """Return what `visit` finds at every block; a killed run goes on behind the last block that was finished.

    Args:
        checkpoint: the float model.
        token_ids: calibration sequences, int64 [sequences, seq]; an eighth of them is held out.
        folder: keeps <name>-<layer>.json for every block, and the inputs of the newest one in <name>/.
        name: of what is looked for.
        visit: (block, its inputs, its outputs) -> something JSON can hold. Both streams are the float model's.
        progress: (blocks done, blocks in all).

    Raises:
        CalibrationError: if a block's outputs are not finite, or there are too few sequences.
    """
    config, found = checkpoint.config, []
    files = StreamFiles(folder / name, held_out_sequences(len(token_ids)))
    if files.newest() is None:
        table = torch.from_numpy(checkpoint.tensor("model.embed_tokens.weight").astype(np.float32))
        files.begin(token_ids, lambda ids: table[ids])
    angles = Angles.of(config, token_ids.shape[1])
    with fast_products():
        for layer in range(config.num_hidden_layers):
            path = folder / f"{name}-{layer}.json"
            # The streams go on after the findings are kept: a run that was killed between the two does only that.
            if files.newest() == layer:
                block, streams = read_block(checkpoint, layer), files.open(layer)
                outputs = finite_outputs(block, streams, angles, layer)
                if not path.exists():
                    with naming_block(layer):
                        write_json(path, visit(block, streams, outputs))
                files.advance(layer, outputs, lambda x: x)
            found.append(json.loads(path.read_text(encoding="utf-8")))
            progress(layer + 1, config.num_hidden_layers)
    return found
