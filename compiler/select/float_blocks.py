"""Visit the decoder blocks one after the other on float inputs, keeping on disk what was found at each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.files import write_json
from planish.compiler.learn.block import Angles, Block, read_block
from planish.compiler.learn.flattening import embedding, finite_outputs, held_out_sequences, naming_block
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.stream_files import StreamFiles
from planish.compiler.learn.streams import Sequences, Streams

__all__ = ["visit_float_blocks"]


@torch.no_grad()
def visit_float_blocks(
    checkpoint: Checkpoint,
    token_ids: npt.NDArray[np.int64],
    folder: Path,
    name: str,
    visit: Callable[[int, Block, Streams, Sequences], Any],
    progress: Callable[[int, int], None],
    device: torch.device | None = None,
) -> list[Any]:
    """Return what `visit` finds at every block; a killed run goes on behind the last block that was finished.

    Args:
        checkpoint: the float model.
        token_ids: calibration sequences, int64 [sequences, seq]; an eighth of them is held out.
        folder: keeps <name>-<layer>.json for every block, and the inputs of the newest one in <name>/.
        name: of what is looked for.
        visit: (number of the block, block, inputs, outputs) -> something JSON can hold. Both streams are the float
            model's.
        progress: (blocks done, blocks in all).
        device: where a block and its inputs are; None is the CPU.

    Raises:
        CalibrationError: if a block's outputs are not finite, or there are too few sequences.
    """
    config, found = checkpoint.config, []
    files = StreamFiles(folder / name, held_out_sequences(len(token_ids)), device)
    if files.newest() is None:
        files.begin(token_ids, embedding(checkpoint))
    angles = Angles.of(config, token_ids.shape[1], device)
    with fast_products():
        for layer in range(config.num_hidden_layers):
            path = folder / f"{name}-{layer}.json"
            # The streams go on after the findings are kept: a run that was killed between the two does only that.
            if files.newest() == layer:
                block, streams = read_block(checkpoint, layer).to(device), files.open_float(layer)
                outputs = finite_outputs(block, files, angles, layer)
                if not path.exists():
                    with naming_block(layer):
                        write_json(path, visit(layer, block, streams, outputs))
                files.advance(layer)
            found.append(json.loads(path.read_text(encoding="utf-8")))
            progress(layer + 1, config.num_hidden_layers)
    return found
