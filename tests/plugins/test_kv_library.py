"""The C interface of the cache's kernels on the host: structures as the header has them, and what is refused."""

import ctypes
import dataclasses
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from planish.plugins import on_tensors
from planish.plugins.kernel_library import call
from planish.plugins.kv_library import COUNTER_BYTES, AppendTask, AttendTask, CacheArrays, TokenCounts
from planish.plugins.kv_ops import PackedCache, append_kv, attend_kv
from planish.plugins.native import SOURCES, find_compiler
from tests.kv_emulation import library

STRUCTURES = {
    "planish_kv_cache": CacheArrays,
    "planish_kv_tokens": TokenCounts,
    "planish_append": AppendTask,
    "planish_attend": AttendTask,
}
#: An address that no test reads from.
SOMEWHERE = 1 << 20


def cache_arrays(**changes: object) -> CacheArrays:
    arrays = CacheArrays(
        keys=SOMEWHERE, key_scales=SOMEWHERE, values=SOMEWHERE, value_scales=SOMEWHERE, capacity=1024, kv_heads=2,
        head_dim=64, key_bits=3, value_bits=3,
    )  # fmt: skip
    return changed(arrays, changes)


def append_task(**changes: object) -> AppendTask:
    task = AppendTask(
        cache=cache_arrays(), news=TokenCounts(batch=1, tokens=1, past=SOMEWHERE), queries=SOMEWHERE, keys=SOMEWHERE,
        values=SOMEWHERE, query_stride=256, stride=128, rotated=SOMEWHERE, heads=4, key_clip=1, value_clip=1,
    )  # fmt: skip
    return changed(task, changes)


def attend_task(**changes: object) -> AttendTask:
    task = AttendTask(
        cache=cache_arrays(), news=TokenCounts(batch=1, tokens=1, past=SOMEWHERE), queries=SOMEWHERE, stride=256,
        y=SOMEWHERE, heads=4, score_scale=0.125, splits=1,
    )  # fmt: skip
    return changed(task, changes)


def changed(task: ctypes.Structure, changes: dict[str, object]) -> ctypes.Structure:
    for name, value in changes.items():
        setattr(task, name, value)
    return task


def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    lines = [
        f'printf("{name} {field} %zu\\n", offsetof(struct {name}, {field}));'
        for name, structure in STRUCTURES.items()
        for field, *_ in structure._fields_
    ]
    lines += [f'printf("{name} size %zu\\n", sizeof(struct {name}));' for name in STRUCTURES]
    source, program = tmp_path / "offsets.cpp", tmp_path / "offsets"
    includes = '#include <cstddef>\n#include <cstdio>\n#include "planish_kv.h"\n'
    source.write_text(f"{includes}int main() {{{' '.join(lines)}}}")
    subprocess.run([find_compiler(), f"-I{SOURCES}", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    expected = [
        f"{name} {field} {getattr(structure, field).offset}"
        for name, structure in STRUCTURES.items()
        for field, *_ in structure._fields_
    ]
    expected += [f"{name} size {ctypes.sizeof(structure)}" for name, structure in STRUCTURES.items()]
    assert printed.split("\n")[:-1] == expected


CACHE_REFUSALS = [
    ({"head_dim": 80}, "heads of 80 channels have no kernel; those of 64, 96 and 128 have"),
    ({"key_bits": 5}, "a cache of 5-bit keys and 3-bit values has no kernel"),
    ({"value_bits": 16}, "16-bit values has no kernel"),
    ({"capacity": 1000}, "room for 1000 tokens: a multiple of 16"),
    ({"kv_heads": 0}, "a cache of 0 heads"),
    ({"capacity": 1040, "pages": SOMEWHERE}, "pages of 64 tokens cannot hold 1040"),
    ({"first": 8}, "8 first tokens of 1024 in float16: a multiple of 16"),
    ({"first": 16}, "a cache lacks one of its arrays"),
    ({"values": None}, "a cache lacks one of its arrays"),
    ({"key_scales": SOMEWHERE + 8}, "the arrays of a cache begin at multiples of 16 bytes"),
]
NEWS_REFUSALS = [
    ({"news": TokenCounts(batch=0, tokens=1, past=SOMEWHERE)}, "1 new tokens of 0 sequences"),
    ({"news": TokenCounts(batch=1, tokens=1)}, "it is not given how many tokens the cache has"),
    ({"heads": 3}, "3 query heads cannot share 2 KV heads"),
    ({"type": 3}, "there is no type 3"),
]


@pytest.mark.parametrize(("changes", "message"), CACHE_REFUSALS)
def test_caches_that_are_refused(changes: dict[str, object], message: str) -> None:
    for name, task in (("planish_append_kv", append_task()), ("planish_attend_kv", attend_task())):
        task.cache = cache_arrays(**changes)
        with pytest.raises(ValueError, match=re.escape(message)):
            call(library(), name, ctypes.byref(task), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *NEWS_REFUSALS,
        ({"key_clip": 0.0}, "a clip of 0: it is above 0 and at most 1"),
        ({"value_clip": 1.5}, "a clip of 1.5"),
        ({"cosines": SOMEWHERE}, "cosines without sines, or the reverse"),
        ({"key_map": SOMEWHERE}, "keys are mapped and queries are not, or the reverse"),
        ({"key_map": SOMEWHERE, "query_map": SOMEWHERE, "map_count": 3}, "3 key maps for 2 heads"),
        ({"cosines": SOMEWHERE + 4, "sines": SOMEWHERE}, "cosines, sines and maps begin at multiples of 16 bytes"),
        ({"keys": None}, "keys are missing, or do not begin at a multiple of 16 bytes"),
        ({"stride": 64}, "keys of 2 heads are 64 elements apart"),
        ({"query_stride": 260}, "queries of 4 heads are 260 elements apart: a multiple of 8"),
        ({"rotated": None}, "rotated queries are missing"),
    ],
)
def test_appends_that_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(library(), "planish_append_kv", ctypes.byref(append_task(**changes)), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *NEWS_REFUSALS,
        ({"score_scale": 0.0}, "scores times 0"),
        ({"y": SOMEWHERE + 2}, "outputs are missing, or do not begin at a multiple of 16 bytes"),
        ({"splits": 0}, "0 splits in a workspace of 0 bytes: planish_plan_attend says what it takes"),
        ({"splits": 2}, "2 splits in a workspace of 0 bytes"),
        ({"splits": 2, "workspace": SOMEWHERE, "workspace_bytes": 100}, "2 splits in a workspace of 100 bytes"),
    ],
)
def test_attention_that_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(library(), "planish_attend_kv", ctypes.byref(attend_task(**changes)), None)


@pytest.mark.parametrize(
    ("batch", "capacity", "heads", "splits"),
    [(1, 128, 4, 1), (1, 1024, 4, 8), (1, 65536, 4, 16), (4, 65536, 4, 4), (100, 65536, 4, 1), (1, 65536, 18, 1)],
)
def test_plans_for_32_blocks(batch: int, capacity: int, heads: int, splits: int) -> None:
    """Two KV heads: 16 splits fill 32 places, a split has 128 tokens at least, more than 8 columns are not split."""
    task = attend_task(heads=heads, news=TokenCounts(batch=batch, tokens=1, past=SOMEWHERE))
    task.cache = cache_arrays(capacity=capacity)
    call(library(), "planish_plan_attend", ctypes.byref(task))
    assert task.splits == splits
    parts = batch * 2 * splits * (heads // 2) * 66 * 4
    assert task.workspace_bytes == (COUNTER_BYTES + parts if splits > 1 else 0)


@pytest.mark.parametrize("capacity", [128, 256, 1024, 65536])
@pytest.mark.parametrize("kv_heads", [1, 8, 300, 600])
def test_one_workspace_is_enough_on_every_gpu(capacity: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for without a GPU is what calls of any number of sequences and tokens take at most on any."""
    blocks, asked, most = ctypes.c_int.in_dll(library(), "planish_blocks"), ctypes.c_int64(), 0
    task = AttendTask(heads=4 * kv_heads, score_scale=0.125, news=TokenCounts(batch=8, tokens=1))
    task.cache = changed(CacheArrays(head_dim=64, key_bits=3, value_bits=3), {"capacity": capacity})
    task.cache.kv_heads = kv_heads
    call(library(), "planish_attend_workspace", ctypes.byref(task), ctypes.byref(asked))
    for count, batch, tokens in itertools.product([1, 32, 528, 1024, 5000], range(1, 9), [1, 2, 3]):
        monkeypatch.setattr(blocks, "value", count)
        task.news = TokenCounts(batch=batch, tokens=tokens)
        call(library(), "planish_plan_attend", ctypes.byref(task))
        assert task.workspace_bytes <= asked.value
        most = max(most, task.workspace_bytes)
    # Not twice as much either, and nothing where nothing is split.
    assert asked.value <= 2 * most


def test_tensors_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PackedCache.empty(1, 2, 32, 64, (3, 3), device="cpu")
    past, x = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 4, 2, 64)
    with pytest.raises(ValueError, match="keys are on cpu; kernels take tensors on cuda"):
        append_kv(cache, past, x, x)
    monkeypatch.setattr(on_tensors, "DEVICE", "cpu")
    with pytest.raises(ValueError, match=r"values are \[1, 4, 1, 64\], and must be \[1, 4, 2, 64\]"):
        append_kv(cache, past, x, x[:, :, :1])
    with pytest.raises(ValueError, match=r"keys have strides .*: heads of a token lie side by side"):
        append_kv(cache, past, torch.zeros(1, 2, 4, 64).transpose(1, 2), x)
    with pytest.raises(ValueError, match=r"queries are torch\.float64, and must be float32, float16 or bfloat16"):
        attend_kv(cache, past, x.double())
    with pytest.raises(ValueError, match=r"past are torch\.int64 \[1\], and must be torch\.int32 \[1\], contiguous"):
        attend_kv(cache, past.long(), x)
    with pytest.raises(ValueError, match="there are 2 sequences, and the cache has 1"):
        append_kv(cache, torch.zeros(2, dtype=torch.int32), x.repeat(2, 1, 1, 1), x.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="there are 2 sequences, and the cache has 1"):
        attend_kv(cache, torch.zeros(2, dtype=torch.int32), x.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"first keys are .*\[2, 2, 0, 64\], and must be .*\[1, 2, 0, 64\]"):
        attend_kv(dataclasses.replace(cache, firsts=(torch.zeros(2, 2, 0, 64).half(),) * 2), past, x)
    with pytest.raises(ValueError, match="past is on meta; kernels take tensors on cpu"):
        attend_kv(cache, past.to("meta"), x)
    with pytest.raises(ValueError, match="2 key maps and 1 query maps"):
        append_kv(cache, past, x, x, maps=(torch.eye(64).repeat(2, 1, 1), torch.eye(64)[None]))
