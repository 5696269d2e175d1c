"""The rotated checkpoint: transformers computes the same with it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.transforms.rotated import RotatedCheckpoint
from tests.tiny import VARIANTS, write_tiny


@pytest.mark.parametrize("variant", ["gqa", "attention_bias", "mlp_bias", "tied", "untied", "head_dim"])
def test_transformers_computes_the_same(variant: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, **VARIANTS[variant])
    original = open_checkpoint(folder)
    rotated = RotatedCheckpoint(original, seed=3)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    turned = LlamaForCausalLM(LlamaConfig(**rotated.raw_config)).eval()
    turned.load_state_dict({name: torch.from_numpy(rotated.tensor(name)).float() for name in rotated.names()})
    ids = torch.randint(3, 272, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(ids).logits, turned(ids).logits
    # Embeddings are rounded to float16 twice.
    assert float((found - expected).abs().max() / (expected.max() - expected.min())) < 2e-3
    assert rotated.fingerprint() == original.fingerprint()
    embedded = original.tensor("model.embed_tokens.weight").astype(np.float64)
    assert not np.allclose(rotated.tensor("model.embed_tokens.weight"), embedded, atol=1e-2)
    assert all(np.all(rotated.tensor(name) == 1) for name in rotated.names() if "norm" in name)
