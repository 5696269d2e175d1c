"""Models with high-impact channels: the oracle against transformers, and every form of the graph against the oracle."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from planish.compiler.backends.ort import build_ort
from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.errors import AccuracyError
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.learn.transforms.transformed import TransformedCheckpoint
from planish.compiler.pipeline.high_impact import untransformed
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_activation, quantize_weight
from planish.compiler.quantize.codes import CodesOnDisk, quantize_checkpoint
from planish.compiler.verify.oracle import Oracle
from planish.compiler.verify.verification import verify
from planish.passes.lower_kv_cache_to_tensorrt import LowerKvCacheToTensorrtPass
from planish.passes.lower_linears_to_tensorrt import LowerLinearsToTensorrtPass
from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import Transforms, site_of
from tests.fixed_cache import FixedCacheModel
from tests.flattening import random_transforms
from tests.high_impact import WIDE, random_high_impact
from tests.onnx_run import range_error
from tests.tiny import write_tiny

TOKENS = [int(token) for token in np.random.default_rng(7).integers(3, 200, 21)]


def wide(folder: Path, **overrides: object) -> Checkpoint:
    return open_checkpoint(write_tiny(folder / "tiny", **{**WIDE, **overrides}))


def rounded_as_defined(module: torch.nn.Linear, form: LinearFormat, transforms: Transforms, name: str) -> None:
    """Give `module` the weight that its codes stand for, in the order of the checkpoint, and a hook that rounds x."""
    high = transforms.high(name)
    clip = transforms.clip(name)
    channels = [torch.arange(module.in_features)]
    forms = [form]
    clips = [clip]
    if high is not None:
        order = torch.from_numpy(high.order)
        channels = [order[: high.count], order[high.count :]]
        activation_bits = 16 if form.weight_only else max(high.bits, form.activation_bits)
        forms = [LinearFormat(high.bits, activation_bits, form.group), form]
        clips = [high.clip, clip]
    for each, of_each in zip(channels, forms, strict=True):
        module.weight[:, each] = dequantize_weight(quantize_weight(module.weight[:, each], of_each))

    def round_input(_: torch.nn.Module, inputs: tuple[Tensor]) -> Tensor:
        x = inputs[0].clone()
        for each, of_each, clip in zip(channels, forms, clips, strict=True):
            codes, scale = quantize_activation(x[..., each], of_each.activation_bits, clip)
            x[..., each] = (codes.float() - (1 << of_each.activation_bits - 1)) * scale
        return x

    if not form.weight_only:
        module.register_forward_pre_hook(round_input)


@pytest.mark.parametrize("spelling", ["w3a3", "w3a8", "w2a16g64", "w3a3g32"])
def test_the_oracle_is_transformers_with_channels_rounded_apart(spelling: str, tmp_path: Path) -> None:
    checkpoint, scheme = wide(tmp_path), Scheme.parse(spelling, lm_head="w16a16")
    identity = untransformed(checkpoint.config)
    transforms = identity.with_high(random_high_impact(identity))
    codes = quantize_checkpoint(checkpoint, scheme, tmp_path / "codes", None, transforms.high)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32).eval()
    ids = torch.randint(3, 272, (12, 6), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        for name, module in model.named_modules():
            if site_of(name):
                rounded_as_defined(module, scheme.linear, transforms, name)
        table = model.model.embed_tokens.weight
        table.copy_(table.half().float())
        expected = model(ids).logits.numpy()
        found = Oracle(checkpoint, scheme, codes.quantized, None, transforms).logits(ids).numpy()
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    # What is rounded may round a tie the other way and then be off.
    assert (error < 1e-5).mean() > 0.8
    assert error.max() < 0.3


def models_of(
    checkpoint: Checkpoint, folded: Checkpoint, scheme: Scheme, transforms: Transforms, folder: Path
) -> tuple[CodesOnDisk, Path, Path]:
    codes = quantize_checkpoint(folded, scheme, folder / "codes", None, transforms.high)
    portable = save_model(portable_model(checkpoint, scheme, codes, transforms)[0], folder / "portable")
    return codes, portable, build_ort(ir.load(portable), folder / "ort")


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize(
    ("spelling", "bits"), [("w3a3k3v3", 4), ("w2a16", 4), ("w2a16g64", 3), ("w3a8kv8", 8), ("w4a4k4v4g32", 8)]
)
def test_both_models_are_the_oracles(spelling: str, bits: int, transformed: bool, tmp_path: Path) -> None:
    checkpoint, scheme = wide(tmp_path, mlp_bias=True, attention_bias=True), Scheme.parse(spelling)
    plain = random_transforms(checkpoint.config) if transformed else untransformed(checkpoint.config)
    transforms = plain.with_high(random_high_impact(plain, bits))
    folded = TransformedCheckpoint(checkpoint, transforms)
    codes, *models = models_of(checkpoint, folded, scheme, transforms, tmp_path)
    for model in models:
        result = verify(folded, scheme, codes, model, TOKENS, transforms)
        assert result.logits_error < 1e-5
        assert result.followed <= result.roundings * 1e-3
    # Seven of the eight sites have two grids, and lm_head one.
    sites = [8 + 7 + 1, 1][scheme.linear.weight_only]
    made = {name for node in onnx.load(models[0], load_external_data=False).graph.node for name in node.output}
    assert sum(name.endswith(".input") for name in made) == sites


@pytest.mark.parametrize("spelling", ["w3a3k3v3", "w2a16g64"])
def test_the_form_for_tensorrt(spelling: str, tmp_path: Path) -> None:
    checkpoint, scheme = wide(tmp_path), Scheme.parse(spelling)
    plain = random_transforms(checkpoint.config)
    transforms = plain.with_high(random_high_impact(plain))
    folded = TransformedCheckpoint(checkpoint, transforms)
    codes = quantize_checkpoint(folded, scheme, tmp_path / "codes", None, transforms.high)
    lower = ir.passes.Sequential(
        LowerLinearsToTensorrtPass(),
        LowerKvCacheToTensorrtPass(16),
        common.InlinePass(),
        common.RemoveUnusedNodesPass(),
    )
    lowered = lower(portable_model(checkpoint, scheme, codes, transforms)[0]).model
    ids = np.random.default_rng(0).integers(3, 272, (1, 9))
    found = FixedCacheModel(save_model(lowered, tmp_path / "lowered"), 1).in_chunks(ids, [5, 1, 1, 1, 1], ids**0)
    with torch.no_grad():
        expected = Oracle(folded, scheme, codes.quantized, None, transforms).logits(torch.from_numpy(ids)).numpy()
    assert range_error(found, expected) < 1e-5


def test_another_order_is_another_model(tmp_path: Path) -> None:
    """Guards the tests above: the oracle of other channels, or of none, disagrees."""
    checkpoint, scheme = wide(tmp_path), Scheme.parse("w3a3k3v3")
    identity = untransformed(checkpoint.config)
    transforms = identity.with_high(random_high_impact(identity))
    codes, _, lowered = models_of(checkpoint, checkpoint, scheme, transforms, tmp_path)
    high = random_high_impact(identity)
    swapped = high[0]["attn_in"].order
    swapped[[3, 100]] = swapped[[100, 3]]
    with pytest.raises(AccuracyError, match=r"model\.layers\.0\.attn_in\.high drifts first"):
        verify(checkpoint, scheme, codes, lowered, TOKENS, identity.with_high(high))
