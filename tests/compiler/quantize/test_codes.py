"""Quantising a checkpoint: what is written, how large it is, and how an interrupted run goes on."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.compiler.quantize.codes import CodesOnDisk, module_groups, quantize_checkpoint
from planish.passes.scheme import Scheme
from tests.tiny import write_tiny

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_tiny(tmp_path_factory.mktemp("tiny")))


def test_one_file_per_block_and_one_for_the_head(checkpoint: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    quantize_checkpoint(checkpoint, Scheme.parse("w4a8"), tmp_path, lambda *part: seen.append(part))
    parts = ["model.layers.0", "model.layers.1", "lm_head"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{part}.safetensors" for part in parts)
    assert seen == [(part, i, 3) for i, part in enumerate(parts, 1)]


def test_groups_name_every_linear(checkpoint: Checkpoint) -> None:
    groups = module_groups(checkpoint, Scheme.parse("w4a8"))
    for i in range(2):
        assert sorted(groups[f"model.layers.{i}"]) == sorted(f"model.layers.{i}.{name}" for name in (*LINEARS, *MLP))
    assert groups["lm_head"] == ["lm_head"]
    assert module_groups(checkpoint, Scheme.parse("w16a16k4v4")) == {}
    assert "lm_head" not in module_groups(checkpoint, Scheme.parse("w4a8", lm_head="w16a16"))


@pytest.mark.parametrize("scheme", ["w4a8", "w3a3", "w2a16g32", "w8a8", "w4a16g64"])
@pytest.mark.parametrize("module", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj", "lm_head"])
def test_what_is_stored_is_what_was_found(scheme: str, module: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    parsed = Scheme.parse(scheme)
    codes = quantize_checkpoint(checkpoint, parsed, tmp_path)
    form = parsed.lm_head if module == "lm_head" else parsed.linear
    expected = quantize_weight(torch.from_numpy(checkpoint.tensor(f"{module}.weight")), form)
    found = codes.quantized(module)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert (found.bits, found.group) == (expected.bits, expected.group)
    assert codes.out_features(module) == found.codes.shape[0]
    assert codes.in_features(module) == found.codes.shape[1]
    assert codes.read(module).scale.dtype == (np.float32 if form.group is None else np.float16)


def test_a_tied_head_is_quantised_from_the_embedding(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path, tie_word_embeddings=True))
    scheme = Scheme.parse("w4a8")
    found = quantize_checkpoint(checkpoint, scheme, tmp_path / "codes").quantized("lm_head")
    expected = quantize_weight(torch.from_numpy(checkpoint.tensor("model.embed_tokens.weight")), scheme.lm_head)
    assert torch.equal(found.codes, expected.codes)


def test_half_precision_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path, dtype="bfloat16"))
    module = "model.layers.0.mlp.up_proj"
    scheme = Scheme.parse("w4a8")
    found = quantize_checkpoint(checkpoint, scheme, tmp_path / "codes").quantized(module)
    weight = torch.from_numpy(checkpoint.tensor(f"{module}.weight").astype(np.float32))
    assert torch.equal(found.codes, quantize_weight(weight, scheme.linear).codes)


@pytest.mark.parametrize("scheme", ["w2a8", "w3a3", "w4a4", "w8a8", "w4a16g128", "w3a16g128", "w2a16g64"])
def test_bits_on_disk(scheme: str, tmp_path: Path) -> None:
    """At SmolLM2's widths the codes and scales of a block take at most bits + 0.25 bit per weight."""
    widths = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    checkpoint = open_checkpoint(write_tiny(tmp_path, num_hidden_layers=1, **widths))
    parsed = Scheme.parse(scheme, lm_head="w16a16")
    quantize_checkpoint(checkpoint, parsed, tmp_path / "codes")
    weights = sum(checkpoint.tensor(f"model.layers.0.{name}.weight").size for name in (*LINEARS, *MLP))
    stored = 0
    with safe_open(tmp_path / "codes" / "model.layers.0.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118  (the file is no mapping)
            tensor = file.get_tensor(name)
            stored += tensor.nbytes
            k = 1536 if "down_proj" in name else 576
            if name.endswith(".codes"):
                assert tensor.nbytes * 8 == parsed.linear.weight_bits * tensor.shape[0] * k
    bits = stored * 8 / weights
    assert bits <= parsed.linear.weight_bits + 0.25
    by_k = {k: parsed.linear.average_bits(k) for k in (576, 1536)}
    assert min(by_k.values()) <= bits <= max(by_k.values())
    # The file as a whole, with its header, is no larger than that by more than a few names.
    assert (tmp_path / "codes" / "model.layers.0.safetensors").stat().st_size < stored + 4096


class KilledError(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_stopped(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, read, asked = Scheme.parse("w4a8"), checkpoint._read, list[str]()

    def read_until(name: str) -> npt.NDArray[Any]:
        if name.startswith("model.layers.1.mlp"):
            raise KilledError
        return read(name)

    monkeypatch.setattr(checkpoint, "_read", read_until)
    with pytest.raises(KilledError):
        quantize_checkpoint(checkpoint, scheme, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.layers.0.safetensors"]

    def read_and_note(name: str) -> npt.NDArray[Any]:
        asked.append(name)
        return read(name)

    monkeypatch.setattr(checkpoint, "_read", read_and_note)
    resumed = quantize_checkpoint(checkpoint, scheme, tmp_path)
    assert asked
    assert not any("layers.0" in name for name in asked)
    at_once = quantize_checkpoint(checkpoint, scheme, tmp_path / "again")
    for modules in module_groups(checkpoint, scheme).values():
        for module in modules:
            assert torch.equal(resumed.quantized(module).codes, at_once.quantized(module).codes)


def test_a_file_cut_while_writing_is_written_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "model.layers.0.part").write_bytes(b"half a file")
    codes = quantize_checkpoint(checkpoint, Scheme.parse("w4a8"), tmp_path)
    assert codes.read("model.layers.0.mlp.up_proj").packed.shape == (160, 32)
    assert not list(tmp_path.glob("*.part"))


def test_scaled_codes_are_the_same_codes_at_other_scales(checkpoint: Checkpoint, tmp_path: Path) -> None:
    scheme = Scheme.parse("w3a3k3v3", "w16a16")
    rounded = quantize_checkpoint(checkpoint, scheme, tmp_path / "rounded")
    (tmp_path / "scaled").mkdir()
    scaled = CodesOnDisk(tmp_path / "scaled", checkpoint, scheme)
    generator = torch.Generator().manual_seed(0)
    modules = [name for names in module_groups(checkpoint, scheme).values() for name in names]
    factors = {name: torch.rand(rounded.out_features(name), generator=generator) + 0.5 for name in modules}
    scaled.keep_scaled(rounded, factors)
    for name in modules:
        before, after = rounded.quantized(name), scaled.quantized(name)
        assert torch.equal(after.codes, before.codes)
        torch.testing.assert_close(dequantize_weight(after), dequantize_weight(before) * factors[name][:, None])
