"""A plugin library that is missing, of another version or for another TensorRT is told before TensorRT is asked.

The libraries here hold nothing but what a library says of itself; tests/plugins/tensorrt has the real one.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from planish.compiler.backends.tensorrt import build, build_engines, check, check_engine
from planish.compiler.backends.tensorrt.device import Device
from planish.compiler.backends.tensorrt.engine_json import EngineRecord
from planish.compiler.backends.tensorrt.job import Built, Job
from planish.compiler.backends.tensorrt.plugin_choice import PluginChoice, chosen_library
from planish.compiler.backends.tensorrt.plugin_library import (
    PLUGINS_VARIABLE,
    PluginLibrary,
    check_library,
    read_library,
)
from planish.compiler.backends.tensorrt.plugin_registry import load_plugins, look_up, plugin_nodes
from planish.compiler.backends.tensorrt.timings import keep_timings, timing_cache
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import BundleCorruptError, EngineBuildError, EngineMismatchError
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.passes.scheme import Scheme
from planish.plugins.native import build_library
from planish.plugins.tensorrt.plugins import LAYOUT, LINEAR, PLUGINS
from tests.tiny import write_tiny

VERSION = "11.1.0.106"
SAYS: dict[str, Any] = {
    "tensorrt": [11, 1, 0],
    "layout": LAYOUT,
    "sms": [80, 90],
    "plugins": {contract.name: contract.version for contract in PLUGINS},
}


def library(folder: Path, **changes: Any) -> Path:
    """Compile a library that says `SAYS`, with changes."""
    return compiled(folder, "planish_plugins", json.dumps({**SAYS, **changes}))


def compiled(folder: Path, function: str, says: str) -> Path:
    folder.mkdir(exist_ok=True)
    source = folder / "library.cpp"
    source.write_text(f'extern "C" const char* {function}() {{ return {json.dumps(says)}; }}\n')
    return build_library(source, folder)


def test_a_library_that_fits(tmp_path: Path) -> None:
    told = check_library(library(tmp_path), VERSION, 90)
    assert told == PluginLibrary(tensorrt=(11, 1, 0), layout=LAYOUT, sms=(80, 90), plugins=SAYS["plugins"])


def test_a_missing_library(tmp_path: Path) -> None:
    with pytest.raises(
        EngineMismatchError, match=r"plugin library .*none\.so is missing\. Compile it with 'make plugins'"
    ):
        read_library(tmp_path / "none.so")


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("text")
    with pytest.raises(EngineMismatchError, match=r"text\.so cannot be loaded here: "):
        read_library(tmp_path / "text.so")


def test_a_library_of_somebody_else(tmp_path: Path) -> None:
    with pytest.raises(EngineMismatchError, match=r"is no plugin library of planish\. Let PLANISH_PLUGINS name"):
        read_library(compiled(tmp_path, "others", ""))


@pytest.mark.parametrize("says", ["", "[1]", '{"layout": 1}'])
def test_a_library_that_says_something_else(says: str, tmp_path: Path) -> None:
    with pytest.raises(EngineMismatchError, match="by a planish that this one does not understand"):
        read_library(compiled(tmp_path, "planish_plugins", says))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"tensorrt": [10, 3, 0]},
            r"is for TensorRT 10\.3\.0, and installed is TensorRT 11\.1\.0\.106: interfaces change with the first",
        ),
        (
            {"layout": LAYOUT + 1},
            rf"reads weights in layout {LAYOUT + 1}, and this planish packs layout {LAYOUT}\. Compile",
        ),
        (
            {"plugins": {**SAYS["plugins"], LINEAR.name: "0"}},
            r"of another version: this planish wants PlanishLinear 2 \(it has 0\)\. Compile it again",
        ),
        ({"plugins": {}}, r"PlanishLinear 2 \(it has none\), PlanishKvAppend 1 \(it has none\)"),
        ({"sms": [80, 86]}, r"has kernels for SM 80, 86, and the GPU here is an SM 90\. Unset PLANISH_PLUGINS"),
    ],
)
def test_a_library_that_does_not_fit(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(EngineMismatchError, match=words):
        check_library(library(tmp_path, **changes), VERSION, 90)


def test_a_library_for_a_tensorrt_without_aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library(tmp_path, tensorrt=[10, 3, 0])
    monkeypatch.setenv(PLUGINS_VARIABLE, str(path))
    assert chosen_library("auto", "10.3.0.30", 90) == path
    assert chosen_library("none", "10.2.0.19", 90) is None
    with pytest.raises(EngineMismatchError, match=r"need TensorRT 10\.3 or later, and 10\.2\.0\.19 is installed"):
        chosen_library("auto", "10.2.0.19", 90)


class Registry:
    """A registry of plugins that has those it is given."""

    def __init__(self, *has: tuple[str, str, str], takes: bool = True) -> None:
        self._has, self._takes = has, takes
        self.loaded: list[str] = []

    def load_library(self, path: str) -> object | None:
        self.loaded.append(path)
        return object() if self._takes else None

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        return object() if (name, version, namespace) in self._has else None


def test_every_plugin_is_looked_up_before_parsing() -> None:
    nodes = Counter({("PlanishLinear", "1"): 8, ("PlanishKvAppend", "2"): 3})
    look_up(Registry(("PlanishLinear", "1", "planish"), ("PlanishKvAppend", "2", "planish")), nodes)
    with pytest.raises(EngineBuildError) as raised:
        look_up(Registry(("PlanishLinear", "1", "planish"), ("PlanishKvAppend", "1", "planish")), nodes)
    assert str(raised.value).splitlines() == [
        "The model needs plugins that TensorRT's registry does not have:",
        "  PlanishKvAppend version 2, 3 node(s): MISSING",
        "  PlanishLinear version 1, 8 node(s): there",
        "Compile the library again with 'make plugins', from the planish that lowered the model.",
    ]


def test_a_library_that_tensorrt_does_not_take() -> None:
    trt = SimpleNamespace(__version__=VERSION, get_plugin_registry=lambda: Registry(takes=False))
    with pytest.raises(
        EngineBuildError, match=r"TensorRT 11\.1\.0\.106 does not take the plugin library a\.so\. Compile"
    ):
        load_plugins(trt, Path("a.so"))  # type: ignore[arg-type]
    registry = Registry()
    trt = SimpleNamespace(__version__=VERSION, get_plugin_registry=lambda: registry)
    assert load_plugins(trt, Path("a.so")) is registry  # type: ignore[arg-type]
    assert registry.loaded == ["a.so"]


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = timing_cache(VERSION, 90)
    assert path == tmp_path / "planish" / "tensorrt-11.1.0.106-sm90.timings"
    keep_timings(SimpleNamespace(get_timing_cache=lambda: None), path)
    assert not path.exists()
    cache = SimpleNamespace(serialize=lambda: b"timings")
    keep_timings(SimpleNamespace(get_timing_cache=lambda: cache), path)
    assert path.read_bytes() == b"timings"
    assert len(list(path.parent.iterdir())) == 1


@pytest.fixture
def portable(tmp_path: Path) -> Path:
    checkpoint = open_checkpoint(
        write_tiny(tmp_path / "checkpoint", hidden_size=128, num_attention_heads=2, num_key_value_heads=2, head_dim=64)
    )
    scheme = Scheme.parse("w3a3k3v3")
    model, _ = portable_model(checkpoint, scheme, quantize_checkpoint(checkpoint, scheme, tmp_path / "codes"))
    return save_model(model, tmp_path / "portable")


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """A machine with TensorRT 11.1, an H100 and a plugin library; the jobs that a worker would get."""
    jobs: list[Job] = []

    def run_job(job: Job, progress: Any) -> Built:
        jobs.append(job)
        assert job.plugins is None or Path(job.plugins).is_file()
        Path(job.engine).write_bytes(b"engine")
        return Built(version=VERSION, sms=(90,), inputs={}, outputs={}, seconds=1.0)

    monkeypatch.setenv("PLANISH_PLUGINS", str(library(tmp_path / "library")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=VERSION))
    for module in (build, check):
        monkeypatch.setattr(module, "first_device", lambda: Device("H100", 90, 13))
    monkeypatch.setattr(build, "run_job", run_job)
    return jobs


@pytest.mark.parametrize("as_path", [True, False])
def test_a_build_with_plugins(as_path: bool, portable: Path, jobs: list[Job], tmp_path: Path) -> None:
    folder = tmp_path / "tensorrt"
    made = build_engines(portable if as_path else ir.load(portable), folder, flavour="tensorrt", max_context=40)
    assert {path.name for path in folder.iterdir()} == {
        "engine.json", "libplanish_plugins.so", "model.engine", "model.onnx", "model.onnx.data"
    }  # fmt: skip
    (job,) = jobs
    assert job.timing_cache is not None
    assert job.timing_cache.endswith("tensorrt-11.1.0.106-sm90.timings")
    # Kernels read the cache sixteen tokens at a time.
    assert made.record.max_context == 48
    assert made.record.plugins is not None
    assert made.record.plugins.versions == {contract.name: contract.version for contract in PLUGINS}
    said = {fallback.what: fallback.why for fallback in made.record.fallbacks}
    assert "weights of 8 bits have no kernel" in said["1 node(s): lm_head.product"]
    assert "low-bit KV cache" not in said
    assert plugin_nodes(folder / "model.onnx") == {
        ("PlanishQuantizeTokens", "2"): 8, ("PlanishLinear", "2"): 8,
        ("PlanishKvAppend", "1"): 2, ("PlanishKvAttend", "1"): 2,
    }  # fmt: skip
    onnx.checker.check_model(str(folder / "model.onnx"))
    assert check_engine(folder, "tensorrt") == made.record


@pytest.mark.parametrize("choice", ["auto", "none", "require"])
def test_the_user_says_whether_there_are_plugins(
    choice: PluginChoice, portable: Path, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_it(name: str) -> EngineRecord:
        return build_engines(portable, tmp_path / name, flavour="tensorrt", plugins=choice).record

    named = build_it("named")
    assert (named.plugins_asked, named.plugins is None, jobs[0].plugins is None) == (choice, *[choice == "none"] * 2)
    monkeypatch.delenv("PLANISH_PLUGINS")
    if choice == "require":
        with pytest.raises(EngineMismatchError, match="Plugins are required, and PLANISH_PLUGINS names no plugin"):
            build_it("not named")
        assert not (tmp_path / "not named").exists()
    else:
        assert build_it("not named").plugins is None


def test_an_engine_whose_library_is_another(portable: Path, jobs: list[Job], tmp_path: Path) -> None:
    folder = tmp_path / "tensorrt"
    build_engines(portable, folder, flavour="tensorrt")
    (folder / "libplanish_plugins.so").write_bytes(b"other")
    with pytest.raises(BundleCorruptError, match=r"libplanish_plugins\.so is not the file that engine\.json describes"):
        check_engine(folder, "tensorrt")
    (folder / "libplanish_plugins.so").unlink()
    with pytest.raises(BundleCorruptError, match=r"libplanish_plugins\.so is missing"):
        check_engine(folder, "tensorrt")


def test_an_engine_of_other_plugins(portable: Path, jobs: list[Job], tmp_path: Path) -> None:
    folder = tmp_path / "tensorrt"
    record = build_engines(portable, folder, flavour="tensorrt").record
    assert record.plugins is not None
    older = record.plugins.model_copy(update={"versions": {**record.plugins.versions, LINEAR.name: "0"}})
    EngineRecord.model_validate({**record.model_dump(), "plugins": older}).write(folder)
    with pytest.raises(
        EngineMismatchError, match=r"needs the plugins PlanishLinear 0, which this planish has in other"
    ):
        check_engine(folder, "tensorrt")


def test_a_library_that_does_not_fit_stops_the_build_first(
    portable: Path, jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANISH_PLUGINS", str(library(tmp_path / "older", tensorrt=[10, 3, 0])))
    with pytest.raises(EngineMismatchError, match=r"is for TensorRT 10\.3\.0"):
        build_engines(portable, tmp_path / "tensorrt", flavour="tensorrt")
    assert not jobs
    assert not (tmp_path / "tensorrt").exists()
