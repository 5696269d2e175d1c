"""The benchmark of attention as far as a host goes: cases, the table, and every call of ours on a small cache."""

import dataclasses

import pytest
import torch
from rich.console import Console

from benchmarks.gpu import attention
from benchmarks.gpu.attention import GOALS, HEADS, Case, Row, all_cases, main, table_of
from planish.plugins import kv_ops, on_tensors
from tests.kv_emulation import library


def test_every_goal_has_its_case() -> None:
    found = {(each.what, each.bits, each.kv_heads, each.tokens, each.batch): each.goal for each in all_cases()}
    for kv_heads in (HEADS, HEADS // 4):
        for bits, goal in GOALS.items():
            assert found["attend", bits, kv_heads, 8192, 8] == goal
    assert all(found["attend", bits, HEADS // 4, 1024, 1] == 0.9 for bits in GOALS)
    assert {goal for key, goal in found.items() if key[0] == "append"} == {1 / 1.5}


def test_bytes_of_a_cache() -> None:
    """By hand: 52 bytes to a head and token for keys, as many for values."""
    assert Case("attend", 3, 8, 8192, 8, 1, 2.6).cache_bytes == 8 * 8 * 8192 * 2 * 52


def test_the_table() -> None:
    case = Case("attend", 3, 8, 8192, 8, 1, 2.6)
    console = Console(width=150, record=True)
    console.print(table_of([Row(case, 100.0, "flash", 250.0), Row(case, 50.0, "cuDNN", 250.0)], "card"))
    text = console.export_text()
    assert "attend K3V3 GQA 4, 8192 tokens, batch 8, new 1" in text
    assert "2.60 missed" in text
    assert "2.60 met" in text


@pytest.mark.parametrize("what", ["attend", "append"])
def test_our_calls(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_tensors, "DEVICE", "cpu")
    monkeypatch.setattr(kv_ops, "kv_library", library)
    monkeypatch.setattr(attention, "copies_for", lambda size: 2)
    case = dataclasses.replace(next(iter(all_cases())), what=what, kv_heads=8, tokens=128, batch=1, new=3)
    if what == "append":
        ours, copies = attention._append_calls(case, torch.device("cpu"))
        assert (len(ours), len(copies)) == (4, 4)
        for call in (*ours, *copies):
            call()
    else:
        calls = attention._attend_calls(case, torch.device("cpu"))
        assert len(calls) == 2
        assert all(torch.isfinite(call()).all() for call in calls)


def test_no_gpu_and_no_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"finds no GPU, .* 13 cases are waiting"):
        main([])
    with pytest.raises(SystemExit, match="no case contains 'K9'"):
        main(["--only", "K9"])
