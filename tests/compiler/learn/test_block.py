"""The block in PyTorch against transformers."""

import numpy as np
import pytest
import torch

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.block import Angles, FloatHooks, read_block, run_block
from tests.tiny import VARIANTS, write_tiny


@pytest.mark.parametrize("variant", ["gqa", "mqa", "head_dim", "attention_bias", "mlp_bias", "rope_llama3"])
def test_equals_transformers(variant: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import LlamaForCausalLM

    folder = write_tiny(tmp_path_factory.mktemp(variant) / "tiny", **VARIANTS[variant])
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 272, (2, 40)))
    with torch.no_grad():
        states = LlamaForCausalLM.from_pretrained(folder).model(ids, output_hidden_states=True).hidden_states
    checkpoint = open_checkpoint(folder)
    found = run_block(
        checkpoint.config, FloatHooks(read_block(checkpoint, 0)), states[0], Angles.of(checkpoint.config, 40)
    )
    torch.testing.assert_close(found, states[1], rtol=1e-4, atol=1e-4 * float(states[1].abs().max()))
