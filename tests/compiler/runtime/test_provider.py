"""CUDA in ONNX Runtime: asked for where it is, refused in words where it is not or does not start."""

from typing import Any

import onnxruntime as ort
import pytest

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.errors import DeviceError, MissingExtraError
from planish.compiler.runtime import session as module
from planish.compiler.runtime.provider import Provider, check_provider
from planish.compiler.runtime.session import Session

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class WithCuda:
    """ONNX Runtime's package for GPUs; its sessions run on the CPU and say `running`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, running: list[str]) -> None:
        self.asked: list[str] = []
        self.preloaded = 0
        real = ort.InferenceSession

        def session(path: str, options: ort.SessionOptions, providers: list[str]) -> Any:
            self.asked = providers
            made = real(path, options, providers=[CPU])
            monkeypatch.setattr(made, "get_providers", lambda: running)
            return made

        def preload() -> None:
            self.preloaded += 1

        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
        monkeypatch.setattr(ort, "preload_dlls", preload)
        monkeypatch.setattr(module.ort, "InferenceSession", session)


def test_an_onnx_runtime_without_cuda(bundle: Bundle) -> None:
    if CUDA in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    check_provider(Provider.CPU)
    told = r"has no CUDA\. .*pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu\[cuda,cudnn\]"
    for ask in (bundle.session, bundle.load, bundle.runnable):
        with pytest.raises(MissingExtraError, match=told):
            ask(provider="cuda")


def test_cuda_that_does_not_start(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    WithCuda(monkeypatch, [CPU])
    with pytest.raises(DeviceError, match=r"has CUDA and cannot start it here.*leave out --provider cuda"):
        Session(bundle.model_path(), 1, "cuda")


def test_what_runs_where_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle.session(threads=1).runs_on == f"ONNX Runtime {ort.__version__}, cpu"
    there = WithCuda(monkeypatch, [CUDA, CPU])
    session = Session(bundle.model_path(), 1, "cuda")
    assert (there.asked, there.preloaded) == ([CUDA, CPU], 1)
    # The operators of this session all run on the CPU.
    before, _, rest = session.runs_on.partition("(0 of ")
    assert before == f"ONNX Runtime {ort.__version__}, cuda "
    assert int(rest.partition(" ")[0]) > 50


def test_the_cache_of_cuda_is_on_the_gpu() -> None:
    place = Provider.CUDA.place
    assert (place.device_type(), place.device_id()) == (ort.OrtDevice.make("cuda", 0)._get_c_device().device_type(), 0)
    assert place.device_type() != Provider.CPU.place.device_type()


@pytest.mark.gpu
def test_logits_of_cuda(bundle: Bundle) -> None:
    if CUDA not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA")
    on_gpu, on_cpu = bundle.session(provider="cuda"), bundle.session(threads=1)
    cache = theirs = None
    for ids in ([[5, 6, 7]], [[8]], [[9]]):
        found, cache = on_gpu.run(ids, cache)
        expected, theirs = on_cpu.run(ids, theirs)
        assert abs(found - expected).max() <= 0.03 * (expected.max() - expected.min())
    taken, _ = on_gpu.run([[10], [10]], cache.take([0, 0]))
    assert abs(taken[0] - taken[1]).max() == 0
