"""The model that writes calibration text on a GPU gives transformers' logits, token behind token."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from planish.compiler.bundle.float_bundle import export_bundle
from planish.compiler.calibrate.device_session import DeviceSession
from planish.compiler.calibrate.self_text import sample_tokens
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.progress import Silent
from tests.tiny import VARIANTS, write_tiny

CPU = torch.device("cpu")
IDS = np.random.default_rng(2).integers(3, 272, (3, 9))


@pytest.mark.parametrize("variant", ["gqa", "mha", "attention_bias", "mlp_bias", "tied", "rope_llama3"])
def test_logits_behind_a_cache_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path, **VARIANTS[variant])
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(model)(torch.from_numpy(IDS)).logits.numpy()
    session = DeviceSession(open_checkpoint(model), CPU)
    logits, cache = session.run(IDS[:, :4])
    np.testing.assert_allclose(logits, expected[:, :4], atol=1e-4 * np.abs(expected).max())
    for position in range(4, 9):
        logits, cache = session.run(IDS[:, position : position + 1], cache, logits_to_keep=1)
        assert len(cache) == position + 1
        np.testing.assert_allclose(logits[:, 0], expected[:, position], atol=1e-4 * np.abs(expected).max())


def test_it_writes_what_the_export_writes(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", dtype="bfloat16")
    exported = export_bundle(model, tmp_path / "out").session(threads=1)
    session, starts = DeviceSession(open_checkpoint(model), CPU), np.arange(20, 25)[:, None]
    written = [
        sample_tokens(each, starts, 24, [np.random.default_rng(i) for i in range(5)], Silent())
        for each in (session, exported)
    ]
    assert np.array_equal(*written)
    assert session.cache_bytes_per_token == exported.cache_bytes_per_token


def test_weights_are_held_as_they_are_stored(tmp_path: Path) -> None:
    session = DeviceSession(open_checkpoint(write_tiny(tmp_path, dtype="bfloat16")), CPU)
    assert {tensor.dtype for block in session._blocks for tensor in block.values()} == {torch.bfloat16}
    assert (session._table.dtype, session._head.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.gpu
def test_a_gpu_gives_the_logits_of_the_cpu(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    expected, _ = DeviceSession(checkpoint, CPU).run(IDS)
    found, _ = DeviceSession(checkpoint, torch.device("cuda")).run(IDS)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
