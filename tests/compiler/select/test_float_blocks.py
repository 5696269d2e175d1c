"""The walk over float blocks gives each of them what the float model gives it, as transformers has it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.block import Block
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.select.float_blocks import visit_float_blocks
from tests.tiny import write_tiny

IDS = np.random.default_rng(3).integers(3, 272, (8, 16))


@pytest.mark.parametrize("killed_at", [None, 1])
def test_both_streams_are_the_float_models(killed_at: int | None, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = write_tiny(tmp_path / "tiny", num_hidden_layers=3)
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(model)(torch.from_numpy(IDS), output_hidden_states=True)
    states, visited, killed = found.hidden_states, [], killed_at

    def visit(layer: int, _: Block, streams: Streams, outputs: Sequences) -> Any:
        nonlocal killed
        if layer == killed:
            killed = None
            raise KeyboardInterrupt
        assert streams.held_out == 1
        for stream in (streams.target, streams.seen):
            torch.testing.assert_close(stream[0:8], states[layer], rtol=1e-4, atol=1e-5)
        # The last of transformers' states is behind the norm.
        if layer < 2:
            torch.testing.assert_close(outputs[0:8], states[layer + 1], rtol=1e-4, atol=1e-5)
        visited.append(layer)
        return {"layer": layer}

    def walk() -> list[Any]:
        return visit_float_blocks(open_checkpoint(model), IDS, tmp_path / "work", "walk", visit, lambda *_: None)

    if killed_at is not None:
        with pytest.raises(KeyboardInterrupt):
            walk()
    assert walk() == [{"layer": layer} for layer in range(3)]
    assert visited == [0, 1, 2]
