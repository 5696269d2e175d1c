"""The low-bit block computed in floating point: its grids are those of the arithmetic, and its output the oracle's."""

from pathlib import Path

import pytest
import torch

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.block import MODULES, Angles, read_block, run_block
from planish.compiler.learn.low_bit import LowBitHooks, Reached, round_activation, round_cached
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.fold import fold_block
from planish.compiler.learn.transforms.transformed import TransformedCheckpoint
from planish.compiler.quantize.arithmetic import dequantize_kv, dequantize_weight, quantize_activation, quantize_kv
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.compiler.verify.oracle import Oracle
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES
from tests.flattening import random_transforms
from tests.tiny import VARIANTS, write_tiny

LAYER = 1


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_activations_are_on_the_grid_of_the_arithmetic(bits: int) -> None:
    x = noise(3, 5, 24)
    x[0, 0] = 0
    for clip in (1.0, 0.6):
        codes, scale = quantize_activation(x, bits, clip)
        assert torch.equal(round_activation(x, bits, clip), (codes.float() - (1 << bits - 1)) * scale)


def test_the_cache_is_on_the_grid_of_the_arithmetic() -> None:
    x = noise(2, 3, 5, 16)
    assert torch.equal(round_cached(x, 3), dequantize_kv(*quantize_kv(x, 3)))


def test_sixteen_bits_are_left_alone() -> None:
    x = noise(2, 3, 5, 16)
    assert round_activation(x, 16) is x
    assert round_cached(x, 16) is x


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        ("gqa", "scale rows left"),
        ("mqa", "scale right left"),
        ("head_dim", "rows left"),
        ("attention_bias", "scale rows left"),
        ("mlp_bias", "scale right"),
        ("untied", "scale rows left"),
        ("rope_llama3", "right left"),
    ],
)
def test_a_block_equals_the_oracles_layer(variant: str, form: str, tmp_path: Path) -> None:
    original = open_checkpoint(write_tiny(tmp_path / "model", **VARIANTS[variant]))
    scheme, config = Scheme.parse("w4a8k8v8"), original.config
    transforms = random_transforms(config, form.strip())
    checkpoint = TransformedCheckpoint(original, transforms)
    codes = quantize_checkpoint(checkpoint, scheme, tmp_path / "codes")
    oracle = Oracle(checkpoint, scheme, codes.quantized, transforms=transforms)
    ids = torch.arange(24).reshape(2, 12)
    x = noise(2, 12, config.hidden_size)
    expected = oracle.layer(LAYER, x, oracle.batch(ids))

    of_layer = transforms.layers[LAYER]
    factors = {site: Factors.of(of_layer[site]) for site in SITES}
    hooks = LowBitHooks(fold_block(read_block(original, LAYER), factors), factors, scheme)
    hooks.clips = dict(of_layer.clips)
    hooks.weights = {each: dequantize_weight(codes.quantized(f"model.layers.{LAYER}.{each}")) for each in MODULES}
    found = run_block(config, hooks, x, Angles.of(config, 12))

    # Where a value lies between two codes the last bit of a float decides, and one token's output moves by a step.
    off = (found - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert off.median() < 1e-5
    assert off.max() < 0.05


def test_a_run_stops_where_it_is_told(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    block = read_block(checkpoint, 0)
    hooks = LowBitHooks(block, {site: Factors("identity") for site in SITES}, Scheme.parse("w4a4"))
    hooks.stop = "attn_in"
    x = noise(1, 7, 64)
    with pytest.raises(Reached) as reached:
        run_block(block.config, hooks, x, Angles.of(block.config, 7))
    norm = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + block.config.rms_norm_eps)
    assert torch.allclose(reached.value.x, norm * block.weight("input_layernorm"), atol=1e-6)
