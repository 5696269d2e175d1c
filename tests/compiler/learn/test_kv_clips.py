"""Clips of the cache: the search against brute force in numpy, what it is given against transformers."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn import clips
from planish.compiler.learn.block import Angles, read_block
from planish.compiler.learn.factors import Factors
from planish.compiler.learn.low_bit import LowBitHooks
from planish.compiler.learn.site_moments import gather_moments
from planish.compiler.quantize.arithmetic import dequantize_kv, quantize_kv
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES
from tests.tiny import write_tiny

Matrix = npt.NDArray[np.float64]
GRID = [1 - 0.05 * step for step in range(11)]


def heads(kind: str, d: int = 64) -> Tensor:
    """Return keys of 2 sequences, 3 heads and 40 tokens."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, 40, d, generator=generator)
    if kind == "uniform":
        x = torch.rand(2, 3, 40, d, generator=generator)
    elif kind == "offset":
        x = x + torch.linspace(-3, 3, d)
    elif kind == "outlier":
        x[..., 5] = 8 + torch.rand(2, 3, 40, generator=generator)
    return x


def readers(seed: int = 5, d: int = 64) -> Tensor:
    rows = torch.randn(3, 100, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = rows * torch.logspace(0, 1, d, dtype=torch.float64)
    return rows.mT @ rows


def weighted_error(x: Matrix, moment: Matrix, bits: int, clip: float) -> float:
    """Return the weighted error of a grid about the middle of the range, in float64, its ends not rounded."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2 * clip
    step = 2 * half / (2**bits - 1)
    codes = np.clip(np.round((x - (middle - half)) / step), 0, 2**bits - 1)
    error = codes * step + middle - half - x
    return float(np.einsum("bhtd,hde,bhte->", error, moment, error))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["normal", "uniform", "offset", "outlier"])
def test_equals_brute_force(kind: str, bits: int) -> None:
    x, moment = heads(kind), readers()
    errors = {clip: weighted_error(x.double().numpy(), moment.numpy(), bits, clip) for clip in GRID}
    found = clips.search_kv_clip(x, moment, bits)
    # Neighbours may be so close that the float16 ends decide.
    assert errors[min(errors, key=lambda clip: abs(clip - found))] <= 1.001 * min(errors.values())
    assert 0.5 <= found <= 1


def test_distributions_whose_best_grid_is_known() -> None:
    even = torch.eye(64).double().expand(3, 64, 64)
    for bits in (2, 3, 4):
        # 2^b cells of equal width, each met at its middle: all but half a cell at both ends. 64 draws span 63 / 65.
        uniform = (1 - 2**-bits) * 65 / 63
        assert clips.search_kv_clip(heads("uniform"), even, bits) == pytest.approx(uniform, abs=0.04)
        # Max (1960), table II: steps of the best uniform grid for a Gaussian of deviation 1; 64 draws span 4.75.
        gaussian = {2: 0.9957, 3: 0.5860, 4: 0.3352}[bits] * (2**bits - 1) / 4.75
        assert clips.search_kv_clip(heads("normal"), even, bits) == pytest.approx(min(1, gaussian), abs=0.08)


def test_who_reads_decides() -> None:
    """A channel far out is cut off unless it is what is read."""
    x = heads("outlier")
    quiet = torch.ones(64).double()
    quiet[5] = 0.0
    assert clips.search_kv_clip(x, torch.diag(quiet).expand(3, 64, 64), 2) < 0.8
    assert clips.search_kv_clip(x, torch.diag(1 - quiet).expand(3, 64, 64), 2) == 1.0


@pytest.mark.parametrize("bits", [8, 16])
def test_not_in_eight_bits(bits: int) -> None:
    assert clips.search_kv_clip(heads("normal"), readers(), bits) == 1.0


@pytest.mark.parametrize("mapped", [False, True])
def test_what_the_search_is_given(mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are those that transformers caches, mapped; mapping leaves what readers see of them as it was."""
    folder = write_tiny(tmp_path, attention_bias=True)
    ids = torch.randint(3, 272, (2, 9), generator=torch.Generator().manual_seed(3))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        x = model.model.embed_tokens(ids)
    expected = (cache.layers[0].keys, cache.layers[0].values)
    checkpoint = open_checkpoint(folder)
    block, angles = read_block(checkpoint, 0), Angles.of(checkpoint.config, 9)
    moments = gather_moments(block, [x], angles)
    maps = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(6))
    factors = {site: Factors("affine", None, maps[i] if mapped else None) for i, site in enumerate(("key", "value"))}
    seen: list[tuple[Tensor, Tensor, int]] = []
    monkeypatch.setattr(clips, "search_kv_clip", lambda *given: seen.append(given) or 0.5 + 0.1 * len(seen))
    found = clips.kv_clips(block, x, angles, factors, moments, Scheme.parse("w4a4k3v2"))
    assert found == {"key": 0.6, "value": 0.7}
    for i, moment in enumerate((moments.queries, moments.value_readers)):
        given, given_moment, bits = seen[i]
        assert bits == (3, 2)[i]
        torch.testing.assert_close(given, expected[i] @ maps[i] if mapped else expected[i], rtol=1e-4, atol=1e-4)
        original, original_moment = expected[i].double(), moment
        read = torch.einsum("bhtd,hde,bhte->bht", given.double(), given_moment, given.double())
        torch.testing.assert_close(
            read, torch.einsum("bhtd,hde,bhte->bht", original, original_moment, original), rtol=1e-3, atol=1e-3
        )


def test_a_low_bit_block_reads_the_clipped_cache(tmp_path: Path) -> None:
    block = read_block(open_checkpoint(write_tiny(tmp_path)), 0)
    hooks = LowBitHooks(block, {site: Factors("identity") for site in SITES}, Scheme.parse("w4a4k3v2"))
    hooks.clips |= {"key": 0.8, "value": 0.6}
    query, key, value = torch.randn(3, 2, 2, 5, 16, generator=torch.Generator().manual_seed(2))
    found = hooks.heads(query, key, value)
    expected = query, dequantize_kv(*quantize_kv(key, 3, 0.8)), dequantize_kv(*quantize_kv(value, 2, 0.6))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
