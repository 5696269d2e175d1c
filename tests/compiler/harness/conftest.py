"""The float model in this project's two ways and in transformers, and files of examples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.measure.subject import Subject, open_subject
from tests.task_examples import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the lines of a task's file, examples or plain text, and returns the folder."""

    def write(task: str, *lines: Any) -> Path:
        folder = tmp_path / "examples"
        folder.mkdir(exist_ok=True)
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (folder / f"{task}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def theirs(tiny: Path) -> LlamaForCausalLM:
    """The tiny model in transformers."""
    return LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def of_bundle(float_bundle: Bundle) -> Subject:
    """The float export, run by ONNX Runtime."""
    return open_subject(float_bundle.path, threads=1)


@pytest.fixture(scope="session")
def of_checkpoint(tiny: Path) -> Subject:
    """The checkpoint, run by transformers."""
    return open_subject(tiny, threads=1)


@pytest.fixture(params=["of_bundle", "of_checkpoint"])
def subject(request: pytest.FixtureRequest) -> Subject:
    """Either of the two."""
    found: Subject = request.getfixturevalue(request.param)
    return found
