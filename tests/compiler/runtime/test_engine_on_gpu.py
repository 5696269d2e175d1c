"""What a GPU that is not there is taken for is what TensorRT has; and an engine on a GPU, where there is one."""

import inspect
from pathlib import Path

import numpy as np
import pytest

from planish.compiler.backends.tensorrt import build_engines
from planish.compiler.backends.tensorrt.device import first_device
from planish.compiler.backends.tensorrt.flavour import FLAVOURS
from planish.compiler.backends.tensorrt.gpu import Gpu
from planish.compiler.checkpoint import open_checkpoint
from planish.compiler.errors import EngineBuildError
from planish.compiler.export.float_model import save_model
from planish.compiler.export.portable import portable_model
from planish.compiler.quantize.codes import quantize_checkpoint
from planish.compiler.runtime.engine_session import EngineSession
from planish.compiler.runtime.session import Session
from planish.passes.scheme import Scheme
from tests.host_tensorrt import HostContext, HostEngine
from tests.tiny import write_tiny

TOKENS = np.random.default_rng(0).integers(3, 260, (1, 24))


@pytest.mark.trt
@pytest.mark.parametrize(("ours", "name"), [(HostEngine, "ICudaEngine"), (HostContext, "IExecutionContext")])
def test_tensorrt_has_every_method_with_its_arguments(ours: type, name: str) -> None:
    import tensorrt_rtx

    theirs = getattr(tensorrt_rtx, name)
    methods = [each for each in vars(ours) if not each.startswith("_")]
    assert methods
    for method in methods:
        arguments = list(inspect.signature(getattr(ours, method)).parameters)[1:]
        spelled = getattr(theirs, method).__doc__
        assert all(f"{argument}: " in spelled for argument in arguments), spelled


@pytest.mark.gpu
def test_memory_of_a_gpu() -> None:
    gpu = Gpu()
    first, second = gpu.allocate(64), gpu.allocate(64)
    numbers, found = np.arange(16, dtype=np.float32), np.full(16, np.nan, np.float32)
    gpu.upload(first, numbers)
    gpu.copy(second, 8, first, 4, 16)
    gpu.download(second, found)
    gpu.synchronize()
    np.testing.assert_array_equal(found, [0, 0, 1, 2, 3, 4, *[0] * 10])


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("scheme", ["w16a16k16v16", "w4a8k8v8"])
def test_an_engine_gives_the_logits_of_onnx_runtime(flavour: str, scheme: str, tmp_path: Path) -> None:
    pytest.importorskip(FLAVOURS[flavour].module)
    parsed, checkpoint = Scheme.parse(scheme), open_checkpoint(write_tiny(tmp_path / "checkpoint"))
    model, _ = portable_model(checkpoint, parsed, quantize_checkpoint(checkpoint, parsed, tmp_path / "codes"))
    portable = save_model(model, tmp_path / "portable")
    try:
        sms = (first_device().sm,)
        build_engines(portable, tmp_path / "engine", flavour=flavour, sms=sms, max_prompt=8, max_context=32)
    except EngineBuildError as error:
        if "cannot build for SM" not in str(error):
            raise
        pytest.skip(str(error))
    session, reference = EngineSession(tmp_path / "engine", flavour), Session(portable, 1)
    bound, cache, theirs = 0.01 if scheme == "w16a16k16v16" else 0.05, None, None
    for start, stop in ((0, 5), (5, 22), (22, 23), (23, 24)):
        expected, theirs = reference.run(TOKENS[:, start:stop], theirs)
        found, cache = session.run(TOKENS[:, start:stop], cache)
        assert np.abs(found - expected).max() <= bound * np.ptp(expected)
    assert cache is not None
    following, _ = session.run([[9], [9]], cache.take([0, 0]), logits_to_keep=1)
    expected, _ = reference.run([[9]], theirs)
    assert np.abs(following - expected).max() <= bound * np.ptp(expected)
