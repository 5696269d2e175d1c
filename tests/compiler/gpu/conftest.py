"""Tests here run on a GPU (marker `gpu`), and on tiny models with the kernels emulated on the host."""

import pytest
import torch

from planish.plugins import kv_ops, linear_ops, on_tensors, token_ops
from tests.kernel_emulation import emulated_kernels
from tests.kv_emulation import library


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip(f"PyTorch {torch.__version__} finds no GPU")
        return torch.device("cuda")
    monkeypatch.setattr(on_tensors, "DEVICE", "cpu")
    for module in (token_ops, linear_ops):
        monkeypatch.setattr(module, "kernel_library", emulated_kernels)
    monkeypatch.setattr(kv_ops, "kv_library", library)
    library().planish_choose(1, 0, 0)
    return torch.device("cpu")
