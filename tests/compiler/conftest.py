"""A tiny checkpoint and bundles made of it, shared by the tests that only read them."""

import sys
from pathlib import Path

import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.float_bundle import export_bundle
from planish.compiler.cli import main
from planish.compiler.pipeline.compile import compile_model
from tests.command import Result, Run
from tests.high_impact import WIDE
from tests.tiny import write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder."""
    return write_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def float_bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The float export of `tiny`."""
    return export_bundle(tiny, tmp_path_factory.mktemp("float") / "out")


@pytest.fixture(scope="session")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`tiny` compiled in w4a8k8v8 for ONNX Runtime, rounded to nearest."""
    return compile_model(tiny, tmp_path_factory.mktemp("compiled") / "out", scheme="w4a8k8v8", select="none")


@pytest.fixture(scope="session")
def flattened(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`tiny` compiled in w4a4k4v4 for ONNX Runtime, flattened by the kurtosis rule and polished."""
    out = tmp_path_factory.mktemp("flattened") / "out"
    few = {"dataset": str(text), "nsamples": 6, "seqlen": 32, "polish": 2}
    return compile_model(tiny, out, scheme="w4a4k4v4", select="kurtosis", **few)


@pytest.fixture(scope="session")
def wide_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder in whose widths there is room for high-impact channels."""
    return write_tiny(tmp_path_factory.mktemp("checkpoint") / "wide", **WIDE)


@pytest.fixture(scope="session")
def high_impact(wide_tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`wide_tiny` compiled in w2a16 for ONNX Runtime, with high-impact channels within a budget of bits."""
    out = tmp_path_factory.mktemp("high") / "out"
    few = {"dataset": str(text), "nsamples": 6, "seqlen": 32, "polish": 0}
    return compile_model(wide_tiny, out, scheme="w2a16", select="fixed:affine", avg_bits=3.2, **few)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand tokens, some of which take several bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    sentence = "the hen and the tin man's otter ran in; her café is 北 of the inn, number {}. "
    path.write_text("".join(sentence.format(i) for i in range(60)), encoding="utf-8")
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["planish", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return run
