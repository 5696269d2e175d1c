"""The float reference gives transformers' logits, from every kind of checkpoint, whole or in pieces."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import TokenizerError
from planish.compiler.measure.reference import Reference
from tests.tiny import VARIANTS, write_tiny

TOKENS = np.random.default_rng(0).integers(3, 260, (3, 24))


@pytest.mark.parametrize("variant", ["gqa", "tied", "head_dim", "attention_bias", "rope_llama3"])
def test_logits_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    folder = write_tiny(tmp_path / variant, dtype="bfloat16", **VARIANTS[variant])
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS)).logits.numpy()
    ours = Reference(open_checkpoint(folder))
    np.testing.assert_allclose(ours.run(TOKENS)[0], expected, atol=1e-5)
    last, _ = ours.run(TOKENS, logits_to_keep=2)
    np.testing.assert_allclose(last, expected[:, -2:], atol=1e-5)


def test_tokens_beyond_the_vocabulary(tmp_path: Path) -> None:
    ours = Reference(open_checkpoint(write_tiny(tmp_path / "model", vocab_size=200)))
    with pytest.raises(TokenizerError, match="gives token 259, and the model has 200"):
        ours.run([[3, 259]])


def test_pieces_padding_and_taken_sequences(tiny: Path) -> None:
    ours = Reference(open_checkpoint(tiny))
    whole, _ = ours.run(TOKENS)
    mask = np.ones((3, 10), np.int64)
    ids = TOKENS[:, :10].copy()
    # The second sequence has 6 tokens and then padding; it goes on at its seventh.
    mask[1, 6:] = 0
    _, cache = ours.run(ids, mask=mask)
    taken = cache.take([1, 0, 1])
    following = np.stack([TOKENS[1, 6:9], TOKENS[0, 10:13], TOKENS[1, 6:9]])
    logits, _ = ours.run(following, taken)
    np.testing.assert_allclose(logits[0], whole[1, 6:9], atol=1e-4)
    np.testing.assert_allclose(logits[1], whole[0, 10:13], atol=1e-4)
    np.testing.assert_allclose(logits[2], logits[0], atol=1e-6)
    again, _ = ours.run(following, taken)
    np.testing.assert_array_equal(again, logits)
