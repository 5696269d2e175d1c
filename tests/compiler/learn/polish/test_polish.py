"""Polishing, measured by the oracle against transformers: neither knows how polishing computes."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.learn.block import MODULES
from planish.compiler.learn.flattening import flatten_checkpoint, held_out_sequences
from planish.compiler.learn.polish import polish as module
from planish.compiler.learn.polish.low_bit_model import LowBitModel
from planish.compiler.learn.polish.polish import Polished, polish
from planish.compiler.learn.stream_files import StreamFiles
from planish.compiler.learn.transforms.transformed import TransformedCheckpoint
from planish.compiler.pipeline.high_impact import untransformed
from planish.compiler.quantize.codes import CodesOnDisk
from planish.compiler.select.forms import forms_of_groups
from planish.compiler.verify.oracle import Oracle
from planish.passes.high_impact import no_high_impact
from planish.passes.scheme import Scheme
from planish.passes.transforms import Transforms
from tests.high_impact import WIDE, random_high_impact
from tests.tiny import VARIANTS, write_tiny

SCHEME = Scheme.parse("w3a3k3v3", "w16a16")
IDS = np.random.default_rng(0).integers(3, 272, (6, 40))
HELD_OUT = held_out_sequences(len(IDS))


class Case:
    """A flattened tiny model, and what polishing it needs."""

    def __init__(self, folder: Path, variant: str, ids: npt.NDArray[np.int64] = IDS, scheme: Scheme = SCHEME) -> None:
        self.ids, self.scheme = ids, scheme
        self.model = write_tiny(folder / "model", **VARIANTS.get(variant, WIDE))
        self.checkpoint = open_checkpoint(self.model)
        self.folder = folder / "work"
        (folder / "codes").mkdir()
        layers = self.checkpoint.config.num_hidden_layers
        forms = [forms_of_groups({"attn": "affine", "ffn": "rotation"})] * layers
        high, placed = no_high_impact, None
        if variant == "high":
            with_high = untransformed(self.checkpoint.config)
            with_high = with_high.with_high(random_high_impact(with_high))
            high, placed = with_high.high, [layer.high for layer in with_high.layers]
        self.codes = CodesOnDisk(folder / "codes", self.checkpoint, scheme, high)
        self.transforms = flatten_checkpoint(self.checkpoint, scheme, forms, ids, self.folder, self.codes, high=placed)
        self.final = StreamFiles(self.folder, HELD_OUT).open(layers).target

    def polish(self, folder: Path, epochs: int = 2) -> Polished:
        folder.mkdir(exist_ok=True)
        return polish(
            self.checkpoint, self.scheme, self.transforms, self.codes, self.ids, self.final, HELD_OUT, epochs, folder
        )

    def divergence(self, found: torch.Tensor) -> float:
        """Return what polishing minimises, of log-probabilities for the held-out sequences against transformers'."""
        from transformers import LlamaForCausalLM

        ids = torch.from_numpy(self.ids[-HELD_OUT:])
        with torch.no_grad():
            expected = LlamaForCausalLM.from_pretrained(self.model)(ids).logits.log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    def log_probabilities(
        self, transforms: Transforms, row_scales: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return those of the oracle for the held-out sequences."""

        def codes(name: str):
            weight = self.codes.quantized(name)
            return dataclasses.replace(weight, scale=weight.scale * row_scales[name]) if row_scales else weight

        oracle = Oracle(TransformedCheckpoint(self.checkpoint, transforms), self.scheme, codes, None, transforms)
        with torch.no_grad():
            return oracle.logits(torch.from_numpy(self.ids[-HELD_OUT:])).log_softmax(-1)


@pytest.fixture(scope="module", params=["gqa", "attention_bias", "mlp_bias", "tied", "high"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("polish"), request.param)


def test_starts_and_ends_where_the_oracle_says(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fast_products", contextlib.nullcontext)
    kept: list[torch.Tensor] = []
    cross_entropy = LowBitModel.cross_entropy

    def noted(self: LowBitModel, token_ids: npt.NDArray[np.int64]) -> float:
        with torch.no_grad():
            kept.append(self._head.log_probabilities(self.outputs(torch.from_numpy(token_ids))))
        return cross_entropy(self, token_ids)

    monkeypatch.setattr(LowBitModel, "cross_entropy", noted)
    polished = case.polish(tmp_path)
    assert len(polished.divergence) == 4
    assert polished.divergence[0] == pytest.approx(case.divergence(case.log_probabilities(case.transforms)), rel=2e-3)
    # A code that lies between two steps may go to the other one in the oracle; tokens that look there then differ by
    # much, and all others by nothing.
    apart = (kept[0] - case.log_probabilities(polished.transforms, polished.row_scales)).abs().amax(-1)
    # The oracle rounds a tied lm_head to float16, as embeddings are stored.
    assert apart.median() < (1e-2 if case.checkpoint.config.tie_word_embeddings else 1e-4)
    assert polished.kept == pytest.approx(case.divergence(kept[0]), rel=2e-3)
    entropy = -kept[0][:, :-1].gather(-1, torch.from_numpy(case.ids[-HELD_OUT:, 1:, None])).mean()
    assert polished.cross_entropy == pytest.approx(float(entropy), rel=1e-4)


def test_never_worse_than_its_start(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RATE", 30.0)  # so large that every step does harm
    polished = case.polish(tmp_path, epochs=1)
    assert polished.divergence[1] > polished.divergence[0]
    assert polished.kept == polished.divergence[0]
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale in polished.row_scales.values())
    for before, after in zip(case.transforms.layers, polished.transforms.layers, strict=True):
        for site in ("attn_in", "ffn_in"):
            ones = np.ones(before[site].width)
            assert np.array_equal(after[site].scale, ones if before[site].scale is None else before[site].scale)


def test_learns(tmp_path: Path) -> None:
    # Measured on a sequence that is learned from: five sequences of random tokens teach nothing about a sixth.
    case = Case(tmp_path, "gqa", np.concatenate([IDS[:-1], IDS[:1]]), Scheme.parse("w4a8k8v8", "w16a16"))
    polished = case.polish(tmp_path / "polish", epochs=12)
    assert polished.kept < 0.97 * polished.divergence[0]
    assert set(polished.row_scales) == {f"model.layers.{i}.{name}" for i in range(2) for name in MODULES}
    assert any(not torch.equal(scale, torch.ones_like(scale)) for scale in polished.row_scales.values())


def test_goes_on_where_it_was_killed(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = case.polish(tmp_path / "whole")
    calls = 0
    loss = LowBitModel.loss

    def dies(self: object, ids: torch.Tensor, final: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:  # in the second epoch: one held-out and five others make the first
            raise KeyboardInterrupt
        return loss(self, ids, final)

    monkeypatch.setattr(LowBitModel, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        case.polish(tmp_path / "killed")
    monkeypatch.setattr(LowBitModel, "loss", loss)
    resumed = case.polish(tmp_path / "killed")
    assert resumed.divergence == whole.divergence
    for name, scale in whole.row_scales.items():
        assert torch.equal(resumed.row_scales[name], scale)


def test_both_segments_learn(tmp_path: Path) -> None:
    ids = np.concatenate([IDS[:-1], IDS[:1]])
    case = Case(tmp_path, "high", ids, Scheme.parse("w3a8k8v8", "w16a16"))
    polished = case.polish(tmp_path / "polish", epochs=6)
    assert polished.kept < polished.divergence[0]
    for name in ("model.layers.1.mlp.down_proj", "model.layers.1.mlp.down_proj.high"):
        assert not torch.equal(polished.row_scales[name], torch.ones(192))
    before, after = (each.layers[1].high["ffn_out"] for each in (case.transforms, polished.transforms))
    np.testing.assert_array_equal(after.order, before.order)


def test_the_clip_of_high_impact_channels_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, "high")
    # Kept whatever it is: three bits of random weights have little to learn.
    falling = iter((3.0, 2.0, 1.0))
    monkeypatch.setattr(LowBitModel, "divergence", lambda *_: next(falling))
    polished = case.polish(tmp_path / "polish", epochs=1)
    before, after = (each.layers[1].high["ffn_out"] for each in (case.transforms, polished.transforms))
    assert after.clip != before.clip


@pytest.mark.parametrize("better", [True, False])
def test_the_average_of_the_last_steps_is_kept_if_it_is_better_than_the_start(
    better: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, reached, step = Case(tmp_path, "gqa"), [], torch.optim.Adam.step

    def noted(self: torch.optim.Adam) -> None:
        step(self)
        # The scales of the rows of gate_proj of the first block; only up_proj has as many.
        found = [each for group in self.param_groups for each in group["params"] if each.shape == (160,)]
        reached.append(found[0].detach().clone())

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    # Of the start, of three epochs, and of the average. How good an epoch is does not matter.
    found = [2, 0.5, 3, 1, 1.5 if better else 2.5]
    divergences = iter(found)
    monkeypatch.setattr(LowBitModel, "divergence", lambda *_: next(divergences))
    polished = case.polish(tmp_path / "polish", epochs=3)
    assert polished.divergence == found
    assert polished.kept == (1.5 if better else 2)
    assert len(reached) == 15
    average = torch.stack(reached[7:]).mean(0)
    assert not torch.allclose(reached[-1], average, atol=1e-5)
    expected = average.exp() if better else torch.ones(160)
    torch.testing.assert_close(polished.row_scales["model.layers.0.mlp.gate_proj"], expected)
