"""The cache on PyTorch tensors: what is appended means what the op stores, attention is that of float64, step by step.

Every test runs twice: on a GPU (marker `gpu`), and emulated on the host.
"""

import itertools

import numpy as np
import pytest
import torch

from planish.plugins import kv_ops, on_tensors
from planish.plugins.kv_library import PAGE_TOKENS
from planish.plugins.kv_ops import PackedCache, append_kv, attend_kv, attention_workspace
from planish.plugins.ops import append_kv as append_op
from planish.plugins.packing import packed_size, unpack
from tests.kv_emulation import library
from tests.onnx_run import run_op

TOLERANCE = 1e-3


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda":
        return request.getfixturevalue("gpu")
    monkeypatch.setattr(on_tensors, "DEVICE", "cpu")
    monkeypatch.setattr(kv_ops, "kv_library", library)
    library().planish_choose(1, 0, 0)
    return torch.device("cpu")


def vectors(seed: int, *shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half().to(device)


def lengths(*each: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(each, dtype=torch.int32, device=device)


def meant(cache: PackedCache, part: int, sequence: int, count: int) -> torch.Tensor:
    """Return what the codes mean, float64 [kv_heads, count, head_dim]."""
    codes, scales = cache.codes[part].cpu(), cache.scales[part].cpu()
    if cache.pages is None:
        codes, scales = codes[sequence], scales[sequence]
    else:
        own = cache.pages[sequence].cpu().long()
        codes, scales = (each[own].transpose(0, 1).flatten(1, 2) for each in (codes, scales))
    unpacked = torch.from_numpy(unpack(codes[:, :count].numpy(), cache.bits[part], cache.head_dim)).double()
    values = unpacked * scales[:, :count, :1].double() + scales[:, :count, 1:].double()
    first = min(count, cache.firsts[part].shape[2])
    values[:, :first] = cache.firsts[part][sequence, :, :first].cpu().double()
    return values


def expected(cache: PackedCache, past: list[int], queries: torch.Tensor) -> torch.Tensor:
    batch, tokens, heads, _ = queries.shape
    y = []
    for sequence in range(batch):
        total = past[sequence] + tokens
        keys, values = (meant(cache, i, sequence, total).repeat_interleave(heads // cache.kv_heads, 0) for i in (0, 1))
        query = queries[sequence].cpu().double().transpose(0, 1)
        scores = query @ keys.mT / cache.head_dim**0.5
        hidden = torch.arange(total) > past[sequence] + torch.arange(tokens)[:, None]
        y.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.stack(y)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found.cpu().double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("bits", "head_dim", "group"), [((2, 2), 64, 3), ((3, 3), 128, 1), ((4, 3), 96, 8),
                                                         ((4, 4), 128, 4), ((8, 8), 64, 4)])  # fmt: skip
def test_a_prompt_and_some_tokens(
    bits: tuple[int, int], head_dim: int, group: int, paged: bool, device: torch.device
) -> None:
    """A prompt, then one token after the other, out of one merged output; codes are those of the op."""
    kv_heads, batch = 2, 2
    pages = torch.tensor([[4, 1], [0, 3]], dtype=torch.int32, device=device) if paged else None
    cache = PackedCache.empty(batch, kv_heads, 2 * PAGE_TOKENS, head_dim, bits, pages=pages, blocks=5, device=device)
    done = [0, 0]
    for step, tokens in enumerate([70, 1, 1, 2]):
        merged = vectors(step, batch, tokens, kv_heads * (group + 2), head_dim, device=device)
        queries, keys, values = merged.split([kv_heads * group, kv_heads, kv_heads], 2)
        past = lengths(*done, device=device)
        rotated = append_kv(cache, past, keys, values, queries, clips=(1.0, 0.9))
        assert torch.equal(rotated, queries)
        y = attend_kv(cache, past, rotated)
        assert error(y, expected(cache, done, queries)) < TOLERANCE
        for part, (new, clip) in enumerate(((keys, 1.0), (values, 0.9))):
            empty = np.zeros((batch, kv_heads, 0, packed_size(head_dim, bits[part])), np.uint8)
            feeds = {"x": new.transpose(1, 2).float().cpu().numpy(), "past": empty,
                     "past_scale": np.zeros((batch, kv_heads, 0, 2), np.float16)}  # fmt: skip
            packed, scale = run_op(append_op(bits[part]), feeds, clip=clip)
            codes = torch.from_numpy(unpack(packed, bits[part], head_dim)).double()
            grids = torch.from_numpy(scale).double()
            for sequence in range(batch):
                stored = meant(cache, part, sequence, done[sequence] + tokens)[:, done[sequence] :]
                assert torch.equal(stored, codes[sequence] * grids[sequence, ..., :1] + grids[sequence, ..., 1:])
        done = [each + tokens for each in done]


@pytest.mark.parametrize("first", [0, 32])
def test_first_tokens_in_float16(first: int, device: torch.device) -> None:
    cache = PackedCache.empty(1, 1, 96, 64, (2, 2), first=first, device=device)
    keys, values = (vectors(i, 1, 50, 1, 64, device=device) for i in range(2))
    queries = vectors(2, 1, 50, 4, 64, device=device)
    past = lengths(0, device=device)
    append_kv(cache, past, keys, values)
    y = attend_kv(cache, past, queries)
    assert error(y, expected(cache, [0], queries)) < TOLERANCE
    exact = torch.nn.functional.scaled_dot_product_attention(
        queries[:, :first].double().transpose(1, 2), keys[:, :first].double().transpose(1, 2).expand(1, 4, first, 64),
        values[:, :first].double().transpose(1, 2).expand(1, 4, first, 64), is_causal=True,
    ).transpose(1, 2)  # fmt: skip
    assert first == 0 or error(y[:, :first], exact.cpu()) < TOLERANCE


def test_rope_and_maps_leave_scores(device: torch.device) -> None:
    """With 8 bits, attention behind RoPE and maps is attention of rotated float keys."""
    heads, head_dim, tokens = 4, 64, 40
    cache = PackedCache.empty(1, 2, 48, head_dim, (8, 8), device=device)
    queries, keys, values = (vectors(i, 1, tokens, n, head_dim, device=device) for i, n in enumerate((heads, 2, 2)))
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    turns = torch.arange(48)[:, None] * frequencies
    angles = turns.cos().to(device), turns.sin().to(device)
    key_map = torch.linalg.qr(torch.randn(2, head_dim, head_dim, generator=torch.Generator().manual_seed(5)))[0]
    key_map = key_map * torch.linspace(0.5, 2, head_dim)
    maps = key_map.contiguous().to(device), torch.linalg.inv(key_map).mT.contiguous().to(device)
    past = lengths(0, device=device)
    rotated = append_kv(cache, past, keys, values, queries, angles=angles, maps=maps)
    y = attend_kv(cache, past, rotated)

    def turned(x: torch.Tensor) -> torch.Tensor:
        cosine, sine = (each[:tokens, None].double().repeat(1, 1, 2) for each in (turns.cos(), turns.sin()))
        low, high = x.cpu().double().chunk(2, -1)
        return x.cpu().double() * cosine + torch.cat([-high, low], -1) * sine

    exact = torch.nn.functional.scaled_dot_product_attention(
        turned(queries).transpose(1, 2), turned(keys).transpose(1, 2).repeat_interleave(2, 1),
        values.cpu().double().transpose(1, 2).repeat_interleave(2, 1), is_causal=True,
    ).transpose(1, 2)  # fmt: skip
    assert error(y, exact) < 0.03


def test_a_workspace_serves_every_length(device: torch.device) -> None:
    """Splits are planned from shapes alone; a call leaves the workspace as the next one needs it."""
    cache = PackedCache.empty(3, 2, 1024, 64, (3, 3), device=device)
    workspace = attention_workspace(cache, 3, 1, 8)
    assert len(workspace) > 0
    past = [1000, 0, 17]
    for count, sequence in itertools.product((600, 1), range(3)):
        keys, values = (vectors(sequence, 3, count, 2, 64, device=device) for _ in range(2))
        append_kv(cache, lengths(*([0] * 3 if count > 1 else past), device=device), keys, values)
    keys, values = (vectors(7 + i, 3, 401, 2, 64, device=device) for i in range(2))
    append_kv(cache, lengths(600, 600, 600, device=device), keys, values)
    queries = vectors(9, 3, 1, 8, 64, device=device)
    runs = [attend_kv(cache, lengths(*past, device=device), queries, workspace=workspace) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert error(runs[0], expected(cache, past, queries)) < TOLERANCE


@pytest.mark.gpu
def test_a_captured_step_follows_the_lengths(gpu: torch.device) -> None:
    """One graph of append and attention, replayed while the cache grows over tiles, splits and pages."""
    cache = PackedCache.empty(2, 2, 512, 128, (3, 3), device=gpu)
    workspace = attention_workspace(cache, 2, 1, 8)
    past = lengths(0, 100, device=gpu)
    prompt = [vectors(i, 2, 100, 2, 128, device=gpu) for i in range(2)]
    append_kv(cache, lengths(0, 0, device=gpu), *prompt)
    queries, keys, values = (vectors(3 + i, 2, 1, n, 128, device=gpu) for i, n in enumerate((8, 2, 2)))
    rotated, y = torch.empty_like(queries), torch.empty_like(queries)

    def step() -> None:
        append_kv(cache, past, keys, values, queries, out=rotated)
        attend_kv(cache, past, rotated, workspace=workspace, out=y)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i in range(150):
        for x in (queries, keys, values):
            x.copy_(vectors(10 + i, *x.shape, device=gpu))
        graph.replay()
        if i % 10 == 0:
            assert error(y, expected(cache, past.tolist(), queries)) < TOLERANCE
        past += 1


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [8, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_long_context(bits: int, kv_heads: int, gpu: torch.device) -> None:
    """8,192 tokens, batch 8: every multiprocessor at work, splits merged by whichever block is last, twice alike."""
    cache = PackedCache.empty(8, kv_heads, 8192, 128, (bits, bits), device=gpu)
    for start in range(0, 8192, 1024):
        keys, values = (vectors(start + i, 8, 1024, kv_heads, 128, device=gpu) for i in range(2))
        append_kv(cache, lengths(*[start] * 8, device=gpu), keys, values)
    queries = vectors(5, 8, 1, 32, 128, device=gpu)
    past = [8191, 8000, 4096, 4095, 127, 63, 1, 0]
    runs = [attend_kv(cache, lengths(*past, device=gpu), queries) for _ in range(20)]
    assert all(torch.equal(runs[0], each) for each in runs)
    assert error(runs[0], expected(cache, past, queries)) < TOLERANCE
