"""Verifying passes: drift is measured, and a pass that changes the model is named."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.errors import AccuracyError
from planish.compiler.export.float_model import float_model
from planish.compiler.verify.passes import PASS_TOLERANCE, verify_flattening, verify_passes
from planish.passes import insert_key_map
from planish.passes.flatten import flatten_passes
from planish.passes.fold_channel_scale import FoldChannelScalePass
from planish.passes.folding import fold
from planish.passes.transforms import Transforms
from planish.passes.untie_embeddings import UntieEmbeddingsPass
from tests.flattening import random_transforms
from tests.tiny import VARIANTS, write_tiny


def tiny(folder: Path, variant: str = "gqa", layers: int = 2) -> tuple[Checkpoint, Transforms]:
    checkpoint = open_checkpoint(write_tiny(folder, **VARIANTS[variant], num_hidden_layers=layers))
    return checkpoint, random_transforms(checkpoint.config, residual=True)


class Scaled(ir.passes.InPlacePass):
    """Multiplies a weight by a factor."""

    def __init__(self, name: str, factor: float) -> None:
        super().__init__()
        self.name, self.factor = name, factor

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        fold(model.graph.initializers[self.name], 0, lambda x: x * self.factor)
        return ir.passes.PassResult(model, modified=True)


@pytest.mark.parametrize("variant", ["gqa", "attention_bias", "tied", "head_dim"])
def test_every_pass_is_measured(variant: str, tmp_path: Path) -> None:
    checkpoint, transforms = tiny(tmp_path, variant)
    drifts = verify_flattening(checkpoint, transforms)
    names = [type(each).__name__ for each in flatten_passes(transforms)]
    assert [drift.name for drift in drifts] == [*names, "MergeLinearsPass"]
    assert drifts[0].drift == 0  # UntieEmbeddingsPass moves nothing
    assert all(0 < drift.drift < PASS_TOLERANCE for drift in drifts[1:])


@pytest.mark.parametrize("weight", ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_pass_that_changes_the_model_is_named(weight: str, tmp_path: Path) -> None:
    checkpoint, transforms = tiny(tmp_path)
    passes = [FoldChannelScalePass(transforms), Scaled(weight, 1.01), UntieEmbeddingsPass()]
    with pytest.raises(AccuracyError, match=r"^Scaled changes .* the logits move by 0\.0"):
        verify_passes(float_model(checkpoint), passes)


def test_nan_is_named(tmp_path: Path) -> None:
    checkpoint, _ = tiny(tmp_path)
    with pytest.raises(AccuracyError, match="Scaled changes"):
        verify_passes(float_model(checkpoint), [Scaled("lm_head.weight", float("nan"))])


def test_a_wrong_inverse_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K in place of K^-T on the queries."""
    checkpoint, transforms = tiny(tmp_path)
    monkeypatch.setattr(
        insert_key_map, "_parts", lambda inverse, right: (("query", "q_rope", inverse), ("key", "k_rope", right))
    )
    with pytest.raises(AccuracyError, match="InsertKeyMapPass changes"):
        verify_flattening(checkpoint, transforms)


def test_only_the_first_blocks_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, transforms = tiny(tmp_path, layers=3)
    reads: list[str] = []
    read = checkpoint._read
    monkeypatch.setattr(checkpoint, "_read", lambda name: [reads.append(name), read(name)][1])
    verify_flattening(checkpoint, transforms, layers=1)
    layers = {name.split(".")[2] for name in reads if ".layers." in name}
    assert layers == {"0"}
    # The large tables are read once, and the first rows kept.
    assert reads.count("model.embed_tokens.weight") == reads.count("lm_head.weight") == 1
    assert len(verify_flattening(checkpoint, transforms, layers=9)) == len(verify_flattening(checkpoint, transforms))


def test_the_cache_is_verified_too(tmp_path: Path) -> None:
    """A pass that breaks only what comes out of the cache."""

    class ForgetPast(ir.passes.InPlacePass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            for node in list(model.graph):
                if node.op_type == "Attention":
                    zero = ir.node("Mul", [node.inputs[4], model.graph.initializers["zero"]], name=f"{node.name}.zero")
                    model.graph.insert_before(node, zero)
                    node.replace_input_with(4, zero.outputs[0])
            return ir.passes.PassResult(model, modified=True)

    checkpoint, _ = tiny(tmp_path)
    model = float_model(checkpoint)
    model.graph.register_initializer(ir.Value(name="zero", const_value=ir.tensor(np.float32(0), name="zero")))
    with pytest.raises(AccuracyError, match="ForgetPast changes"):
        verify_passes(model, [ForgetPast()])
