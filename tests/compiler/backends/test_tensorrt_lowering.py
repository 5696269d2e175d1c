"""The whole TensorRT form of a model, run on ONNX Runtime, computes what the oracle computes."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
import torch

from planish.compiler.backends.tensorrt.lowering import lower_to_tensorrt
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.compiler.verify.oracle import Oracle
from planish.passes.lower_kv_cache_to_tensorrt import LowerKvCacheToTensorrtPass
from planish.passes.lower_linears_to_tensorrt import LowerLinearsToTensorrtPass
from planish.passes.scheme import Scheme
from tests.fixed_cache import FixedCacheModel
from tests.onnx_run import range_error
from tests.tiny import VARIANTS, write_tiny

Array = npt.NDArray[Any]
CONTEXT, BATCH, LENGTH = 16, 2, 9
#: Prefill and then decode, token by token.
SIZES = [5, 1, 1, 1, 1]


class Case(NamedTuple):
    portable: ir.Model
    logits: Array


def prompt() -> tuple[Array, Array]:
    ids = np.random.default_rng(0).integers(3, 272, (BATCH, LENGTH))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def case(folder: Path, scheme: str, lm_head: str | None = None, **overrides: Any) -> Case:
    """Return the portable model of a tiny checkpoint and the oracle's logits of `prompt`."""
    checkpoint = open_checkpoint(write_tiny(folder / "checkpoint", **overrides))
    parsed = Scheme.parse(scheme, lm_head)
    codes = quantize_checkpoint(checkpoint, parsed, folder / "codes")
    model, _ = portable_model(checkpoint, parsed, codes)
    with torch.no_grad():
        logits = Oracle(checkpoint, parsed, codes.quantized).logits(*map(torch.from_numpy, prompt()))
    return Case(model, logits.numpy())


def run(model: ir.Model, folder: Path, *, float16: bool = False) -> Array:
    ids, mask = prompt()
    return FixedCacheModel(save_model(model, folder), BATCH, float16=float16).in_chunks(ids, SIZES, mask)


def real(logits: Array) -> Array:
    return logits[prompt()[1].astype(bool)]


@pytest.mark.parametrize("scheme", ["w4a8k8v8", "w3a3k3v3", "w4a4k4v4g32", "w2a16g16", "w8a8", "w16a16"])
def test_before_float16_the_logits_are_the_oracles(scheme: str, tmp_path: Path) -> None:
    portable, logits = case(tmp_path, scheme)
    lower = ir.passes.Sequential(
        LowerLinearsToTensorrtPass(), LowerKvCacheToTensorrtPass(CONTEXT), common.RemoveUnusedNodesPass()
    )
    found = run(lower(portable).model, tmp_path / "lowered")
    assert range_error(real(found), real(logits)) < 1e-5


# Low-bit activations turn a rounding of 2^-11 into another code now and then. The bounds say what that costs in a
# random model, which amplifies it; a mistake in a scale or mask costs the whole range.
@pytest.mark.parametrize(
    ("scheme", "lm_head", "bound"),
    [
        ("w16a16", None, 2e-3),
        ("w2a16g16", "w8a16", 2e-3),
        ("w4a8k8v8", None, 0.03),
        ("w8a8k8v8g64", None, 0.03),
    ],
)
def test_after_float16_the_logits_are_near(scheme: str, lm_head: str | None, bound: float, tmp_path: Path) -> None:
    portable, logits = case(tmp_path, scheme, lm_head)
    found = run(lower_to_tensorrt(portable, CONTEXT), tmp_path / "lowered", float16=True)
    assert range_error(real(found), real(logits)) < bound


@pytest.mark.parametrize("variant", ["mha", "mqa", "head_dim", "attention_bias", "mlp_bias", "tied", "rope_llama3"])
def test_every_variant_of_the_decoder_is_lowered(variant: str, tmp_path: Path) -> None:
    portable, logits = case(tmp_path, "w8a16k8v8", **VARIANTS[variant])
    found = run(lower_to_tensorrt(portable, CONTEXT), tmp_path / "lowered", float16=True)
    assert range_error(real(found), real(logits)) < 0.02


def test_the_portable_model_is_not_touched(tmp_path: Path) -> None:
    portable, _ = case(tmp_path, "w4a8k8v8")
    before = ir.to_proto(portable).SerializeToString(deterministic=True)
    lowered = lower_to_tensorrt(portable, CONTEXT)
    assert ir.to_proto(portable).SerializeToString(deterministic=True) == before
    assert not lowered.functions
    assert {node.domain for node in lowered.graph} == {""}


def test_only_the_last_logits_are_made_when_asked(tmp_path: Path) -> None:
    portable, _ = case(tmp_path, "w4a8k8v8")
    path = save_model(lower_to_tensorrt(portable, CONTEXT), tmp_path / "lowered")
    ids, mask = prompt()
    last, whole = (FixedCacheModel(path, BATCH)(ids, mask, 0, keep) for keep in (1, 0))
    assert last.shape[1] == 1
    np.testing.assert_allclose(last, whole[:, -1:], rtol=1e-3, atol=1e-3)
