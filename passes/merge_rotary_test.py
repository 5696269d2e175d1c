"""Rotating queries and keys together changes nothing but the number of nodes."""

from pathlib import Path

import numpy as np
import pytest

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.export.float_model import float_model, save_model
from planish.passes.merge_linears import MergeLinearsPass
from planish.passes.merge_rotary import MergeRotaryPass
from tests.onnx_run import CachedModel
from tests.tiny import VARIANTS, write_tiny


@pytest.mark.parametrize(("variant", "merges"), [("gqa", True), ("mha", True), ("attention_bias", False)])
def test_same_logits(variant: str, merges: bool, tmp_path: Path) -> None:
    model = float_model(open_checkpoint(write_tiny(tmp_path / "tiny", **VARIANTS[variant])))
    MergeLinearsPass()(model)
    before = save_model(model, tmp_path / "before")
    layers = sum(node.op_type == "Attention" for node in model.graph)
    assert MergeRotaryPass()(model).modified is merges
    assert sum(node.op_type == "RotaryEmbedding" for node in model.graph) == layers * (1 if merges else 2)
    after = save_model(model, tmp_path / "after")
    ids = np.random.default_rng(0).integers(0, 200, (2, 9))
    first, second = (CachedModel(path)(ids) for path in (before, after))
    np.testing.assert_array_equal(first.logits, second.logits)
    for name, value in first.cache.items():
        np.testing.assert_array_equal(value, second.cache[name])


def test_leaves_separate_linears_alone(tmp_path: Path) -> None:
    model = float_model(open_checkpoint(write_tiny(tmp_path / "tiny")))
    assert not MergeRotaryPass()(model).modified
