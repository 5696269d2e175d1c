"""An engine on the wrong machine, of the wrong version or damaged is told in words, before TensorRT is asked."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planish.compiler.backends.tensorrt import EngineRecord, check, check_engine, device
from planish.compiler.backends.tensorrt.device import Device, first_device
from planish.compiler.backends.tensorrt.engine_json import ENGINE_FILE, ENGINE_FORMAT, record_file
from planish.compiler.errors import BundleCorruptError, BundleFormatError, EngineMismatchError

ADA = Device("GeForce RTX 4090", 89, 13)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An engine for SM 86, 89, 120 of TensorRT-RTX 1.7.1.116 and CUDA 13."""
    (tmp_path / ENGINE_FILE).write_bytes(b"engine")
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> None:
    record = EngineRecord(
        format=ENGINE_FORMAT,
        planish="0.1.0",
        flavour="rtx",
        tensorrt="1.7.1.116",
        cuda=13,
        system="Linux x86_64",
        sms=(86, 89, 120),
        engine=record_file(folder / ENGINE_FILE),
        onnx=(),
        inputs={},
        outputs={},
        max_batch=1,
        max_prompt=1,
        max_context=1,
        fallbacks=(),
        build_seconds=1.0,
    )
    record.model_copy(update=changes).write(folder)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an Ada GPU and the TensorRT-RTX of the engine, unless a test says otherwise."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7.1.116"))
    monkeypatch.setattr(check, "first_device", lambda: ADA)


def test_the_right_machine_loads_it(folder: Path) -> None:
    assert check_engine(folder, "rtx") == EngineRecord.read(folder)


def test_another_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "first_device", lambda: Device("H100", 90, 13))
    told = r"built for SM 86, 89, 120 with TensorRT-RTX 1\.7\.1\.116; this machine has a H100, SM 90\. Compile"
    with pytest.raises(EngineMismatchError, match=told):
        check_engine(folder, "rtx")


def test_another_version(folder: Path) -> None:
    write(folder, tensorrt="1.6.0.1")
    told = r"with TensorRT-RTX 1\.6\.0\.1; installed is TensorRT-RTX 1\.7\.1\.116.*install TensorRT-RTX 1\.6\.0\.1"
    with pytest.raises(EngineMismatchError, match=told):
        check_engine(folder, "rtx")


def test_another_package(folder: Path) -> None:
    with pytest.raises(EngineMismatchError, match=r"with TensorRT-RTX 1\.7\.1\.116, not with TensorRT\."):
        check_engine(folder, "tensorrt")


def test_an_old_driver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "first_device", lambda: Device("GeForce RTX 3060", 86, 12))
    with pytest.raises(EngineMismatchError, match=r"for CUDA 13; the driver .* up to CUDA 12\. Upgrade"):
        check_engine(folder, "rtx")


def test_no_driver(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(check, "first_device", first_device)
    monkeypatch.setattr(device.ctypes, "CDLL", missing)
    with pytest.raises(EngineMismatchError, match=r"built for SM 86, 89, 120 .* has no NVIDIA driver .* 'ort'"):
        check_engine(folder, "rtx")


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(cuInit=lambda flags: 100)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: driver)
    with pytest.raises(EngineMismatchError, match="driver but no GPU"):
        first_device()


def test_what_the_driver_says_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def attribute(result: Any, which: int, _: Any) -> int:
        result._obj.value = {75: 12, 76: 0}[which]
        return 0

    def version(result: Any) -> int:
        result._obj.value = 13020
        return 0

    def name(buffer: Any, _size: int, _device: Any) -> int:
        buffer.value = b"GeForce RTX 5090"
        return 0

    driver = SimpleNamespace(
        cuInit=lambda _: 0,
        cuDeviceGet=lambda *_: 0,
        cuDeviceGetName=name,
        cuDeviceGetAttribute=attribute,
        cuDriverGetVersion=version,
    )
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: driver)
    assert first_device() == Device("GeForce RTX 5090", 120, 13)


def test_a_changed_engine(folder: Path) -> None:
    (folder / ENGINE_FILE).write_bytes(b"other!")
    with pytest.raises(BundleCorruptError, match=r"not the file that engine\.json describes"):
        check_engine(folder, "rtx")


def test_a_missing_engine(folder: Path) -> None:
    (folder / ENGINE_FILE).unlink()
    with pytest.raises(BundleCorruptError, match=r"model\.engine is missing"):
        check_engine(folder, "rtx")


def test_no_record(tmp_path: Path) -> None:
    with pytest.raises(BundleCorruptError, match="There is no engine in"):
        check_engine(tmp_path, "rtx")


def test_a_damaged_record(folder: Path) -> None:
    path = folder / "engine.json"
    path.write_text(path.read_text().replace('"sms"', '"sums"'))
    with pytest.raises(BundleCorruptError, match=r"engine\.json is damaged"):
        check_engine(folder, "rtx")


def test_a_newer_format(folder: Path) -> None:
    write(folder, format=ENGINE_FORMAT + 1)
    path = folder / "engine.json"
    path.write_text(path.read_text().replace('"planish"', '"new_field": 1,\n  "planish"'))
    with pytest.raises(BundleFormatError, match="Upgrade planish"):
        check_engine(folder, "rtx")
