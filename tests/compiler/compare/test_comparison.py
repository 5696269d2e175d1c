"""A machine whose speed is measured holds no model that was evaluated."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.compare import comparison
from planish.compiler.compare.comparison import TaskSettings, compare_models
from planish.compiler.measure.subject import Subject
from planish.compiler.measure.texts import text_file
from planish.compiler.progress import Silent
from tests.task_examples import EXAMPLES


def test_no_model_is_in_memory_while_speed_is_measured(
    bundle: Bundle, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra 'eval')")
    opened: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watched(*arguments: Any, open_subject: Any = comparison.open_subject, **options: Any) -> Subject:
        subject: Subject = open_subject(*arguments, **options)
        opened.append(weakref.ref(subject.model))
        return subject

    def measured(*_: Any, **__: Any) -> dict[str, Any]:
        alive.append(sum(model() is not None for model in opened))
        return {}

    monkeypatch.setattr(comparison, "open_subject", watched)
    monkeypatch.setattr(comparison, "measure_sides", measured)
    (tmp_path / "piqa.jsonl").write_text(json.dumps(EXAMPLES["piqa"][0]), encoding="utf-8")
    tasks = TaskSettings(["piqa"], tmp_path, answers=tmp_path / "answers")
    few = {"seqlen": 32, "windows": 1, "threads": 1}
    compare_models([str(tiny), str(bundle.path)], [text_file(text)], Silent(), tasks=tasks, **few)  # type: ignore[arg-type]
    assert (len(opened), alive) == (2, [0])
