"""Perplexity is exp of transformers' own loss, divergence that of its distributions; what cannot be names what can."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.errors import TextError
from planish.compiler.measure import evaluation
from planish.compiler.measure.evaluation import evaluate, evaluate_windows
from planish.compiler.measure.texts import cut_windows, read_text, text_file


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


def test_divergence_is_that_of_the_distributions(
    bundle: Bundle, float_bundle: Bundle, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_POSITIONS", 20)
    monkeypatch.setattr(evaluation, "_ROWS", 7)
    cut = cut_windows(bundle.tokenizer, text_file(text), 32, 2)
    low, full = bundle.session(threads=1), float_bundle.session(threads=1)
    found, of_reference = evaluate_windows([low, full], cut, full)

    model = LlamaForCausalLM.from_pretrained(tiny).double()
    kls, same = [], []
    for window in cut:
        with torch.no_grad():
            expected = model(torch.from_numpy(window[None])).logits[0, :-1].log_softmax(-1)
        actual = torch.from_numpy(low.run(window[None])[0][0, :-1]).double().log_softmax(-1)
        kls.append(torch.nn.functional.kl_div(actual, expected, reduction="none", log_target=True).sum(-1))
        same.append(actual.argmax(-1) == expected.argmax(-1))
    assert found.kl == pytest.approx(torch.cat(kls).mean().item(), rel=1e-4)
    assert found.kl > 0
    assert found.agreement == pytest.approx(torch.cat(same).double().mean().item())
    assert (of_reference.kl, of_reference.agreement) == (0.0, 1.0)
    assert of_reference.perplexity == evaluate_windows([full], cut)[0].perplexity


def test_the_reference_runs_once(float_bundle: Bundle, text: Path) -> None:
    runs = []

    class Counting:
        def run(self, *arguments: Any, **options: Any) -> Any:
            runs.append(self)
            return float_bundle.session(threads=1).run(*arguments, **options)

    reference, other = Counting(), Counting()
    cut = cut_windows(float_bundle.tokenizer, text_file(text), 16, 3)
    evaluate_windows([other, reference], cut, reference)
    assert runs.count(reference) == runs.count(other) == 3


def test_without_a_reference_there_is_no_divergence(float_bundle: Bundle, text: Path) -> None:
    found = evaluate(float_bundle.session(threads=1), float_bundle.tokenizer, text, seqlen=32, windows=1)
    assert (found.kl, found.agreement) == (None, None)
