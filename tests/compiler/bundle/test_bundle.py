"""A bundle opens, says what it is, and refuses to open damaged, foreign or newer ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import MANIFEST_FILE
from planish.compiler.errors import BundleCorruptError, BundleFormatError, NotPlanishModelError


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return shutil.copytree(bundle.path, tmp_path / "copy")


def test_a_copied_bundle_opens(copy: Path, bundle: Bundle) -> None:
    opened = Bundle.open(copy)
    assert opened.manifest == bundle.manifest
    assert str(opened.scheme) == "w4a8k8v8"
    assert str(opened.scheme.lm_head) == "w8a8"
    assert opened.config.num_hidden_layers == 2
    assert opened.manifest.targets == ("ort",)


def test_every_file_is_in_the_manifest(bundle: Bundle) -> None:
    files = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert set(bundle.manifest.files) == files - {MANIFEST_FILE}


@pytest.mark.parametrize("name", ["model.onnx.data", "engines/ort/model.onnx", "tokenizer.json", "plan.json"])
def test_a_changed_byte_is_found(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleCorruptError, match=f"{name} is not the file that was compiled"):
        Bundle.open(copy)
    Bundle.open(copy, verify=False)


def test_a_truncated_and_a_missing_file_are_found(copy: Path) -> None:
    path = copy / "model.onnx.data"
    os.truncate(path, 100)
    with pytest.raises(BundleCorruptError, match=r"model\.onnx\.data has 100 bytes instead of"):
        Bundle.open(copy)
    path.unlink()
    with pytest.raises(BundleCorruptError, match=r"lacks model\.onnx\.data"):
        Bundle.open(copy)


def change_manifest(folder: Path, **values: object) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_newer_format_asks_for_an_upgrade(copy: Path) -> None:
    # A newer format may have any fields; its version is what is looked at first.
    change_manifest(copy, format_version=2, planish_version="9.1", files="elsewhere")
    with pytest.raises(BundleFormatError, match=r"format 2, written by planish 9\.1.*Upgrade"):
        Bundle.open(copy)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 1}', '{"format_version": "x"}'])
def test_an_unreadable_manifest(copy: Path, content: str) -> None:
    (copy / MANIFEST_FILE).write_text(content)
    with pytest.raises(BundleCorruptError, match=MANIFEST_FILE):
        Bundle.open(copy)


def test_what_is_no_bundle(bundle: Bundle, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(NotPlanishModelError, match="does not exist"):
        Bundle.open(tmp_path / "no")
    with pytest.raises(NotPlanishModelError, match=f"holds no {MANIFEST_FILE}"):
        Bundle.open(tiny)
    with pytest.raises(NotPlanishModelError, match=f"is a file of the bundle {bundle.path}"):
        Bundle.open(bundle.path / "engines" / "ort" / "model.onnx")
    foreign = tmp_path / "model.onnx"
    onnx.save(onnx.ModelProto(producer_name="someone"), foreign)
    with pytest.raises(NotPlanishModelError, match="is not a bundle that planish wrote"):
        Bundle.open(foreign)


def test_end_tokens_of_generation_config_win(copy: Path) -> None:
    path = copy / "generation_config.json"
    for value, expected in ((7, (7,)), ([3, 4], (3, 4)), (None, (1,))):
        path.write_text(json.dumps({"eos_token_id": value}))
        assert Bundle.open(copy, verify=False).eos_token_ids == expected
    path.unlink()
    assert Bundle.open(copy, verify=False).eos_token_ids == (1,)


def test_sessions_are_kept_and_both_models_agree(bundle: Bundle) -> None:
    assert bundle.session(threads=1) is bundle.session(threads=1)
    lowered, _ = bundle.session("ort", threads=1).run([[5, 6, 7, 8, 9]])
    portable, _ = bundle.session("portable", threads=1).run([[5, 6, 7, 8, 9]])
    assert abs(lowered - portable).max() <= 1e-3 * (portable.max() - portable.min())


def test_targets_that_are_not_there(bundle: Bundle, float_bundle: Bundle) -> None:
    with pytest.raises(NotPlanishModelError, match="compiled for ort, not for rtx"):
        bundle.engine("rtx")
    with pytest.raises(NotPlanishModelError, match="compiled for no target, not for ort"):
        float_bundle.session("ort")
    with pytest.raises(ValueError, match="'rtx'"):
        bundle.session("rtx")
    assert float_bundle.model_path() == float_bundle.path / "model.onnx"


def test_generated_pieces_are_the_text_of_the_tokens(bundle: Bundle) -> None:
    whole = "".join(bundle.generate("the hen", max_new_tokens=12, threads=1))
    again = "".join(bundle.generate("the hen", max_new_tokens=12, threads=1, chunk=2))
    assert whole == again
    assert whole != "".join(bundle.generate("the hen", chat=True, max_new_tokens=12, threads=1))


def test_only_plain_prompts_get_the_tokens_the_tokenizer_adds(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A chat template writes its special tokens itself; a second BOS would change what the model sees.
    path = copy / "tokenizer.json"
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [bos, sequence],
        "pair": [bos, sequence, sequence],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": processor}))
    prompts: list[list[int]] = []
    monkeypatch.setattr("planish.compiler.bundle.bundle.generate", lambda _, prompt, **__: prompts.append(prompt) or [])
    opened = Bundle.open(copy, verify=False)
    for chat in (False, True):
        list(opened.generate("hi", chat=chat, threads=1))
    assert prompts[0] == opened.tokenizer.encode("hi")
    assert [prompt[0] == 0 for prompt in prompts] == [True, False]


def test_running_a_bundle_imports_neither_torch_nor_transformers(bundle: Bundle, text: Path) -> None:
    show = f"""
import sys
from planish.compiler import Bundle, evaluate, inspect
bundle = Bundle.open({str(bundle.path)!r})
list(bundle.generate("the hen", chat=True, max_new_tokens=2, threads=1))
evaluate(bundle.session(threads=1), bundle.tokenizer, {str(text)!r}, seqlen=8, windows=1)
inspect(bundle)
print(*sorted({{"torch", "transformers", "onnx_ir", "tensorrt_rtx"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
