"""What learns computes on the device that it is given, and makes there what it makes on the CPU."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from planish.compiler.calibrate.settings import CalibrationSettings
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import DeviceError
from planish.compiler.learn.device import clear_memory_errors, device_kind, open_device
from planish.compiler.learn.polish import low_bit_model
from planish.compiler.pipeline.flatten import FlattenSettings, flatten
from planish.compiler.pipeline.high_impact import HighChannels
from planish.compiler.progress import Silent
from planish.compiler.select.policy import SelectionPolicy
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES
from tests.pretended_gpu import GPU, PretendedGpu
from tests.tiny import VARIANTS, write_tiny

SCHEME = Scheme.parse("w3a3k3v3", "w16a16")


def test_spellings() -> None:
    assert [device_kind(name) for name in ("cpu", "cuda", "cuda:11")] == ["cpu", "cuda", "cuda"]
    assert open_device("cpu") == torch.device("cpu")
    for wrong in ("gpu", "cuda:", "cuda:-1", "cpu:0", "CUDA", ""):
        with pytest.raises(DeviceError, match=f"'{wrong}' is not a device. Give cpu, cuda"):
            device_kind(wrong)


def test_a_build_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(DeviceError, match=r"this PyTorch \(.*\) is built without CUDA. Install a CUDA build"):
        open_device("cuda")


@pytest.mark.parametrize(("count", "found"), [(0, "no GPU that it can use"), (1, "1 GPU,"), (2, "2 GPUs,")])
def test_gpus_that_are_not_there(count: int, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(DeviceError, match=f"device cuda:{count} was asked for, .* finds {found}"):
        open_device(f"cuda:{count}")
    if count:
        assert open_device(f"cuda:{count - 1}").index == count - 1
        assert open_device("cuda").type == "cuda"


def test_a_full_gpu_is_named() -> None:
    with pytest.raises(DeviceError, match="memory of cuda is full") as caught, clear_memory_errors(GPU):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    assert caught.value.exit_code == 28


def test_the_pretended_gpu_refuses_what_a_real_one_does() -> None:
    here, number = torch.ones(3), torch.tensor(2.0)
    with PretendedGpu() as gpu:
        there = here.to(GPU)
        assert (there.device, here.device) == (GPU, torch.device("cpu"))
        assert (there * number + torch.zeros(3, device=GPU)).device == GPU
        assert (there[torch.tensor([0])].device, there.cpu().device, there[:2].device) == (GPU, here.device, GPU)
        assert torch.equal(there.cpu(), here)
        assert gpu.used == 5
        for wrong in (
            lambda: there + here,
            lambda: there + torch.zeros(3),
            lambda: torch.cat([there, here]),
            lambda: torch.linalg.vecdot(here, there),
            lambda: here[torch.tensor([0], device=GPU)],
            lambda: torch.nn.functional.linear(there, torch.ones(2, 3)),
        ):
            with pytest.raises(RuntimeError, match="on the GPU and on the CPU"):
                wrong()
        with pytest.raises(TypeError, match="on the GPU"):
            there.numpy()


class GeneratorOnTheCpu(torch.Generator):
    """Of random numbers, wherever they were asked for."""

    def __new__(cls, device: torch.device | None = None) -> "GeneratorOnTheCpu":
        return super().__new__(cls, "cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    """A pretended GPU to enter; what no mode of PyTorch's sees is as it is on the CPU."""
    monkeypatch.setattr(torch, "Generator", GeneratorOnTheCpu)
    # In the backward pass, where activations are computed again, nothing is watched.
    monkeypatch.setattr(low_bit_model, "recompute", lambda run, *args, use_reentrant: run(*args))
    return PretendedGpu()


@dataclasses.dataclass
class Made:
    """What the flatten stage made, and where it worked."""

    factors: list[np.ndarray]
    clips: list[dict[str, float]]
    weights: list[Tensor]
    plan: dict[str, Any]


def made(folder: Path, variant: str, policy: str, dataset: str, device: torch.device, scheme: Scheme = SCHEME) -> Made:
    """Flatten a tiny model with everything that learns."""
    checkpoint = open_checkpoint(write_tiny(folder / "model", **VARIANTS[variant]))
    (folder / "codes").mkdir()
    settings = CalibrationSettings(dataset=dataset, nsamples=5, seqlen=16)
    chosen = SelectionPolicy.parse(policy)
    asked = FlattenSettings(chosen, settings, HighChannels(None, {}), refine_epochs=1, polish_epochs=2)
    done = flatten(checkpoint, scheme, asked, folder / "work", folder / "codes", Silent(), device)
    sites = [layer[site] for layer in done.transforms.layers for site in SITES]
    parts = [part for each in sites for part in (each.scale, each.right, each.left) if part is not None]
    modules = [name.removesuffix(".weight") for name in checkpoint.names() if name.endswith("_proj.weight")]
    weights = [done.codes.quantized(module) for module in modules]
    return Made(
        parts,
        [layer.clips for layer in done.transforms.layers],
        [w.codes.float() * w.scale.T for w in weights],
        done.plan,
    )


def close(found: Made, expected: Made, tolerance: float) -> None:
    assert len(found.factors) == len(expected.factors)
    for one, other in zip(found.factors, expected.factors, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())
    for one, other in zip(found.weights, expected.weights, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
    for one, other in zip(found.clips, expected.clips, strict=True):
        assert one == pytest.approx(other, rel=tolerance)
    assert found.plan["polish"]["held_out_divergence"] == pytest.approx(
        expected.plan["polish"]["held_out_divergence"], rel=tolerance
    )


@pytest.mark.parametrize(
    ("variant", "policy"),
    [
        ("gqa", "fixed:affine"),
        ("attention_bias", "fixed:rotation:smooth"),
        ("tied", "measured"),
        ("mha", "search"),
    ],
)
def test_the_stage_works_on_a_gpu_alone(variant: str, policy: str, tmp_path: Path, gpu: PretendedGpu) -> None:
    expected = made(tmp_path / "cpu", variant, policy, "self", torch.device("cpu"))
    with gpu:
        found = made(tmp_path / "gpu", variant, policy, "self", GPU)
    assert gpu.used > 1000
    close(found, expected, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["fixed:affine", "fixed:rotation", "measured"])
def test_a_gpu_makes_what_the_cpu_makes(policy: str, tmp_path: Path, text: Path) -> None:
    # Products are rounded in other ways there, so a code here and there is another. At 3 bits that moves errors of so
    # little text by a quarter, on one CPU with its number of threads too; at 8 the errors stay what they were.
    many = Scheme.parse("w8a8k8v8", "w16a16")
    expected = made(tmp_path / "cpu", "gqa", policy, str(text), torch.device("cpu"), many)
    found = made(tmp_path / "gpu", "gqa", policy, str(text), open_device("cuda"), many)
    for one, other in zip(found.plan["sites"], expected.plan["sites"], strict=True):
        if other["error"] is not None and one["form"] == other["form"]:
            assert one["error"] == pytest.approx(other["error"], rel=0.1)
    assert found.plan["polish"]["held_out_divergence"] == pytest.approx(
        expected.plan["polish"]["held_out_divergence"], rel=0.1
    )
