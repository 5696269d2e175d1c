"""Perplexity is exp of transformers' own loss; impossible requests name what is possible."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.errors import TextError
from planish.compiler.measure import evaluation
from planish.compiler.measure.evaluation import evaluate
from planish.compiler.measure.texts import read_text


@pytest.mark.parametrize("positions", [512, 20])
def test_perplexity_is_that_of_transformers(
    float_bundle: Bundle, tiny: Path, text: Path, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Cut to 20 positions, a window takes four runs through the cache.
    monkeypatch.setattr(evaluation, "_POSITIONS", positions)
    found = evaluate(float_bundle.session(threads=1), float_bundle.tokenizer, text, seqlen=64, windows=3)

    model = LlamaForCausalLM.from_pretrained(tiny)
    ids = AutoTokenizer.from_pretrained(tiny)(text.read_text(encoding="utf-8"))["input_ids"]
    with torch.no_grad():
        rows = torch.tensor(ids[: 3 * 64]).reshape(3, 64)
        losses = [model(row[None], labels=row[None]).loss.item() for row in rows]
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert (found.tokens, found.windows, found.seqlen) == (3 * 63, 3, 64)


def test_low_bit_perplexity_differs_from_float(bundle: Bundle, float_bundle: Bundle, text: Path) -> None:
    low, full = (
        evaluate(b.session(threads=1), b.tokenizer, text, seqlen=64, windows=2) for b in (bundle, float_bundle)
    )
    assert low.perplexity != full.perplexity
    assert low.perplexity == pytest.approx(full.perplexity, rel=0.2)


def test_windows_beyond_the_text(float_bundle: Bundle, text: Path) -> None:
    tokenizer = float_bundle.tokenizer
    fit = len(tokenizer.encode(read_text(text))) // 64
    session = float_bundle.session(threads=1)
    with pytest.raises(TextError, match=f"{fit} windows of 64 fit, {fit + 1} were asked for"):
        evaluate(session, tokenizer, text, seqlen=64, windows=fit + 1)
    assert evaluate(session, tokenizer, text, seqlen=64, windows=fit).windows == fit


@pytest.mark.parametrize(("seqlen", "windows"), [(1, 1), (16, 0)])
def test_windows_that_predict_nothing(float_bundle: Bundle, text: Path, seqlen: int, windows: int) -> None:
    with pytest.raises(TextError, match="predict nothing"):
        evaluate(float_bundle.session(threads=1), float_bundle.tokenizer, text, seqlen=seqlen, windows=windows)


def test_jsonl_texts_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = ["one", "two\nlines", "a\u2028b"]
    path.write_text("\n".join(json.dumps({"text": t, "id": 1}, ensure_ascii=False) for t in texts) + "\n\n")
    assert read_text(path) == "one\n\ntwo\nlines\n\na\u2028b"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", b" \n", "holds no text"),
        ("text.txt", b"\xff\xfe", "cannot be read"),
        ("text.jsonl", b'{"text": "a"}\nx\n', "line 2: not JSON"),
        ("text.jsonl", b'{"text": 3}\n', "line 1: no field 'text'"),
    ],
)
def test_unusable_texts(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_text(tmp_path / name)


def test_missing_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="cannot be read"):
        read_text(tmp_path / "no.txt")
