"""Every test here runs twice: on a GPU (marker `gpu`), and emulated on the host, where shapes are smaller."""

import pytest
import torch

from planish.plugins import linear_ops, on_tensors, token_ops
from tests.kernel_emulation import emulated_kernels


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} finds no GPU")
    return torch.device("cuda")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda":
        return request.getfixturevalue("gpu")
    monkeypatch.setattr(on_tensors, "DEVICE", "cpu")
    for module in (token_ops, linear_ops):
        monkeypatch.setattr(module, "kernel_library", emulated_kernels)
    return torch.device("cpu")
