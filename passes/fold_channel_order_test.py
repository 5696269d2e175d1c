"""Folding the order of an FFN's channels: not a bit of the logits changes, and nothing is gathered any more."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.export.float_model import float_model, save_model
from planish.compiler.pipeline.high_impact import untransformed
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.passes.flatten import flatten_passes
from planish.passes.fold_channel_order import FoldChannelOrderPass
from planish.passes.merge_linears import MergeLinearsPass
from planish.passes.quantize_linears import QuantizeLinearsPass
from planish.passes.scheme import Scheme
from planish.passes.sequence import run_passes
from planish.passes.transforms import Transforms
from tests.flattening import random_transforms
from tests.high_impact import WIDE, random_high_impact
from tests.onnx_run import CachedModel
from tests.tiny import write_tiny

IDS = np.random.default_rng(0).integers(3, 272, (2, 7))


def quantized(folder: Path, spelling: str, merge: bool, transformed: bool = False) -> ir.Model:
    checkpoint = open_checkpoint(write_tiny(folder / "tiny", mlp_bias=True, **WIDE))
    plain = random_transforms(checkpoint.config) if transformed else untransformed(checkpoint.config)
    transforms: Transforms = plain.with_high(random_high_impact(plain))
    scheme = Scheme.parse(spelling)
    codes = quantize_checkpoint(checkpoint, scheme, folder / "codes", None, transforms.high)
    passes: list[Any] = [*flatten_passes(transforms), *([MergeLinearsPass()] if merge else [])]
    passes.append(QuantizeLinearsPass(scheme, codes, transforms.clip, transforms.high))
    return run_passes(float_model(checkpoint), passes)


def gathered(model: ir.Model) -> set[str]:
    """Return the linears whose channels are gathered."""
    return {str(node.name) for node in model.graph if str(node.name).endswith(".gathered")}


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("spelling", ["w3a3", "w2a16g32"])
def test_not_a_bit_changes(spelling: str, merge: bool, tmp_path: Path) -> None:
    logits = []
    for fold in (False, True):
        model = quantized(tmp_path / str(fold), spelling, merge)
        before = gathered(model)
        if fold:
            assert FoldChannelOrderPass()(model).modified
            folded = before - gathered(model)
            assert len(folded) == 4
            assert all(".mlp.down_proj." in name for name in folded)
            assert not FoldChannelOrderPass()(model).modified
        logits.append(CachedModel(save_model(model, tmp_path / f"model{fold}"))(IDS).logits)
    np.testing.assert_array_equal(*logits)


def test_channels_of_an_online_transform_stay_gathered(tmp_path: Path) -> None:
    model = quantized(tmp_path, "w3a3", merge=True, transformed=True)
    before = gathered(model)
    assert not FoldChannelOrderPass()(model).modified
    assert gathered(model) == before
