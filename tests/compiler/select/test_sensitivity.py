"""Fisher information of channels against the gradients of transformers, one sequence at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import CalibrationError
from planish.compiler.learn.block import MODULES
from planish.compiler.progress import Silent
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.compiler.select import sensitivity as module
from planish.compiler.select.fitted_transforms import fit_transforms
from planish.compiler.select.forms import forms_of_groups
from planish.compiler.select.sensitivity import BlockSensitivity, channel_order, measure_sensitivity
from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import Site
from tests.tiny import VARIANTS, write_tiny

IDS = np.random.default_rng(4).integers(3, 272, (3, 20))
FORM = LinearFormat(2, 16)


@pytest.mark.parametrize("variant", ["gqa", "tied", "attention_bias", "rope_llama3"])
def test_equals_the_gradients_of_transformers(variant: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = write_tiny(tmp_path / "tiny", **VARIANTS[variant])
    found = measure_sensitivity(open_checkpoint(folder), IDS, FORM, tmp_path, Silent())
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    strengths = [0.0] * len(found)
    for sequence in torch.from_numpy(IDS):
        model.zero_grad()
        outputs = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, __, y, kept=outputs: kept.append(y) or y.retain_grad())
        model(sequence[None], labels=sequence[None]).loss.backward()
        for name, parameter in model.named_parameters():
            squares[name] += parameter.grad.square() / len(IDS)
        for layer, y in enumerate(outputs[: len(found)]):
            strength = (y.grad.square().sum(-1) * y.detach().square().sum(-1)).sum()
            strengths[layer] += float(strength) / y.shape[-1] / len(IDS)
        for layer in model.model.layers:
            layer._forward_hooks.clear()
    for layer, block in enumerate(found):
        assert block.output_weight == pytest.approx(strengths[layer], rel=1e-4)
        for linear in MODULES:
            name = f"model.layers.{layer}.{linear}.weight"
            weight = model.get_parameter(name).detach()
            lost = (weight - dequantize_weight(quantize_weight(weight, FORM))).square()
            for axis, dim in (("in", 0), ("out", 1)):
                for score, each in (("fisher", squares[name]), ("damage", squares[name] * lost)):
                    torch.testing.assert_close(
                        block.scores[linear][score][axis].double(), each.sum(dim), rtol=1e-4, atol=0
                    )
    assert not list(tmp_path.glob("*.npy"))


def test_order_of_channels() -> None:
    def scores(inputs: list[float], outputs: list[float]) -> dict[str, dict[str, torch.Tensor]]:
        by_axis = {"in": torch.tensor(inputs), "out": torch.tensor(outputs)}
        return {"fisher": by_axis, "damage": {axis: -each for axis, each in by_axis.items()}, "moment": by_axis}

    block = BlockSensitivity({"gate": scores([1, 5, 2], [4, 1]), "up": scores([4, 1, 1], [9, 2])}, 1.0)
    assert channel_order(block, ["gate", "up"], "in", "fisher").tolist() == [1, 0, 2]
    assert channel_order(block, ["gate", "up"], "out", "fisher").tolist() == [2, 0, 3, 1]
    assert channel_order(block, ["up"], "in", "damage").tolist() == [1, 2, 0]


def test_a_gradient_that_is_not_finite_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_gradients_at_the_end", lambda *_: torch.full((3, 20, 64), torch.inf))
    with pytest.raises(CalibrationError, match="block 1"):
        measure_sensitivity(open_checkpoint(tiny), IDS, FORM, tmp_path, Silent())


def test_behind_transforms(tmp_path: Path) -> None:
    """The gradient of a folded weight is that of the weight times the map; the input is what the map gives."""
    from transformers import LlamaForCausalLM

    folder = write_tiny(tmp_path / "tiny")
    checkpoint = open_checkpoint(folder)
    forms = [forms_of_groups({"attn": "affine", "ffn": "affine"})] * 2
    tokens = np.concatenate([IDS, IDS[:1]])
    transforms, _ = fit_transforms(checkpoint, Scheme.parse("w2a16"), forms, tokens, tmp_path, Silent())
    found = measure_sensitivity(checkpoint, IDS, FORM, tmp_path, Silent(), transforms)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    sites: dict[str, Site] = {
        "self_attn.q_proj": "attn_in",
        "mlp.gate_proj": "ffn_in",
        "mlp.down_proj": "ffn_out",
    }
    inputs: dict[str, list[torch.Tensor]] = {}
    for name in sites:
        linear = model.model.layers[1].get_submodule(name)
        linear.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].detach()[0]))
    squares: dict[str, torch.Tensor | float] = dict.fromkeys(sites, 0.0)
    maps = {name: torch.from_numpy(transforms.layers[1][site].matrix()) for name, site in sites.items()}
    for sequence in torch.from_numpy(IDS):
        model.zero_grad()
        model(sequence[None], labels=sequence[None]).loss.backward()
        for name, matrix in maps.items():
            gradient = model.model.layers[1].get_submodule(name).weight.grad
            squares[name] = squares[name] + (gradient @ matrix).square() / len(IDS)
    for name, matrix in maps.items():
        weight = model.model.layers[1].get_submodule(name).weight.detach() @ torch.linalg.inv(matrix).T
        lost = (weight - dequantize_weight(quantize_weight(weight, FORM))).square()
        moment = (torch.cat(inputs[name]) @ matrix).square().mean(0)
        expected = {"fisher": squares[name], "damage": squares[name] * lost, "moment": moment * lost}
        for score, each in expected.items():
            scores = found[1].scores[name][score]
            torch.testing.assert_close(scores["in"].double(), each.sum(0), rtol=3e-3, atol=0)
            torch.testing.assert_close(scores["out"].double(), each.sum(1), rtol=3e-3, atol=0)


class Stopping(Silent):
    """Ends the run behind a block."""

    def step(self, stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt


def test_it_goes_on_behind_the_last_block(tiny: Path, tmp_path: Path) -> None:
    checkpoint, killed = open_checkpoint(tiny), tmp_path / "killed"
    killed.mkdir()
    whole = measure_sensitivity(checkpoint, IDS, FORM, tmp_path, Silent())
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(checkpoint, IDS, FORM, killed, Stopping())
    (kept,) = killed.glob("*.safetensors")
    written = kept.stat().st_mtime_ns
    again = measure_sensitivity(checkpoint, IDS, FORM, killed, Silent())
    assert kept.stat().st_mtime_ns == written
    assert sorted(path.suffix for path in killed.iterdir()) == [".safetensors"] * 2
    for one, other in zip(whole, again, strict=True):
        assert one.output_weight == other.output_weight
        for name in MODULES:
            for score, by_axis in one.scores[name].items():
                assert all(torch.equal(each, other.scores[name][score][axis]) for axis, each in by_axis.items())
