"""Checkpoint folders: every variant reads as transformers saved it, and every damage has its own message."""

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from planish.compiler.checkpoint import expected_tensors, files, open_checkpoint
from planish.compiler.checkpoint.tensors import check_finite
from planish.compiler.errors import (
    CheckpointError,
    NonFiniteWeightError,
    PlanishError,
    TokenizerError,
    UnsupportedModelError,
)
from tests.tiny import VARIANTS, write_tiny

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("sharded"), shards=True)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def shard_folder(sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded, tmp_path / "sharded")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_equal_to_transformers(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.names()) == sorted(state)
    for name, tensor in state.items():
        ours = checkpoint.tensor(name)
        assert ours.dtype == checkpoint.dtype(name)
        assert str(ours.dtype) == str(tensor.dtype).removeprefix("torch.")
        assert ours.shape == checkpoint.shape(name) == tuple(tensor.shape)
        np.testing.assert_array_equal(ours.astype(np.float32), tensor.float().numpy(), err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_equal_transformers(variant: str, tmp_path: Path) -> None:
    assert_equal_to_transformers(write_tiny(tmp_path, **VARIANTS[variant]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shards", [False, True])
def test_half_precision_and_shards(dtype: str, shards: bool, tmp_path: Path) -> None:
    write_tiny(tmp_path, dtype=dtype, shards=shards)
    assert (tmp_path / INDEX).exists() == shards
    assert_equal_to_transformers(tmp_path)


def test_attributes(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    assert checkpoint.name == saved.name
    assert checkpoint.config.num_hidden_layers == 2
    assert checkpoint.raw_config == json.loads((saved / "config.json").read_text())
    assert checkpoint.names() == list(expected_tensors(checkpoint.config))


@pytest.mark.parametrize("read", ["tensor", "shape", "dtype"])
def test_unknown_name(saved: Path, read: str) -> None:
    with pytest.raises(KeyError):
        getattr(open_checkpoint(saved), read)("model.layers.2.mlp.up_proj.weight")


def test_rotary_buffers_and_an_equal_tied_head_are_ignored(tmp_path: Path) -> None:
    """What old checkpoints store needlessly is no reason to refuse them."""
    write_tiny(tmp_path, tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_weights(tmp_path, add)
    names = open_checkpoint(tmp_path).names()
    assert "lm_head.weight" not in names
    assert not any("rotary" in name for name in names)


def test_tied_head_that_differs_in_its_last_row(tmp_path: Path) -> None:
    write_tiny(tmp_path, tie_word_embeddings=True, vocab_size=5000)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    change_weights(tmp_path, add)
    with pytest.raises(CheckpointError, match="tie_word_embeddings to false"):
        open_checkpoint(tmp_path)


def test_memory_holds_one_tensor(tmp_path: Path) -> None:
    write_tiny(tmp_path, dtype="bfloat16", vocab_size=16384)
    checkpoint = open_checkpoint(tmp_path)
    size = 16384 * 64 * 2
    tracemalloc.start()
    try:
        for name in checkpoint.names():
            checkpoint.tensor(name)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Beyond the tensor, the check for NaN needs one chunk.
    assert size <= peak < 1.4 * size
    assert left < 0.05 * size


# Damage


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def other_type(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ].to(torch.float64)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 269060552\n"
DAMAGES: dict[str, tuple[Callable[[Path], Any], type[PlanishError], str]] = {
    "no_config": (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json does not exist"),
    "config_cut": (
        lambda f: cut(f / "config.json", 40),
        CheckpointError,
        "config.json cannot be read as JSON",
    ),
    "no_weights": (lambda f: (f / WEIGHTS).unlink(), CheckpointError, "holds no weights"),
    "weights_cut": (
        lambda f: cut(f / WEIGHTS, 100_000),
        CheckpointError,
        "is truncated: 100000 bytes instead",
    ),
    "header_cut": (lambda f: cut(f / WEIGHTS, 1000), CheckpointError, "header does not fit"),
    "empty": (lambda f: cut(f / WEIGHTS, 0), CheckpointError, "header does not fit"),
    "pointer": (lambda f: (f / WEIGHTS).write_text(LFS_POINTER), CheckpointError, "run git lfs pull in "),
    "no_json": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 4) + b"abcd" + bytes(9)),
        CheckpointError,
        "header is no JSON",
    ),
    "longer": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"0000"),
        CheckpointError,
        "longer than its header says",
    ),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), CheckpointError, "save_pretrained"),
    "missing": (
        lambda f: change_weights(f, lambda t: t.pop(Q_PROJ)),
        CheckpointError,
        f"lacks {Q_PROJ}, which config.json asks for",
    ),
    "no_head": (
        lambda f: change_weights(f, lambda t: t.pop("lm_head.weight")),
        CheckpointError,
        "set tie_word_embeddings to true",
    ),
    "shape": (
        lambda f: change_config(f, intermediate_size=192),
        CheckpointError,
        r"mlp.gate_proj.weight is \[160, 64\] and should be \[192, 64\].*and \d more",
    ),
    "unknown_tensor": (
        lambda f: change_weights(f, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})),
        UnsupportedModelError,
        "does not use: model.layers.0.self_attn.q_norm.weight",
    ),
    "more_layers": (
        lambda f: change_config(f, num_hidden_layers=1),
        UnsupportedModelError,
        "model.layers.1.",
    ),
    "float64": (lambda f: change_weights(f, other_type), UnsupportedModelError, "weights of type F64"),
    "other_model": (lambda f: change_config(f, model_type="gemma"), UnsupportedModelError, "'gemma'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, folder: Path) -> None:
    inflict, error, message = DAMAGES[damage]
    inflict(folder)
    with pytest.raises(error, match=message):
        open_checkpoint(folder)


def test_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(UnsupportedModelError, match="adapter"):
        open_checkpoint(folder)


def test_missing_shard(shard_folder: Path) -> None:
    shard = sorted(shard_folder.glob("model-00003*"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {shard.name}.*missing shards"):
        open_checkpoint(shard_folder)


def test_index_that_lies(shard_folder: Path) -> None:
    index = json.loads((shard_folder / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"][Q_PROJ] = next(s for s in shards if s != index["weight_map"][Q_PROJ])
    (shard_folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"lacks {Q_PROJ}, which {INDEX} says"):
        open_checkpoint(shard_folder)


def test_index_without_map(shard_folder: Path) -> None:
    (shard_folder / INDEX).write_text('{"metadata": {}}')
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(shard_folder)


def test_index_of_no_names(shard_folder: Path) -> None:
    (shard_folder / INDEX).write_text(json.dumps({"weight_map": {Q_PROJ: 1}}))
    with pytest.raises(CheckpointError, match="no weight_map of file names"):
        open_checkpoint(shard_folder)


def test_shards_in_a_folder_of_their_own(shard_folder: Path) -> None:
    expected = open_checkpoint(shard_folder).tensor(Q_PROJ)
    index, inside = json.loads((shard_folder / INDEX).read_text()), shard_folder / "shards"
    inside.mkdir()
    for shard in set(index["weight_map"].values()):
        (shard_folder / shard).rename(inside / shard)
    index["weight_map"] = {name: f"shards/{shard}" for name, shard in index["weight_map"].items()}
    (shard_folder / INDEX).write_text(json.dumps(index))
    np.testing.assert_array_equal(open_checkpoint(shard_folder).tensor(Q_PROJ), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bad_weight_is_found(dtype: str, value: float, tmp_path: Path) -> None:
    write_tiny(tmp_path, dtype=dtype)
    change_weights(tmp_path, lambda t: t[Q_PROJ].__setitem__((63, 5), value))
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.tensor(Q_PROJ.replace("q_proj", "o_proj"))
    with pytest.raises(NonFiniteWeightError, match=rf"{Q_PROJ} holds -?(nan|inf) at \[63, 5\]"):
        checkpoint.tensor(Q_PROJ)


def test_bad_weight_far_into_a_tensor() -> None:
    weights = np.zeros((3000, 64), ml_dtypes.bfloat16)
    weights[2999, 1] = np.nan
    with pytest.raises(NonFiniteWeightError, match=r"at \[2999, 1\]"):
        check_finite("w", weights)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_largest_numbers_are_finite(dtype: Any, folder: Path) -> None:
    largest = torch.from_numpy(np.array([ml_dtypes.finfo(dtype).max] * 64, np.float32)) * torch.tensor([1.0, -1.0] * 32)
    kind = getattr(torch, np.dtype(dtype).name)
    change_weights(folder, lambda t: t.update({"model.norm.weight": largest.to(kind)}))
    assert float(abs(open_checkpoint(folder).tensor("model.norm.weight").astype(np.float32)).max()) == largest[0]


# Fingerprint and sidecars


def test_fingerprint_sees_one_weight(folder: Path, saved: Path) -> None:
    before = open_checkpoint(folder).fingerprint()
    assert before == open_checkpoint(saved).fingerprint()
    change_weights(folder, lambda t: t[Q_PROJ].__setitem__((3, 3), 1.5))
    assert open_checkpoint(folder).fingerprint() != before


def test_fingerprint_sees_every_tensor_of_a_large_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Windows of 64 bytes at half a megabyte from each other: most tensors lie between two.
    monkeypatch.setattr(files, "_WHOLE", 0)
    monkeypatch.setattr(files, "_WINDOW", 64)
    monkeypatch.setattr(files, "_STRIDE", 1 << 19)
    before = open_checkpoint(folder).fingerprint()
    names = list(load_file(folder / WEIGHTS))
    for name in names:
        kept = (folder / WEIGHTS).read_bytes()
        change_weights(folder, lambda tensors, name=name: tensors[name].add_(1))  # type: ignore[misc]
        assert open_checkpoint(folder).fingerprint() != before, name
        (folder / WEIGHTS).write_bytes(kept)
    assert open_checkpoint(folder).fingerprint() == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_fingerprint_sees_other_files(name: str, folder: Path) -> None:
    before = open_checkpoint(folder).fingerprint()
    (folder / name).write_text((folder / name).read_text() + "\n")
    assert open_checkpoint(folder).fingerprint() != before


def test_sidecars_come_as_they_were(folder: Path, tmp_path: Path) -> None:
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "README.md").write_text("stays behind")
    out = tmp_path / "out"
    open_checkpoint(folder).write_sidecars(out)
    expected = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    assert {path.name for path in out.iterdir()} == expected
    for name in expected:
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").unlink()
    checkpoint = open_checkpoint(folder)
    for use in (checkpoint.check_tokenizer, lambda: checkpoint.write_sidecars(tmp_path / "out")):
        with pytest.raises(TokenizerError, match="holds no tokenizer"):
            use()


def test_damaged_tokenizer(folder: Path) -> None:
    cut(folder / "tokenizer.json", 300)
    with pytest.raises(TokenizerError, match=r"tokenizer.json cannot be read .* Download it again"):
        open_checkpoint(folder).check_tokenizer()
    (folder / "tokenizer.json").write_text(LFS_POINTER)
    with pytest.raises(TokenizerError, match=r"tokenizer.json cannot be read .* run git lfs pull in "):
        open_checkpoint(folder).check_tokenizer()


def test_old_tokenizer_is_converted(folder: Path, tmp_path: Path) -> None:
    """A byte-level tokenizer given as vocab.json and merges.txt, the form before tokenizer.json."""
    state = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in state["merges"]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|pad|>"}')
    checkpoint = open_checkpoint(folder)
    checkpoint.check_tokenizer()
    checkpoint.write_sidecars(tmp_path / "out")
    from tokenizers import Tokenizer

    text = "the tin man's otter"
    ids = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(text).ids
    assert ids == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert len(ids) < len(text)
