"""What forms cost: against transformers with one linear rounded, resumed where it broke off, and where it diverges."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.learn.block import Angles, read_block
from planish.compiler.learn.stream_files import StreamFiles
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.learn.transforms.fold import reading_factors
from planish.compiler.learn.transforms.site_factors import closed_form_factors
from planish.compiler.learn.transforms.site_moments import gather_moments
from planish.compiler.progress import Silent
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_activation, quantize_weight
from planish.compiler.select import measure_forms as module
from planish.compiler.select.forms import MEASURED_FORMS
from planish.compiler.select.measure_forms import FormErrors, measure_forms
from planish.passes.scheme import LinearFormat, Scheme
from planish.passes.transforms import SITES

IDS = np.random.default_rng(8).integers(3, 272, (8, 24))


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


@pytest.fixture(scope="module")
def measured(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[FormErrors]:
    return measure_forms(checkpoint, Scheme.parse("w4a4k4v4"), IDS, tmp_path_factory.mktemp("work"), Silent())


def test_every_form_of_every_site_is_measured(measured: list[FormErrors]) -> None:
    assert len(measured) == 2
    for of_layer in measured:
        for site in SITES:
            assert set(of_layer.errors[site]) == set(of_layer.flops[site]) == set(MEASURED_FORMS[site])
            assert all(0 < error < 1 for error in of_layer.errors[site].values())
            assert of_layer.flops[site]["identity"] == 0
        # What folds costs nothing, whatever it is; what runs costs two operations per multiplication.
        assert set(of_layer.flops["value"].values()) == {0}
        assert of_layer.flops["attn_in"]["dense"] == 2 * 64 * 64
        assert {site for site in SITES if of_layer.rho[site]} == {"attn_in", "attn_out", "ffn_in", "ffn_out"}
        assert of_layer.rho["ffn_in"]["blocks64"] > of_layer.rho["ffn_in"]["rotation"] > 1


def test_without_transform_it_is_the_error_of_transformers(tiny: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    # With 8 bits no clip is searched, and the rest is arithmetic that transformers can be made to do.
    (first, _) = measure_forms(checkpoint, Scheme.parse("w4a8k8v8"), IDS, tmp_path, Silent())
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    held_out, form = torch.from_numpy(IDS[7:]), LinearFormat(4, 8)
    with torch.no_grad():
        exact = model(held_out, output_hidden_states=True).hidden_states[1]
        for name in ("gate_proj", "up_proj"):
            linear = model.model.layers[0].mlp.get_submodule(name)
            linear.weight.copy_(dequantize_weight(quantize_weight(linear.weight, form)))
            linear.register_forward_pre_hook(lambda _, inputs: (on_grid(inputs[0]),))
        rounded = model(held_out, output_hidden_states=True).hidden_states[1]
    expected = ((rounded - exact).square().sum(-1) / exact.square().sum(-1)).mean()
    assert first.errors["ffn_in"]["identity"] == pytest.approx(float(expected), rel=0.02)


@pytest.mark.parametrize("form", ["identity", "rotation", "dense"])
def test_a_value_map_counts_by_what_it_does_to_o_proj(
    form: Form, tiny: Path, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    scheme = Scheme.parse("w3a16")
    (first, _) = measure_forms(checkpoint, scheme, IDS, tmp_path, Silent())
    block, ids = read_block(checkpoint, 0), torch.from_numpy(IDS)
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        inputs = model(ids[:7], output_hidden_states=True).hidden_states[0]
        moments = gather_moments(block, [inputs], Angles.of(checkpoint.config, IDS.shape[1]))
        factors = closed_form_factors(block, moments, {"value": form, "attn_out": "rotation"}, seed=0)
        # Rows of the identity through the head mixing behind the value map: the matrix that o_proj reads through.
        p = reading_factors(block, factors, "attn_out").apply(torch.eye(checkpoint.config.q_size).double())
        exact = model(ids[7:], output_hidden_states=True).hidden_states[1]
        output = model.model.layers[0].self_attn.o_proj.weight
        mapped = output.double() @ torch.linalg.inv(p).T
        rounded = dequantize_weight(quantize_weight(mapped.float(), LinearFormat(3, 16)))
        output.copy_(rounded.double() @ p.T)
        found = model(ids[7:], output_hidden_states=True).hidden_states[1]
    expected = ((found - exact).square().sum(-1) / exact.square().sum(-1)).mean()
    together = first.errors["attn_out"]["rotation"] + first.errors["value"][form]
    assert together == pytest.approx(float(expected), rel=1e-3)
    assert min(first.errors["value"].values()) == 0


def on_grid(x: torch.Tensor) -> torch.Tensor:
    codes, scale = quantize_activation(x, 8)
    return (codes.float() - 128) * scale


@pytest.mark.parametrize("at", ["before", "after"])
def test_it_goes_on_where_it_broke_off(
    at: str, checkpoint: Checkpoint, measured: list[FormErrors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the first block's errors are kept, and its streams have not, or have, gone on."""
    advance = StreamFiles.advance

    def broken(files: StreamFiles, *args: object) -> None:
        if at == "after":
            advance(files, *args)
        raise KeyboardInterrupt

    scheme = Scheme.parse("w4a4k4v4")
    with monkeypatch.context() as patch:
        patch.setattr(StreamFiles, "advance", broken)
        with pytest.raises(KeyboardInterrupt):
            measure_forms(checkpoint, scheme, IDS, tmp_path, Silent())
    first = (tmp_path / "forms-0.json").stat().st_mtime_ns
    assert measure_forms(checkpoint, scheme, IDS, tmp_path, Silent()) == measured
    assert (tmp_path / "forms-0.json").stat().st_mtime_ns == first


def test_a_form_that_cannot_be_made_has_no_error(
    checkpoint: Checkpoint, measured: list[FormErrors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_form_factors = module.closed_form_factors

    def diverge(block: object, moments: object, forms: dict[str, str], seed: int) -> object:
        made = closed_form_factors(block, moments, forms, seed)
        if forms == {"ffn_in": "kronecker"}:
            made["ffn_in"] = dataclasses.replace(made["ffn_in"], right=made["ffn_in"].right * math.nan)
        return made

    monkeypatch.setattr(module, "closed_form_factors", diverge)
    found = measure_forms(checkpoint, Scheme.parse("w4a4k4v4"), IDS, tmp_path, Silent())
    for of_layer, whole in zip(found, measured, strict=True):
        errors = {**whole.errors, "ffn_in": {**whole.errors["ffn_in"], "kronecker": math.inf}}
        assert of_layer.errors == errors
