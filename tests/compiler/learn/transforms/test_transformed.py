"""A folded checkpoint, with its online factors, computes in floating point what transformers does with the original."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.transforms.transformed import TransformedCheckpoint
from planish.compiler.quantize.arithmetic import QuantizedWeight
from planish.compiler.verify.oracle import Oracle
from planish.passes.scheme import Scheme
from planish.passes.transforms import Transforms
from tests.flattening import random_transforms
from tests.onnx_run import range_error
from tests.tiny import VARIANTS, write_tiny


def heads_only_mixed(transforms: Transforms) -> Transforms:
    """Return the transforms without the maps within heads at attn_out, whose place is the value map."""
    layers = (
        dataclasses.replace(layer, attn_out=dataclasses.replace(layer.attn_out, right=None))
        for layer in transforms.layers
    )
    return dataclasses.replace(transforms, layers=tuple(layers))


def no_codes(module: str) -> QuantizedWeight:
    raise AssertionError(f"{module} has no codes in a float scheme")


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("variant", ["gqa", "mha", "mqa", "head_dim", "attention_bias", "mlp_bias", "tied", "untied"])
def test_equals_transformers(variant: str, head: bool, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, **VARIANTS[variant])
    original = open_checkpoint(folder)
    transforms = heads_only_mixed(random_transforms(original.config, head=head))
    folded = TransformedCheckpoint(original, transforms)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 272, (2, 13)))
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    found = Oracle(folded, Scheme.parse("w16a16k16v16"), no_codes, transforms=transforms).logits(ids)
    assert range_error(found.numpy(), expected.numpy()) < 1e-5
    # Not because nothing was folded.
    apart = Oracle(folded, Scheme.parse("w16a16k16v16"), no_codes).logits(ids)
    assert range_error(apart.numpy(), expected.numpy()) > 1e-2


@pytest.mark.parametrize("variant", ["tied", "untied"])
def test_a_scaled_head(variant: str, tmp_path: Path) -> None:
    original = open_checkpoint(write_tiny(tmp_path, **VARIANTS[variant]))
    transforms = random_transforms(original.config, head=True)
    folded = TransformedCheckpoint(original, transforms)
    assert set(folded.names()) == {*original.names(), "lm_head.weight"}
    head = original.tensor("model.embed_tokens.weight" if variant == "tied" else "lm_head.weight")
    np.testing.assert_allclose(folded.tensor("lm_head.weight"), head / transforms.head, rtol=1e-6)
    np.testing.assert_allclose(
        folded.tensor("model.norm.weight"), original.tensor("model.norm.weight") * transforms.head, rtol=1e-6
    )
    assert folded.tensor("lm_head.weight").dtype == folded.dtype("lm_head.weight") == np.float32


def test_it_is_a_checkpoint_like_the_original(tmp_path: Path) -> None:
    original = open_checkpoint(write_tiny(tmp_path / "model", dtype="float16"))
    folded = TransformedCheckpoint(original, random_transforms(original.config))
    assert folded.fingerprint() == original.fingerprint()
    assert set(folded.names()) == set(original.names())
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert folded.dtype(name) == np.float16
        assert np.array_equal(folded.tensor(name), original.tensor(name))
    query = "model.layers.1.self_attn.q_proj.weight"
    assert folded.dtype(query) == folded.tensor(query).dtype == np.float32
    assert folded.tensor(query).shape == original.shape(query)
    (tmp_path / "out").mkdir()
    folded.write_sidecars(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "model" / "config.json").read_bytes()
