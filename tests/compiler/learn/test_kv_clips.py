"""Clips of the cache: the search against brute force in numpy, what it reads against transformers."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.block import Angles, read_block
from planish.compiler.learn.low_bit import LowBitHooks
from planish.compiler.learn.rounding.clips import Heads, kv_clips, read_heads, search_kv_clip
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.quantize.arithmetic import dequantize_kv, quantize_kv
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Site
from tests.tiny import write_tiny

Matrix = npt.NDArray[np.float64]
GRID = [1 - 0.05 * step for step in range(11)]
SITES_OF_CACHE: tuple[Site, ...] = ("key", "value")
WEIGHTS = torch.rand(80, generator=torch.Generator().manual_seed(8))


def rows(kind: str, seed: int = 4, heads: int = 3, d: int = 16) -> Tensor:
    """Return keys or values of 2 sequences, 3 heads and 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, heads, 40, d, generator=generator)
    if kind == "offset":
        x = x + torch.linspace(-3, 3, d)
    elif kind == "outlier":
        x[..., 5] = 8 + torch.rand(2, heads, 40, generator=generator)
    return x


def heads_of(kind: str) -> Heads:
    return Heads(rows("normal", 5, heads=6), rows(kind), rows(kind, 6))


def output_of(seed: int = 7) -> Tensor:
    return torch.randn(20, 96, generator=torch.Generator().manual_seed(seed))


def cached(x: Matrix, bits: int, clip: float) -> Matrix:
    """Return what a grid about the middle of the range gives back, its ends not rounded."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2 * clip
    step = 2 * half / (2**bits - 1)
    stored: Matrix = np.clip(np.round((x - (middle - half)) / step), 0, 2**bits - 1) * step + middle - half
    return stored


def block_output(query: Matrix, key: Matrix, value: Matrix, output: Matrix) -> Matrix:
    """Return what causal attention adds to the residual stream, [tokens, hidden]; two queries share a key."""
    scores = np.einsum("bgjtd,bgsd->bgjts", query.reshape(2, 3, 2, 40, -1), key) / np.sqrt(key.shape[-1])
    scores = np.where(np.tri(40, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    attended = np.einsum("bgjts,bgsd->btgjd", shares, value).reshape(80, -1)
    made: Matrix = attended @ output.T
    return made


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "offset", "outlier"])
@pytest.mark.parametrize("site", SITES_OF_CACHE)
@pytest.mark.parametrize("mapped", [False, True])
def test_equals_brute_force(site: Site, kind: str, bits: int, mapped: bool) -> None:
    heads, output = heads_of(kind), output_of()
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(9))
    right = torch.eye(16) + 0.1 * noise if mapped else None
    query, key, value = (each.double().numpy() for each in heads)
    expected = block_output(query, key, value, output.double().numpy())
    there = np.eye(16)[None] if right is None else right.double().numpy()

    def error(clip: float) -> float:
        def stored(x: Matrix) -> Matrix:
            back: Matrix = cached(x @ there, bits, clip) @ np.linalg.inv(there)
            return back

        pair = (stored(key), value) if site == "key" else (key, stored(value))
        lost = block_output(query, *pair, output.double().numpy()) - expected
        return float((WEIGHTS.numpy() * np.square(lost).sum(1)).sum())

    errors = {clip: error(clip) for clip in GRID}
    found = search_kv_clip(site, Factors("affine", None, right), bits, heads, output, WEIGHTS)
    # Neighbours may be so close that the float16 ends decide.
    assert errors[min(errors, key=lambda clip: abs(clip - found))] <= 1.01 * min(errors.values())
    assert 0.5 <= found <= 1


def test_who_reads_decides() -> None:
    """A channel far out is cut off unless it is what is read."""
    heads, plain = heads_of("outlier"), Factors("identity")
    there = (torch.arange(96) % 16 == 5).float()
    assert search_kv_clip("value", plain, 2, heads, output_of() * (1 - there), WEIGHTS) <= 0.8
    assert search_kv_clip("value", plain, 2, heads, output_of() * there, WEIGHTS) == 1.0
    blind = heads._replace(query=heads.query * (torch.arange(16) != 5))
    assert search_kv_clip("key", plain, 2, blind, output_of(), WEIGHTS) <= 0.8


@pytest.mark.parametrize("bits", [8, 16])
def test_not_in_eight_bits(bits: int) -> None:
    assert search_kv_clip("key", Factors("identity"), bits, heads_of("normal"), output_of(), WEIGHTS) == 1.0


def test_heads_are_those_of_transformers(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, attention_bias=True)
    ids = torch.randint(3, 272, (2, 9), generator=torch.Generator().manual_seed(3))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        x = model.model.embed_tokens(ids)
    checkpoint = open_checkpoint(folder)
    found = read_heads(read_block(checkpoint, 0), x, Angles.of(checkpoint.config, 9))
    torch.testing.assert_close(found.key, cache.layers[0].keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.value, cache.layers[0].values, rtol=1e-4, atol=1e-4)


def test_keys_and_values_by_their_own_bits_and_maps(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    block, angles = read_block(checkpoint, 0), Angles.of(checkpoint.config, 9)
    x = torch.randn(2, 9, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(3))
    maps = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(6))
    factors = {site: Factors("affine", None, maps[i]) for i, site in enumerate(SITES_OF_CACHE)}
    heads, output, weights = read_heads(block, x, angles), block.weight("self_attn.o_proj"), WEIGHTS[:18]
    assert kv_clips(block, x, angles, factors, Scheme.parse("w4a4k3v2"), weights) == {
        "key": search_kv_clip("key", factors["key"], 3, heads, output, weights),
        "value": search_kv_clip("value", factors["value"], 2, heads, output, weights),
    }


def test_a_low_bit_block_reads_the_clipped_cache(tmp_path: Path) -> None:
    block = read_block(open_checkpoint(write_tiny(tmp_path)), 0)
    hooks = LowBitHooks(block, {site: Factors("identity") for site in SITES}, Scheme.parse("w4a4k3v2"))
    hooks.clips |= {"key": 0.8, "value": 0.6}
    query, key, value = torch.randn(3, 2, 2, 5, 16, generator=torch.Generator().manual_seed(2))
    found = hooks.heads(query, key, value)
    expected = query, dequantize_kv(*quantize_kv(key, 3, 0.8)), dequantize_kv(*quantize_kv(value, 2, 0.6))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
