"""What can be measured is opened; float models that are not the bundle's, and other tokenizers, are refused."""

import json
import platform
import shutil
from pathlib import Path

import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import ComparisonError, UnsupportedModelError
from planish.compiler.measure import subject as subject_module
from planish.compiler.measure.subject import check_same_tokens, check_same_vocabulary, float_subject, open_subject
from planish.compiler.measure.texts import Text, text_file
from tests.tiny import write_tiny


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle to change; only its manifest was checked."""
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "bundle"))


def test_bundles_and_checkpoints(bundle: Bundle, tiny: Path) -> None:
    low, full = open_subject(bundle.path, threads=1), open_subject(tiny)
    assert isinstance(low.origin, Bundle)
    assert isinstance(full.origin, Checkpoint)
    for subject in (low, full):
        assert (subject.bos, subject.eos, subject.max_context) == (0, (1,), 256)
    assert low.fingerprint != open_subject(bundle.path, target="portable", threads=1).fingerprint != full.fingerprint
    assert open_subject(bundle.path, target="ort", threads=1).fingerprint == low.fingerprint


def test_what_rounds_otherwise_has_another_fingerprint(
    bundle: Bundle, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprints() -> tuple[str, str]:
        return open_subject(bundle.path, threads=1).fingerprint, open_subject(tiny).fingerprint

    found = fingerprints()
    assert fingerprints() == found
    with monkeypatch.context() as other:
        other.setattr(platform, "machine", lambda: "another")
        assert not {*fingerprints()} & {*found}
    with monkeypatch.context() as other:
        other.setattr(subject_module, "cpu_flags", lambda: ("sse2",))
        assert not {*fingerprints()} & {*found}
    with monkeypatch.context() as other:
        other.setattr(subject_module, "version", lambda _: "1.2.3")
        assert fingerprints()[0] == found[0]
        assert fingerprints()[1] != found[1]
    with monkeypatch.context() as other:
        other.setattr("torch.__version__", "1.2.3")
        assert fingerprints()[1] != found[1]


def test_end_of_text_stands_in_for_a_missing_begin(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "bos_token": None, "eos_token": {"content": "<|eos|>"}}))
    assert open_subject(folder).bos == 1
    path.unlink()
    # Then config.json says it.
    assert open_subject(folder).bos == 0


def test_float_model_of_a_bundle(bundle: Bundle, tiny: Path, float_bundle: Bundle) -> None:
    assert float_subject(bundle).fingerprint == open_subject(tiny).fingerprint
    with pytest.raises(ComparisonError, match=r"has no recipe\.yaml.*--against"):
        float_subject(float_bundle)


def test_float_model_that_is_gone_or_another(copy: Bundle, tmp_path: Path) -> None:
    recipe = copy.path / "recipe.yaml"
    model = tmp_path / "other"
    recipe.write_text(f"model: {model}\nscheme: w4a8k8v8\n")
    with pytest.raises(ComparisonError, match=r"other does not exist.*--against"):
        float_subject(copy)
    write_tiny(model, seed=5)
    with pytest.raises(ComparisonError, match=r"was compiled from another .*other than the one that is there"):
        float_subject(copy)


def test_other_tokenizers(tiny: Path, tmp_path: Path, text: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "other")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content), encoding="utf-8")
    ours, other = open_subject(tiny), open_subject(folder)
    check_same_tokens([ours, ours], text_file(text))
    with pytest.raises(ComparisonError, match="tiny and other have different tokenizers"):
        check_same_tokens([ours, ours, other], text_file(text))
    # Equal on this text, but with other names for the same numbers.
    content["model"]["merges"] = json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    content["added_tokens"][2]["content"] = "<|padding|>"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ComparisonError, match="different tokenizers"):
        check_same_tokens([ours, open_subject(folder)], Text("x", "x"))


def test_other_numbers_of_logits(tiny: Path, tmp_path: Path, text: Path) -> None:
    ours, padded = open_subject(tiny), open_subject(write_tiny(tmp_path / "padded", vocab_size=288))
    check_same_tokens([ours, padded], text_file(text))
    check_same_vocabulary([ours, ours])
    with pytest.raises(ComparisonError, match="tiny and padded have 272 and 288 logits"):
        check_same_vocabulary([ours, padded])


@pytest.mark.parametrize("options", [{"target": "ort"}, {"provider": "cuda"}])
def test_a_checkpoint_is_run_in_one_way(tiny: Path, options: dict[str, str]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"run in float32 on the CPU\. Leave out --target and --provider"):
        open_subject(tiny, **options)  # type: ignore[arg-type]
