"""Clips that are learned."""

import pytest
import torch

from planish.compiler.learn.rounding.clip_parameter import clip_of, clip_parameter


@pytest.mark.parametrize("clip", [0.4, 0.85, 1.0])
def test_there_and_back(clip: float) -> None:
    assert clip_of(clip_parameter(clip)).item() == pytest.approx(clip, rel=1e-5)


def test_all_of_the_range_is_exact_and_can_be_left() -> None:
    parameter = clip_parameter(1.0)
    assert clip_of(parameter).item() == 1
    with torch.no_grad():
        parameter += 5  # far beyond
    assert clip_of(parameter).item() == 1
    clip_of(parameter).backward()
    assert parameter.grad is not None
    assert parameter.grad > 0
