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
from planish.compiler.select.sensitivity import BlockSensitivity, channel_order, measure_sensitivity
from planish.passes.scheme import LinearFormat
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
        return {"fisher": by_axis, "damage": {axis: -each for axis, each in by_axis.items()}}

    block = BlockSensitivity({"gate": scores([1, 5, 2], [4, 1]), "up": scores([4, 1, 1], [9, 2])}, 1.0)
    assert channel_order(block, ["gate", "up"], "in", "fisher").tolist() == [1, 0, 2]
    assert channel_order(block, ["gate", "up"], "out", "fisher").tolist() == [2, 0, 3, 1]
    assert channel_order(block, ["up"], "in", "damage").tolist() == [1, 2, 0]


def test_a_gradient_that_is_not_finite_is_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_gradients_at_the_end", lambda *_: torch.full((3, 20, 64), torch.inf))
    with pytest.raises(CalibrationError, match="block 1"):
        measure_sensitivity(open_checkpoint(tiny), IDS, FORM, tmp_path, Silent())
