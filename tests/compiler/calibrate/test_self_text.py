"""What the model writes is drawn from its own probabilities, as transformers gives them, and repeats with the seed."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as _Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.calibrate import self_text
from planish.compiler.calibrate.self_text import sample_tokens
from planish.compiler.calibrate.text import calibration_tokens
from planish.compiler.calibrate.vocabulary import fragments
from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.errors import DiskFullError
from planish.compiler.export.float_model import export_float
from planish.compiler.progress import Silent
from planish.compiler.runtime.session import Session
from planish.compiler.runtime.tokenizer import Tokenizer
from planish.compiler.verify.oracle import Oracle
from planish.passes.scheme import Scheme


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sessions opened here take one thread, as all tests do."""
    monkeypatch.setattr(self_text, "Session", lambda model: Session(model, threads=1))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, which must be empty at the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(count)]


def test_the_seed_repeats(checkpoint: Checkpoint, scratch: Path) -> None:
    one, again, other = (calibration_tokens("self", checkpoint, nsamples=3, seqlen=24, seed=s) for s in (5, 5, 6))
    assert (one.shape, one.dtype) == ((3, 24), np.int64)
    assert np.array_equal(one, again)
    # Each row has draws of its own, in each run.
    assert len({tuple(row) for row in [*one.tolist(), *other.tolist()]}) == 6
    assert one.min() >= 0
    assert one.max() < checkpoint.config.vocab_size


def test_a_random_word_starts_what_no_bos_does(tiny: Path, checkpoint: Checkpoint, scratch: Path) -> None:
    first = calibration_tokens("self", checkpoint, nsamples=12, seqlen=16)[:, 0]
    assert len(set(first.tolist())) > 6
    assert not fragments(Tokenizer(tiny), first.tolist())


def test_the_bos_that_the_tokenizer_adds_starts_each(tiny: Path, tmp_path: Path, scratch: Path) -> None:
    folder = tmp_path / "bos"
    shutil.copytree(tiny, folder)
    tokenizer = _Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    found = calibration_tokens("self", open_checkpoint(folder), nsamples=4, seqlen=16)
    assert (found[:, 0] == 0).all()
    assert len({tuple(row) for row in found[:, 1:].tolist()}) == 4


def test_draws_follow_the_probabilities(tiny: Path, float_bundle: Bundle) -> None:
    samples = 4000
    starts = np.tile(np.array([[17, 40, 99]]), (samples, 1))
    found = sample_tokens(float_bundle.session(threads=1), starts, 4, generators(samples), Silent())
    assert np.array_equal(found[:, :3], starts)

    model = LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        top = model(torch.tensor([[17, 40, 99]])).logits[0, -1].topk(50)
    probabilities = top.values.softmax(0).numpy()
    seen = np.array([(found[:, 3] == token).sum() for token in top.indices.tolist()])
    assert seen.sum() == samples
    # Pearson's statistic has mean 49 and variance 98 here; this is 5 standard deviations.
    expected = probabilities * samples
    assert ((seen - expected) ** 2 / expected).sum() < 49 + 5 * 98**0.5


def test_each_token_is_likely_given_all_before_it(tiny: Path, float_bundle: Bundle) -> None:
    found = sample_tokens(float_bundle.session(threads=1), np.arange(20, 26)[:, None], 40, generators(6), Silent())
    model = LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        logits = model(torch.from_numpy(found)).logits
    rank = (logits[:, :-1] > logits[:, :-1].gather(2, torch.from_numpy(found[:, 1:, None]))).sum(2)
    assert rank.max() < 50


def test_batches_differ_in_nothing(float_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    session, starts = float_bundle.session(threads=1), np.arange(20, 25)[:, None]
    whole = sample_tokens(session, starts, 12, generators(5), Silent())
    steps: list[tuple[Any, ...]] = []

    class Steps(Silent):
        def step(self, stage: str, done: int, total: int) -> None:
            steps.append((done, total))

    # Room for the cache of two sequences, then for none: one at a time all the same.
    for room, batches in ((2, 3), (0, 5)):
        monkeypatch.setattr(self_text, "_CACHE_BYTES", room * 12 * session.cache_bytes_per_token)
        steps.clear()
        assert np.array_equal(sample_tokens(session, starts, 12, generators(5), Steps()), whole)
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1] == (12 * batches, 12 * batches)


def test_what_a_killed_run_left_is_removed(
    checkpoint: Checkpoint, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, at = tmp_path / "flatten", []
    left = folder / "float" / "model.onnx.data"
    left.parent.mkdir(parents=True)
    left.touch()

    def export(source: Checkpoint, to: Path) -> Path:
        at.append((to, left.exists()))
        return export_float(source, to)

    monkeypatch.setattr(self_text, "export_float", export)
    given = {"nsamples": 2, "seqlen": 16}
    found = calibration_tokens("self", checkpoint, scratch=folder, **given)
    assert at == [(left.parent, False)]
    assert list(folder.iterdir()) == []
    assert np.array_equal(found, calibration_tokens("self", checkpoint, **given))


def test_a_full_disk(checkpoint: Checkpoint, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 999, 1))
    with pytest.raises(DiskFullError, match="MB free"):
        calibration_tokens("self", checkpoint, nsamples=1, seqlen=16)


@pytest.mark.slow
def test_smollm2_writes_text() -> None:
    checkpoint = open_checkpoint("smollm2")
    found = torch.from_numpy(calibration_tokens("self", checkpoint, nsamples=4, seqlen=128))
    logits = Oracle(checkpoint, Scheme.parse("w16a16k16v16"), no_codes).logits(found)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), found[:, 1:].flatten())
    # Its perplexity on what it wrote: a loop would have 1, a wrong cache or wrong positions hundreds.
    assert 3 < loss.exp() < 40


def no_codes(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not quantised in a float scheme")
