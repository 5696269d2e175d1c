"""The oracle against transformers: as it is for float schemes, and with its modules quantised by hooks for others."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.quantize.arithmetic import (
    dequantize_kv,
    dequantize_weight,
    quantize_activation,
    quantize_kv,
    quantize_weight,
)
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.compiler.verify.oracle import Oracle
from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import Transforms
from tests.cache_clips import clipping_transforms
from tests.onnx_run import positions, range_error
from tests.tiny import VARIANTS, write_tiny

#: What is seen is about 1e-6.
BOUND = 1e-5


class FakeQuantizedCache(DynamicCache):
    """A cache that rounds what it is given, and hands back what the codes stand for."""

    def __init__(self, scheme: Scheme, transforms: Transforms | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._bits = scheme.key_bits, scheme.value_bits
        self._layers = None if transforms is None else transforms.layers

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **more: Any) -> Any:
        layer = None if self._layers is None else self._layers[layer_idx]
        clips = (1.0, 1.0) if layer is None else (layer.clip("key"), layer.clip("value"))
        rounded = [
            x if bits == 16 else dequantize_kv(*quantize_kv(x, bits, clip))
            for x, bits, clip in zip((key_states, value_states), self._bits, clips, strict=True)
        ]
        return super().update(*rounded, layer_idx, *rest, **more)


def low_bit_transformers(folder: Path, scheme: Scheme) -> LlamaForCausalLM:
    """Return transformers' model with weights replaced by what their codes stand for, and inputs rounded by hooks."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # A tied head is quantised, the embedding is not.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())

    def fake_quantize(module: torch.nn.Linear, form: LinearFormat) -> None:
        module.weight.copy_(dequantize_weight(quantize_weight(module.weight, form)))
        if form.weight_only:
            return

        def round_input(_: torch.nn.Module, inputs: tuple[Tensor]) -> Tensor:
            codes, scale = quantize_activation(inputs[0], form.activation_bits)
            return (codes.float() - (1 << form.activation_bits - 1)) * scale

        module.register_forward_pre_hook(round_input)

    with torch.no_grad():
        for name, module in model.named_modules():
            form = scheme.lm_head if name == "lm_head" else scheme.linear
            if isinstance(module, torch.nn.Linear) and not form.is_float:
                fake_quantize(module, form)
        if not scheme.linear.is_float:
            table = model.model.embed_tokens.weight
            table.copy_(table.half().float())
    return model


def prompts(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return ids and mask of left-padded prompts."""
    longest = max(lengths)
    ids = torch.randint(3, 272, (len(lengths), longest), generator=torch.Generator().manual_seed(6))
    return ids, (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()


def both_logits(
    folder: Path, scheme: Scheme, ids: Tensor, mask: Tensor, work: Path, transforms: Transforms | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the oracle's logits and transformers', for transforms that only clip the cache."""
    checkpoint = open_checkpoint(folder)
    codes = quantize_checkpoint(checkpoint, scheme, work)
    theirs = low_bit_transformers(folder, scheme)
    with torch.no_grad():
        found = Oracle(checkpoint, scheme, codes.quantized, None, transforms).logits(ids, mask)
        expected = theirs(
            input_ids=ids,
            attention_mask=mask,
            position_ids=torch.from_numpy(positions(mask.numpy())),
            past_key_values=FakeQuantizedCache(scheme, transforms, config=theirs.config),
        ).logits
    return found.numpy(), expected.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_float_scheme(variant: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, **VARIANTS[variant])
    ids, mask = prompts([90, 31, 64])
    found, expected = both_logits(tmp_path, Scheme.parse("w16a16"), ids, mask, tmp_path / "codes")
    real = mask.numpy() == 1
    assert range_error(found[real], expected[real]) < BOUND


# Whatever rounds activations may round a tie the other way and then be far off: many short prompts, most untouched.
SCHEMES = ["w4a4", "w4a4k4v4", "w3a3k3v3", "w3a3k3v2", "w2a16g32", "w4a16g64", "w8a8kv8", "w16a16k4v4", "w4a8k8v8g32"]


@pytest.mark.parametrize("variant", ["gqa", "tied", "mlp_bias"])
@pytest.mark.parametrize("spelling", SCHEMES)
def test_low_bit_schemes(spelling: str, variant: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, **VARIANTS[variant])
    ids, mask = prompts([6, 3] * 10)
    found, expected = both_logits(tmp_path, Scheme.parse(spelling), ids, mask, tmp_path / "codes")
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    real = error[mask.numpy() == 1]
    assert (real < BOUND).mean() > 0.8
    assert real.max() < 0.3


@pytest.mark.parametrize("spelling", ["w16a16k2v3", "w16a16k8v2"])
def test_clipped_cache(spelling: str, tmp_path: Path) -> None:
    transforms = clipping_transforms(open_checkpoint(write_tiny(tmp_path)).config)
    ids, mask = prompts([6, 3] * 10)
    found, expected = both_logits(tmp_path, Scheme.parse(spelling), ids, mask, tmp_path / "codes", transforms)
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    real = error[mask.numpy() == 1]
    assert (real < BOUND).mean() > 0.8
    assert real.max() < 0.3


def test_low_bits_do_change_the_logits(tmp_path: Path) -> None:
    """Guards the test above against hooks that do nothing."""
    write_tiny(tmp_path)
    ids, mask = prompts([24])
    exact, _ = both_logits(tmp_path, Scheme.parse("w16a16"), ids, mask, tmp_path / "float")
    for spelling, least in (("w8a8kv8", 1e-3), ("w4a4", 0.03), ("w16a16k3v3", 0.01), ("w3a16", 0.03)):
        for logits in both_logits(tmp_path, Scheme.parse(spelling), ids, mask, tmp_path / spelling):
            assert least < range_error(logits, exact) < 1


def test_hidden_states_lead_to_the_logits(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path))
    oracle = Oracle(checkpoint, Scheme.parse("w16a16"), lambda module: pytest.fail(f"asked for {module}"))
    ids, _ = prompts([12])
    states = list(oracle.hidden_states(ids))
    assert len(states) == 3
    assert torch.equal(states[0], oracle.embed(ids))
    assert torch.equal(oracle.head(states[-1]), oracle.logits(ids))
    assert torch.equal(oracle.layer(1, states[1], oracle.batch(ids)), states[2])
