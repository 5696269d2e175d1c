"""The portable model as a whole: its logits against the oracle, padded and in chunks, and what its files hold.

Here the oracle keeps to its own roundings, so a prompt in which a tie went the other way is far off; many short
prompts are run and most must agree. tests/compiler/test_verify.py follows the roundings.
"""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.compiler.verify.oracle import Oracle
from planish.passes.scheme import Scheme
from tests.fixed_cache import plain_session
from tests.onnx_run import CachedModel
from tests.tiny import VARIANTS, write_tiny

LENGTHS = [9, 4, 7, 1] * 6
SIZES = [6, 1, 2]
SCHEMES = [
    "w4a8k8v8",
    "w4a4k4v4",
    "w3a3k3v3",
    "w3a3k3v2",
    "w2a16g32",
    "w4a16g64",
    "w8a8kv8",
    "w16a16k4v4",
    "w4a4k4v4g32",
]
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
#: SmolLM2's widths, which no group of 128 divides.
SMOLLM2_BLOCK = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 1,
}


def assert_follows_the_oracle(folder: Path, spelling: str, work: Path) -> None:
    """Compare a padded batch at once, and with the cache carried from chunk to chunk."""
    checkpoint, scheme = open_checkpoint(folder), Scheme.parse(spelling)
    codes = quantize_checkpoint(checkpoint, scheme, work / "codes")
    compiled = CachedModel(save_model(portable_model(checkpoint, scheme, codes)[0], work / "model"))
    longest = max(LENGTHS)
    ids = np.random.default_rng(1).integers(3, 272, (len(LENGTHS), longest))
    mask = (np.arange(longest) >= longest - np.array(LENGTHS)[:, None]).astype(np.int64)
    with torch.no_grad():
        oracle = Oracle(checkpoint, scheme, codes.quantized)
        expected = oracle.logits(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    for found in (compiled(ids, mask).logits, compiled.in_chunks(ids, SIZES, mask)):
        error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        real = error[mask == 1]
        assert (real < 1e-5).mean() > 0.8
        assert real.max() < 0.3


@pytest.mark.parametrize("spelling", SCHEMES)
def test_every_scheme(spelling: str, tmp_path: Path) -> None:
    assert_follows_the_oracle(write_tiny(tmp_path / "tiny"), spelling, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny", **VARIANTS[variant])
    whole_bytes = open_checkpoint(folder).config.head_dim % 8 == 0
    assert_follows_the_oracle(folder, "w3a4k4v3g32" if whole_bytes else "w3a4g32", tmp_path)


def test_the_checker_accepts_it(tmp_path: Path) -> None:
    checkpoint, scheme = open_checkpoint(write_tiny(tmp_path / "tiny")), Scheme.parse("w3a3k3v2")
    codes = quantize_checkpoint(checkpoint, scheme, tmp_path / "codes")
    path = save_model(portable_model(checkpoint, scheme, codes)[0], tmp_path / "model")
    onnx.checker.check_model(str(path))
    functions = {function.name for function in onnx.load(path, load_external_data=False).functions}
    assert functions == {
        *("PlanishQuantizeActivation", "PlanishMatMul3", "PlanishMatMul8", "PlanishUnpack3", "PlanishUnpack8"),
        *(
            "PlanishAppendKv3",
            "PlanishAppendKv2",
            "PlanishAttendK3V2",
            "PlanishPack3",
            "PlanishPack2",
            "PlanishUnpack2",
        ),
    }


@pytest.mark.parametrize("spelling", ["w2a8", "w3a3k3v3", "w4a4k4v4", "w3a16g128", "w4a16g128"])
def test_bits_of_the_linears_in_the_file(spelling: str, tmp_path: Path) -> None:
    """At widths of 512 and more a weight takes at most its bits + 0.25, and no float copy is kept."""
    checkpoint, scheme = open_checkpoint(write_tiny(tmp_path / "tiny", **SMOLLM2_BLOCK)), Scheme.parse(spelling)
    codes = quantize_checkpoint(checkpoint, scheme, tmp_path / "codes")
    path = save_model(portable_model(checkpoint, scheme, codes)[0], tmp_path / "model")
    stored, outside = 0, 0
    for name, value in ir.load(path).graph.initializers.items():
        assert value.const_value is not None
        in_a_linear = "_proj" in name and name.endswith((".codes", ".scale"))
        stored += value.const_value.nbytes if in_a_linear else 0
        outside += 0 if in_a_linear else value.const_value.nbytes
    weights = sum(checkpoint.tensor(name).size for name in checkpoint.names() if name.endswith("_proj.weight"))
    assert scheme.linear.weight_bits < stored * 8 / weights <= scheme.linear.weight_bits + 0.25
    assert scheme.linear.average_bits(576) <= scheme.linear.weight_bits + 0.25
    # What else there is: embeddings in float16, lm_head in 8 bits with its scales, gains and small constants.
    assert outside < 272 * 576 * 2 + 272 * (576 + 4) + 3 * 576 * 4 + 4096
    data = path.with_name("model.onnx.data").stat().st_size
    assert data <= stored + outside + 4096 * 8


def test_what_stays_float_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny"))

    def left_float(spelling: str, lm_head: str | None = None) -> list[str]:
        scheme = Scheme.parse(spelling, lm_head)
        codes = quantize_checkpoint(checkpoint, scheme, tmp_path / spelling / str(lm_head))
        return portable_model(checkpoint, scheme, codes)[1]

    assert left_float("w4a4k4v4") == []
    assert left_float("w4a4k4v4", "w16a16") == ["lm_head"]
    everything = {name.removesuffix(".weight") for name in checkpoint.names() if "_proj" in name} | {"lm_head"}
    assert set(left_float("w16a16k4v4")) == everything
    assert len(left_float("w16a16k4v4")) == 15


def test_embeddings_are_float16_once_linears_are_quantised(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny(tmp_path / "tiny"))
    for spelling, dtype in (("w4a8", ir.DataType.FLOAT16), ("w16a16k4v4", ir.DataType.FLOAT)):
        scheme = Scheme.parse(spelling)
        codes = quantize_checkpoint(checkpoint, scheme, tmp_path / spelling)
        model, _ = portable_model(checkpoint, scheme, codes)
        assert model.graph.initializers["model.embed_tokens.weight"].dtype == dtype


@pytest.mark.parametrize("spelling", ["w4a8k8v8", "w3a3k3v2", "w2a16g32"])
def test_another_runtime_reads_it(spelling: str, tmp_path: Path) -> None:
    """onnx's evaluator, which takes a function only behind those that it calls."""
    checkpoint, scheme = open_checkpoint(write_tiny(tmp_path / "tiny")), Scheme.parse(spelling)
    codes = quantize_checkpoint(checkpoint, scheme, tmp_path / "codes")
    path = save_model(portable_model(checkpoint, scheme, codes)[0], tmp_path / "model")
    session = plain_session(path)
    sizes = {"batch": 1, "past": 0}
    feeds = {
        each.name: np.zeros([sizes.get(dim, dim) for dim in each.shape], TYPES[each.type])
        for each in session.get_inputs()
        if each.name.startswith("past_key_values.")
    }
    feeds |= {"input_ids": np.array([[5, 9, 40, 7]]), "attention_mask": np.ones((1, 4), np.int64)}
    feeds |= {"position_ids": np.arange(4)[None], "num_logits_to_keep": np.array(0)}
    found, expected = ReferenceEvaluator(onnx.load(path)).run(None, feeds), session.run(None, feeds)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-4 * np.ptp(expected[0]))
