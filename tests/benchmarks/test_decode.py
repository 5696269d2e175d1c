"""The benchmark of decoding as far as a host goes: the peer against transformers, the table, the words."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.gpu.decode import Peer, Row, main, measure, peer_model, table_of
from planish.compiler.errors import TextError
from tests.tiny import write_tiny


def test_the_peer_decodes_as_transformers_does(tmp_path: Path) -> None:
    """Over its static cache it gives the logits of the whole text at once, a second time too."""
    peer = Peer(peer_model(write_tiny(tmp_path / "tiny") / "config.json", torch.device("cpu")), 32)
    assert {each.dtype for each in peer.model.parameters()} == {torch.float16}
    for prompt in ([5, 9, 40, 7], [8]):
        logits, ids = [peer.prefill(prompt).clone()], list(prompt)
        for _ in range(6):
            ids.append(int(logits[-1].argmax()))
            logits.append(peer.step().clone())
        with torch.inference_mode():
            expected = peer.model(torch.tensor([ids])).logits[0, len(prompt) - 1 :]
        torch.testing.assert_close(torch.cat(logits), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_the_table() -> None:
    console = Console(width=130, record=True)
    console.print(table_of([Row("planish", 500.0, 0.2), Row("peer", 1250.0, 0.4)], "card"))
    text = console.export_text()
    assert [each.split() for each in text.splitlines() if "peer" in each] == [
        ["│", "peer", "│", "1250", "│", "800", "│", "2.50", "│", "0.40", "│"]
    ]


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no GPU, and these are tokens per second on one"):
        main(["out/smollm2"])


def test_more_tokens_than_there_is_room_for() -> None:
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(max_context=256))
    with pytest.raises(TextError, match=r"has room for 256 tokens, and 128 of prompt, 126 decoded and 3 .* are 257"):
        measure(bundle, 128, 126)
