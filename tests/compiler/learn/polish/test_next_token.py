"""How far a low-bit model is from the float one: against the oracle and transformers."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.polish import next_token as module
from planish.compiler.learn.polish.next_token import Head, rounded_to_nearest_outputs
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.compiler.verify.oracle import Oracle
from planish.passes.scheme import Scheme
from tests.tiny import VARIANTS, write_tiny

IDS = np.random.default_rng(3).integers(3, 272, (2, 40))


@pytest.mark.parametrize("variant", ["gqa", "attention_bias", "untied"])
def test_what_rounding_to_nearest_costs(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fast_products", contextlib.nullcontext)
    folder, scheme = write_tiny(tmp_path / "model", **VARIANTS[variant]), Scheme.parse("w4a8k8v8", "w16a16")
    checkpoint, ids = open_checkpoint(folder), torch.from_numpy(IDS)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    codes = quantize_checkpoint(checkpoint, scheme, tmp_path / "codes")
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
        lost = Oracle(checkpoint, scheme, codes.quantized, None, None).logits(ids).log_softmax(-1)
        # The output of the last block: hidden_states holds it normalised.
        states: list[torch.Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        model(ids)
    head = Head.of(checkpoint)
    found = head.mean_divergence(rounded_to_nearest_outputs(checkpoint, scheme, IDS), states[0])
    assert found == pytest.approx(float((expected.exp() * (expected - lost)).sum(-1).mean()), rel=0.02)
    assert head.mean_divergence(states[0], states[0]) == pytest.approx(0, abs=1e-6)
    nll = -expected[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert head.mean_cross_entropy(states[0], IDS) == pytest.approx(float(nll), rel=1e-4)
    torch.testing.assert_close(head.log_probabilities(states[0]), expected, rtol=1e-4, atol=1e-4)
