"""What is counted in a bundle is what its files hold."""

from pathlib import Path

import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.inspection import inspect
from planish.compiler.pipeline.compile import compile_model
from planish.passes.scheme import Scheme

#: Input and output channels of the seven linears of a block of the tiny model.
LINEARS = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)]


def expected_bits(scheme: Scheme) -> float:
    stored = sum(scheme.linear.average_bits(k) * k * n for k, n in LINEARS)
    return stored / sum(k * n for k, n in LINEARS)


@pytest.mark.parametrize("spelled", ["w3a3k3v3", "w2a16g32", "w4a8k2v4g64"])
def test_bits_are_those_of_the_formats(tiny: Path, tmp_path: Path, spelled: str) -> None:
    found = inspect(compile_model(tiny, tmp_path / "out", scheme=spelled, select="none"))
    assert found.average_bits == pytest.approx(expected_bits(Scheme.parse(spelled)))
    assert found.lm_head_bits == pytest.approx(8 + 32 / 64)
    assert (found.linears, found.skipped, found.layers) == (14, 0, 2)


def test_cache_bytes_agree_with_the_scheme_and_the_session(bundle: Bundle) -> None:
    found = inspect(bundle)
    assert found.kv_bytes_per_token == bundle.scheme.kv_bytes_per_token(2, 2, 16)
    assert found.kv_bytes_per_token == bundle.session(threads=1).cache_bytes_per_token
    assert found.kv_saving == pytest.approx(2 * 16 * 2 / (2 * (16 + 4)))


def test_a_float_export_is_counted_as_stored(float_bundle: Bundle) -> None:
    found = inspect(float_bundle)
    assert (found.average_bits, found.lm_head_bits) == (32, 32)
    assert (found.linears, found.skipped) == (0, 14)
    assert found.kv_saving == 0.5


def test_biases_are_no_linears(tmp_path: Path) -> None:
    from planish.compiler.bundle.float_bundle import export_bundle
    from tests.tiny import write_tiny

    model = write_tiny(tmp_path / "model", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    for found in (
        inspect(export_bundle(model, tmp_path / "float")),
        inspect(compile_model(model, tmp_path / "low", scheme="w4a8", lm_head="w16a16", select="none")),
    ):
        assert found.linears + found.skipped == 14
    assert found.average_bits == pytest.approx(expected_bits(Scheme.parse("w4a8")))


def test_sizes_are_those_of_the_files(bundle: Bundle) -> None:
    found = inspect(bundle)
    portable = sum((bundle.path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    engine = sum(path.stat().st_size for path in (bundle.path / "engines" / "ort").iterdir())
    assert (found.sizes["portable"], found.sizes["ort"]) == (portable, engine)
    assert found.sizes["total"] > portable + engine
