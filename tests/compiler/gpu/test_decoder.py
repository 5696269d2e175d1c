"""The decoder computes what the portable model means: every code is right, and so are the logits behind them.

At 3 bits a value between two codes may go either way when the floats before it differ in their last bits, and one code
changes all logits behind it: attention of the kernels multiplies float16 numbers, so about one code in 5,000 differs
from ONNX Runtime's. So the oracle, which verification holds the portable model to, follows the decoder's roundings
once each is seen to be within its rights, and what remains is compared: see tests/decoding.py.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.errors import DeviceError, TextError, UnsupportedModelError
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.gpu.decoder import Decoder
from planish.compiler.gpu.weights import read_weights
from planish.compiler.learn.transforms.transformed import TransformedCheckpoint
from planish.compiler.pipeline.compile import compile_model
from planish.compiler.pipeline.high_impact import untransformed
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.compiler.select.plan_file import load_transforms
from planish.passes.scheme import Scheme
from planish.passes.transforms import Transforms
from tests.decoding import Agreement, Run, compare
from tests.flattening import random_transforms
from tests.high_impact import random_high_impact
from tests.onnx_run import CachedModel, range_error
from tests.tiny import write_tiny

#: Heads that the kernels take, and widths with padding in every layout.
SHAPE = {"hidden_size": 192, "intermediate_size": 328, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64}  # fmt: skip
CONTEXT = 64
#: Largest difference of a logit, roundings followed, as a share of the range of the logits; 2e-4 is seen.
TOLERANCE = 1e-3
PROMPT = "The quick brown fox jumps over the lazy dog, and every dog in the village begins to"


@dataclasses.dataclass(frozen=True)
class Portable:
    """A portable model, and what it was made of."""

    model: Path
    config: LlamaConfig
    scheme: Scheme
    transforms: Transforms

    @classmethod
    def write(
        cls,
        folder: Path,
        spelling: str,
        form: str | None,
        high: int | None = None,
        lm_head: str | None = None,
        **shape: object,
    ) -> "Portable":
        """Round a tiny model to nearest behind random transforms of a form, with high-impact channels of some bits."""
        checkpoint = open_checkpoint(write_tiny(folder / "tiny", **{**SHAPE, **shape}))
        scheme, config = Scheme.parse(spelling, lm_head), checkpoint.config
        transforms = random_transforms(config, form) if form else untransformed(config)
        if high:
            transforms = transforms.with_high(random_high_impact(transforms, high))
        codes = quantize_checkpoint(
            TransformedCheckpoint(checkpoint, transforms), scheme, folder / "codes", None, transforms.high
        )
        model = save_model(portable_model(checkpoint, scheme, codes, transforms)[0], folder / "portable")
        return cls(model, config, scheme, transforms)

    def decoder(self, device: torch.device) -> Decoder:
        return Decoder(read_weights(self.model, self.config.num_hidden_layers, device), self.config, CONTEXT, device)

    def check(self, run: Run) -> Agreement:
        """Check the codes and logits of a run, and its tokens where the oracle does not hesitate."""
        found = compare(run, self.model, self.config, self.scheme, self.transforms)
        assert found.logits_error < TOLERANCE
        assert found.followed <= 5e-4 * found.roundings
        sure = [margin > 2 * TOLERANCE for margin in found.margins]
        assert sum(sure) > len(sure) / 2
        assert [t for t, is_sure in zip(run.tokens, sure, strict=True) if is_sure] == [
            t for t, is_sure in zip(found.tokens, sure, strict=True) if is_sure
        ]
        return found


def prompt_of(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 272, count)]


@pytest.mark.parametrize("prompt", [1, 20])
@pytest.mark.parametrize(
    ("spelling", "form", "high"),
    [
        ("w3a3k3v3", None, None),
        ("w3a3k3v3", "scale rows left", None),
        ("w3a3k3v3", "right", 4),
        ("w3a3k3v3", None, 4),
        ("w4a4k4v4", "right left", None),
        ("w4a4k4v4", "rows", None),
        ("w2a4k2v3", "left", None),
    ],
)
def test_codes_logits_and_tokens(
    spelling: str, form: str | None, high: int | None, prompt: int, device: torch.device, tmp_path: Path
) -> None:
    portable = Portable.write(tmp_path, spelling, form, high)
    decoder = portable.decoder(device)
    run = Run(decoder, prompt_of(prompt), 8)
    portable.check(run)
    assert decoder.generate(prompt_of(prompt), max_new_tokens=8) == run.tokens


@pytest.mark.parametrize("form", ["scale right", "rows left"])
def test_one_token_is_onnx_runtimes(form: str, device: torch.device, tmp_path: Path) -> None:
    """A token that attends to itself alone gets its own value, exactly: nothing has to be followed."""
    portable = Portable.write(tmp_path, "w3a3k3v3", form, high=4)
    decoder, model = portable.decoder(device), CachedModel(portable.model)
    for token in prompt_of(12):
        expected = model(np.array([[token]])).logits[0]
        found = decoder.prefill([token]).cpu().numpy()
        assert range_error(found, expected) < TOLERANCE
        assert found.argmax() == expected.argmax()


def test_a_compiled_bundle_within_a_budget_of_bits(
    device: torch.device, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_tiny(tmp_path / "tiny", **SHAPE)
    bundle = compile_model(
        checkpoint, tmp_path / "out", scheme="w3a3k3v3", avg_bits=3.9, select="measured", dataset=str(text), nsamples=6,
        seqlen=32, polish=1,
    )  # fmt: skip
    transforms = load_transforms(bundle.path, bundle.config)
    assert any(layer.high for layer in transforms.layers)
    decoder = Decoder.open(bundle, context=CONTEXT, device=str(device))
    Portable(bundle.model_path("portable"), bundle.config, bundle.scheme, transforms).check(
        Run(decoder, bundle.tokenizer.encode("the hen ran in"), 8)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="finds no GPU, and the decoder runs on one"):
        Decoder.open(bundle)


def test_generation_ends_where_it_should(device: torch.device, tmp_path: Path) -> None:
    portable = Portable.write(tmp_path, "w4a4k4v4", None)
    decoder, prompt = portable.decoder(device), prompt_of(5)
    tokens = decoder.generate(prompt, max_new_tokens=40)
    assert tokens == Run(decoder, prompt, 40).tokens
    assert decoder.generate(prompt_of(30, seed=1), max_new_tokens=100) == decoder.generate(
        prompt_of(30, seed=1), max_new_tokens=CONTEXT - 30
    )
    # What another text left in the cache is not seen.
    assert decoder.generate(prompt, max_new_tokens=40) == tokens
    # The last token that has not come before, which is behind those that are looked at together.
    end = max(i for i, token in enumerate(tokens) if token not in tokens[:i])
    assert end > 17
    assert decoder.generate(prompt, max_new_tokens=40, eos=[tokens[end]]) == tokens[:end]
    assert decoder.generate(prompt, max_new_tokens=1) == tokens[:1]
    assert decoder.generate(prompt, max_new_tokens=0) == []
    for wrong in ([], prompt_of(CONTEXT)):
        with pytest.raises(TextError, match=f"has {len(wrong)} tokens, and the decoder takes 1 to 63"):
            decoder.generate(wrong, max_new_tokens=1)


@pytest.mark.gpu
def test_the_graph_gives_what_its_kernels_give(device: torch.device, tmp_path: Path) -> None:
    portable = Portable.write(tmp_path, "w3a3k3v3", "scale rows left", high=4)
    prompt, eager, captured = prompt_of(20), portable.decoder(device), portable.decoder(device)
    captured.capture()
    assert torch.equal(captured.prefill(prompt), eager.prefill(prompt))
    for _ in range(30):
        assert torch.equal(captured.step(), eager.step())


@pytest.mark.slow
def test_smollm2(device: torch.device, text: Path, tmp_path: Path) -> None:
    """All of SmolLM2 on a GPU, its first two blocks emulated."""
    on_gpu = device.type == "cuda"
    bundle = compile_model(
        "smollm2", tmp_path / "out", scheme="w3a3k3v3", select="fixed:affine", dataset=str(text), nsamples=4, seqlen=64,
        polish=0, num_layers=None if on_gpu else 2, device="cuda" if on_gpu else "cpu", verify_passes=False,
    )  # fmt: skip
    decoder, prompt = Decoder.open(bundle, context=128, device=str(device)), bundle.tokenizer.encode(PROMPT)
    run = Run(decoder, prompt, 40 if on_gpu else 4)
    portable = Portable(
        bundle.model_path("portable"), bundle.config, bundle.scheme, load_transforms(bundle.path, bundle.config)
    )
    portable.check(run)
    assert decoder.generate(prompt, max_new_tokens=len(run.tokens)) == run.tokens


@pytest.mark.parametrize(
    ("spelling", "settings", "why"),
    [
        ("w4a4", {}, "The cache stays in floating point"),
        ("w3a16k3v3", {}, "The activations in front of model.layers.0.self_attn.qkv_proj stay in floating point"),
        ("w16a16k4v4", {}, "model.layers.0.self_attn.qkv_proj stays in floating point"),
        ("w8a8k8v8", {}, "qkv_proj.product has weights of 8 bits; 2, 3, 4 have a kernel"),
        ("w4a4k4v4g32", {}, "qkv_proj.product has 6 scales to a row of weights"),
        ("w4a4k4v4", {"lm_head": "w4a4"}, "lm_head has weights of 4 bits, and the decoder multiplies it with 8"),
        ("w4a4k4v4", {"lm_head": "w16a16"}, "The activations in front of lm_head stay in floating point"),
        ("w3a3k3v3", {"bits": 8}, "qkv_proj has high-impact channels of 8 bits, and kernels take them with 4"),
        ("w3a3k3v3", {"attention_bias": True}, "model.layers.0.self_attn.q_proj has a bias"),
        ("w3a3k3v3", {"mlp_bias": True}, "model.layers.0.mlp.gate_proj has a bias"),
        ("w3a3k3v3", {"intermediate_size": 324}, "has 648 rows of gate and up, and the kernel takes them in sixteens"),
    ],
)
def test_what_has_no_kernel_is_refused_in_words(
    spelling: str, settings: dict[str, Any], why: str, tmp_path: Path
) -> None:
    shape = {name: value for name, value in settings.items() if name not in ("bits", "lm_head")}
    portable = Portable.write(tmp_path, spelling, None, settings.get("bits"), settings.get("lm_head"), **shape)
    with pytest.raises(UnsupportedModelError, match=why):
        read_weights(portable.model, portable.config.num_hidden_layers, torch.device("cpu"))


def test_heads_that_have_no_kernel(device: torch.device, tmp_path: Path) -> None:
    portable = Portable.write(tmp_path, "w4a4k4v4", None, head_dim=24)
    with pytest.raises(ValueError, match="heads of 24 channels have no kernel; those of 64, 96 and 128 have"):
        portable.decoder(device)
