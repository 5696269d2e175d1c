"""Block after block, on disk: the codes are those of each block alone, and what is not finite is named."""

import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.errors import CalibrationError
from planish.compiler.learn import flattening
from planish.compiler.learn.flattening import flatten_checkpoint, held_out_sequences, read_evidence
from planish.compiler.learn.transforms.transformed import TransformedCheckpoint
from planish.compiler.quantize.codes import CodesOnDisk
from planish.compiler.select.forms import forms_of_groups
from planish.compiler.verify.oracle import Oracle
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Transforms
from tests.tiny import write_tiny

SCHEME = Scheme.parse("w4a4k4v4", "w16a16")
IDS = np.random.default_rng(8).integers(3, 272, (8, 24))
FORMS = [forms_of_groups({"attn": "affine", "ffn": "rotation"}), forms_of_groups({"attn": "rotation", "ffn": "affine"})]


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


def flatten(checkpoint: Checkpoint, folder: Path, ids: npt.NDArray[np.int64] = IDS, **more: object) -> Transforms:
    (folder / "codes").mkdir(parents=True, exist_ok=True)
    codes = CodesOnDisk(folder / "codes", checkpoint, SCHEME)
    return flatten_checkpoint(checkpoint, SCHEME, FORMS, ids, folder / "flatten", codes, **more)


def files(folder: Path) -> dict[str, bytes]:
    """Return what is kept of every block."""
    kept = [*folder.glob("codes/*"), *folder.glob("flatten/layer-*/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def divergence(checkpoint: Checkpoint, oracle: Oracle) -> float:
    """Return the mean KL divergence from the float model on text that nothing was fitted to."""
    ids = torch.from_numpy(np.random.default_rng(9).integers(3, 272, (2, 24)))

    def no_codes(module: str) -> None:
        raise AssertionError(module)

    exact = Oracle(checkpoint, Scheme.parse("w16a16k16v16"), no_codes).logits(ids).log_softmax(-1)
    found = oracle.logits(ids).log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


def test_the_oracle_runs_what_it_made_better_than_rounding(checkpoint: Checkpoint, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    ids = np.random.default_rng(10).integers(3, 272, (48, 24))
    transforms = flatten(checkpoint, tmp_path, ids, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
    codes = CodesOnDisk(tmp_path / "codes", checkpoint, SCHEME)
    flat = Oracle(TransformedCheckpoint(checkpoint, transforms), SCHEME, codes.quantized, transforms=transforms)
    (tmp_path / "nearest").mkdir()
    nearest = CodesOnDisk(tmp_path / "nearest", checkpoint, SCHEME)
    for layer in range(2):
        part = f"model.layers.{layer}"
        modules = [name.removesuffix(".weight") for name in checkpoint.names() if name.startswith(part)]
        nearest.write(part, [module for module in modules if module.endswith("_proj")])
    rounded = Oracle(checkpoint, SCHEME, nearest.quantized)
    assert divergence(checkpoint, flat) < 0.7 * divergence(checkpoint, rounded)


def test_a_run_that_breaks_off_goes_on(checkpoint: Checkpoint, tmp_path: Path) -> None:
    flatten(checkpoint, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flatten(checkpoint, tmp_path / "broken", progress=stop)
    assert (tmp_path / "broken" / "codes" / "model.layers.0.safetensors").exists()
    assert not (tmp_path / "broken" / "codes" / "model.layers.1.safetensors").exists()
    steps: list[int] = []
    flatten(checkpoint, tmp_path / "broken", progress=lambda done, total: steps.append(done))
    assert steps == [2]
    assert files(tmp_path / "broken") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) == 2 + 2 * 3


def test_evidence_is_read_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    flatten(checkpoint, tmp_path)
    evidence = read_evidence(tmp_path / "flatten", 2)
    assert [set(each) for each in evidence] == [set(SITES)] * 2
    assert all(0 < each[site]["error"] < 1 for each in evidence for site in each)


def test_an_eighth_is_held_out() -> None:
    assert [held_out_sequences(count) for count in (4, 8, 15, 16, 128)] == [1, 1, 1, 2, 16]
    with pytest.raises(CalibrationError, match="3 calibration sequences are too few"):
        held_out_sequences(3)


@pytest.mark.parametrize(
    ("channel", "message"),
    [
        # Finite in float32 as it is, not when it is squared.
        ({"input_layernorm.weight": 1e22}, "block 1 cannot be flattened: what flows at attn_in is too large"),
        # Not finite at once.
        ({"input_layernorm.weight": 3e38, "self_attn.q_proj.weight": 1e3}, "block 1 makes NaN or infinity"),
    ],
)
def test_what_is_not_finite_is_named(tiny: Path, tmp_path: Path, channel: dict[str, float], message: str) -> None:
    tensors = load_file(tiny / "model.safetensors")
    # One channel of the input is loud, and read by nothing unless it is said.
    for module in ("q_proj", "k_proj", "v_proj"):
        tensors[f"model.layers.1.self_attn.{module}.weight"][:, 5] = 0
    for name, value in channel.items():
        tensors[f"model.layers.1.{name}"][..., 5] = value
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=message):
        flatten(open_checkpoint(model), tmp_path)


def test_deeper_models_keep_one_file_of_streams(tmp_path: Path) -> None:
    deep = open_checkpoint(write_tiny(tmp_path / "deep", num_hidden_layers=3))
    (tmp_path / "codes").mkdir()
    codes = CodesOnDisk(tmp_path / "codes", deep, SCHEME)
    flatten_checkpoint(deep, SCHEME, [FORMS[0]] * 3, IDS, tmp_path / "flatten", codes)
    assert [path.name for path in (tmp_path / "flatten").glob("inputs-*")] == ["inputs-3.npy"]


def test_memory_holds_one_block(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a flattened block is left when the next one is read."""
    made: list[weakref.ref[object]] = []
    left = []
    real_read, real_flatten = flattening.read_block, flattening.flatten_block

    def read(*arguments: object) -> object:
        left.append(sum(each() is not None for each in made))
        return real_read(*arguments)

    def flatten_one(*arguments: object) -> object:
        done = real_flatten(*arguments)
        made.extend(map(weakref.ref, (arguments[0], done, done.hooks)))
        return done

    monkeypatch.setattr(flattening, "read_block", read)
    monkeypatch.setattr(flattening, "flatten_block", flatten_one)
    flatten(checkpoint, tmp_path)
    assert left == [0] * checkpoint.config.num_hidden_layers
