"""What is said of a block before and after flattening is what numpy finds in the activations of transformers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.before_after import BeforeAfter, compare_block
from planish.compiler.learn.block import Angles, Block, read_block
from planish.compiler.learn.flatten_block import flatten_block
from planish.compiler.learn.site_statistics import PROFILE, float_statistics
from planish.compiler.learn.streams import Streams
from planish.compiler.quantize.arithmetic import dequantize_kv, dequantize_weight, quantize_kv, quantize_weight
from planish.compiler.select.forms import forms_of_groups
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Kind
from tests.learning import SEQ, block_of, factors_of, float_outputs, streams_of
from tests.tiny import write_tiny

SCHEME = Scheme.parse("w4a4k3v3")


def compared(kind: Kind, scheme: Scheme = SCHEME) -> tuple[BeforeAfter, Block, Streams]:
    block = block_of()
    streams = streams_of(block)
    with torch.no_grad():
        outputs = float_outputs(block, streams)
        done = flatten_block(block, streams, outputs, scheme, forms_of_groups({"attn": kind, "ffn": kind}), 0)
    return done.compared, block, streams


def seen_by_transformers(model: Path, ids: Tensor) -> dict[str, Tensor]:
    """Return the inputs of the linears of block 0, [batch, seq, n], and its keys before RoPE."""
    found: dict[str, Tensor] = {}
    llama = LlamaForCausalLM.from_pretrained(model)
    layer = llama.model.layers[0]
    sites = {"attn_in": layer.self_attn.q_proj, "attn_out": layer.self_attn.o_proj}
    sites |= {"ffn_in": layer.mlp.up_proj, "ffn_out": layer.mlp.down_proj}
    for site, module in sites.items():
        module.register_forward_hook(lambda _, args, __, site=site: found.update({site: args[0]}))
    layer.self_attn.v_proj.register_forward_hook(lambda _, __, output: found.update(value=output))
    with torch.no_grad():
        found["cached"] = llama(ids).past_key_values.layers[0].keys
    return found


def test_statistics_are_those_of_transformers(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", num_hidden_layers=1)
    ids = torch.randint(3, 272, (3, SEQ), generator=torch.Generator().manual_seed(0))
    seen = seen_by_transformers(model, ids)
    seen["key"] = seen.pop("cached").transpose(1, 2).flatten(2)
    checkpoint = open_checkpoint(model)
    block = read_block(checkpoint, 0)
    x = torch.from_numpy(checkpoint.tensor("model.embed_tokens.weight")[ids.numpy()])
    with torch.no_grad():
        found, _ = float_statistics(block, x, Angles.of(checkpoint.config, SEQ))
    for site in SITES:
        expected, numbers = seen[site].double().numpy(), found[site].numbers()
        assert numbers["absmax"] == pytest.approx(np.abs(expected).max(), rel=1e-4)
        assert numbers["absmax_rest"] == pytest.approx(np.abs(expected[:, 1:]).max(), rel=1e-4)
        assert numbers["rms"] == pytest.approx(np.sqrt((expected**2).mean()), rel=1e-4)
        assert numbers["median"] == pytest.approx(np.median(np.abs(expected)), rel=0.01)
        assert numbers["q999"] == pytest.approx(np.quantile(np.abs(expected), 0.999), rel=0.01)
        rows = expected.reshape(-1, expected.shape[-1])
        if site in ("key", "value"):
            rows = rows.reshape(-1, 16)
        crest = (np.abs(rows).max(1) / np.sqrt((rows**2).mean(1))).mean()
        assert numbers["crest"] == pytest.approx(crest, rel=1e-4)
        profile = dict(zip(PROFILE, found[site].profile(), strict=True))
        relative = np.abs(rows / np.sqrt((rows**2).mean(1, keepdims=True))).reshape(3, SEQ, -1)
        np.testing.assert_allclose(profile["max"], relative.max((0, 1)), rtol=1e-4)
        np.testing.assert_allclose(profile["max_rest"], relative[:, 1:].max((0, 1)), rtol=1e-4)
        np.testing.assert_allclose(profile["median"], np.median(relative[:, 1:], (0, 1)), rtol=1e-3)
        np.testing.assert_allclose(profile["q99"], np.quantile(relative[:, 1:], 0.99, axis=(0, 1)), rtol=1e-3)


def test_flattening_flattens_what_was_loud() -> None:
    found, block, _ = compared("rotation")
    loud = found.evidence["attn_in"]
    assert loud["crest_after"] < 0.8 * loud["crest_before"]
    assert loud["kurtosis_after"] < loud["kurtosis_before"]
    before, after = found.profiles["attn_in"]
    assert before.shape == (len(PROFILE), block.config.hidden_size)
    assert before[1].max() > 1.5 * after[1].max()


def test_the_error_before_is_that_of_rounding_to_nearest() -> None:
    found, block, streams = compared("affine")
    seen = streams.seen[-streams.held_out :]
    gain = block.tensors["input_layernorm.weight"]
    x = gain * seen * torch.rsqrt(seen.square().mean(-1, keepdim=True) + block.config.rms_norm_eps)
    weight = torch.cat([block.weight(f"self_attn.{name}_proj") for name in "qkv"])
    step = x.abs().amax(-1, keepdim=True) / 7
    rounded = (x / step).round().clamp(-8, 7) * step
    exact = x @ weight.T
    made = rounded @ dequantize_weight(quantize_weight(weight, SCHEME.linear)).T
    expected = float((made - exact).square().sum() / exact.square().sum())
    assert found.evidence["attn_in"]["error_unflattened"] == pytest.approx(expected, rel=1e-4)
    value = torch.unflatten(x @ block.weight("self_attn.v_proj").T, -1, (-1, 16)).transpose(1, 2)
    off = dequantize_kv(*quantize_kv(value, 3, 1.0)) - value
    expected = float(off.square().sum() / value.square().sum())
    assert found.evidence["value"]["error_unflattened"] == pytest.approx(expected, rel=1e-4)


def test_heads_behind_their_map_and_back() -> None:
    block = block_of()
    streams = streams_of(block)
    outputs = float_outputs(block, streams)
    many = dataclasses.replace(SCHEME, key_bits=8, value_bits=8)
    factors = factors_of(block, streams, "affine")
    with torch.no_grad():
        done = flatten_block(block, streams, outputs, many, forms_of_groups({"attn": "affine", "ffn": "affine"}), 0)
        args = (done.hooks, factors, streams, outputs, Angles.of(block.config, SEQ), many)
        found = compare_block(block, *args).evidence
    assert found["key"]["error"] < 1e-3
    assert found["value"]["error"] < 1e-3
    assert 0 < found["key"]["clip"] <= 1
    assert "clip" not in found["attn_in"]
    # A grid of 3 bits loses thousands of times the energy that one of 8 does.
    assert compared("affine")[0].evidence["key"]["error"] > 100 * found["key"]["error"]


def test_a_float_cache_has_no_error() -> None:
    found, _, _ = compared("affine", Scheme.parse("w4a16"))
    assert "error" not in found.evidence["key"]
    assert "error_unflattened" not in found.evidence["value"]
    assert found.evidence["key"]["absmax_before"] > 0
