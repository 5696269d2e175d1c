"""A GPU is seen by its device file, whichever card of a machine it is."""

from pathlib import Path

import pytest

from tests.gpu_here import gpu_is_here


@pytest.mark.parametrize("device", ["nvidia0", "nvidia3", "nvidia12", "dxg", "nvhost-gpu", "nvgpu"])
def test_devices_of_gpus(device: str, tmp_path: Path) -> None:
    assert not gpu_is_here(tmp_path)
    (tmp_path / device).touch()
    assert gpu_is_here(tmp_path)


@pytest.mark.parametrize("device", ["nvidiactl", "nvidia-uvm", "nvidia-modeset", "null"])
def test_other_devices(device: str, tmp_path: Path) -> None:
    (tmp_path / device).touch()
    assert not gpu_is_here(tmp_path)
