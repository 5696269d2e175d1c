"""The channel scale of lm_head, against numpy in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from planish.compiler.learn.head_scale import head_scale
from planish.compiler.learn.polish.next_token import Head
from planish.compiler.learn.streams import Streams
from planish.passes.scheme import Scheme

W8A8 = Scheme.parse("w4a4k4v4", "w8a8").lm_head
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def case(gain: Tensor, columns: Tensor) -> tuple[Head, Streams]:
    """Return lm_head behind a norm of some gain, with columns of some size, and six sequences, two held out."""
    outputs = normal(6, 50, len(gain))
    return Head(gain, normal(300, len(gain)) * columns, 1e-5), Streams(outputs, outputs, 2)


def error(head: Head, x: Tensor, scale: np.ndarray) -> float:
    """Return the relative error of 8-bit products in float64, weights rounded by their absolute maximum."""
    states = x.double().numpy().reshape(-1, len(scale))
    normed = states / np.sqrt((states**2).mean(-1, keepdims=True) + head.epsilon) * head.gain.double().numpy()
    weight = head.weight.double().numpy()
    expected = normed @ weight.T

    def rounded(rows: np.ndarray) -> np.ndarray:
        step = np.abs(rows).max(-1, keepdims=True) / 127
        return np.round(rows / step) * step

    found = rounded(normed * scale) @ rounded(weight / scale).T
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


def test_loud_channels_are_turned_down() -> None:
    gain = torch.ones(64)
    gain[[3, 40]] = torch.tensor([60.0, 25.0])
    head, streams = case(gain, torch.ones(64))
    found = head_scale(head, W8A8, streams)
    assert found.scale is not None
    x = streams.target[:4].double()
    x = (x / (x.square().mean(-1, keepdim=True) + head.epsilon).sqrt() * gain).reshape(-1, 64)
    squares = x.square().mean(0), head.weight.double().square().mean(0)
    of_x, of_w = (each + 0.01 * each.mean() for each in squares)
    expected = (of_w / of_x) ** 0.25
    np.testing.assert_allclose(found.scale, expected / expected.log().mean().exp(), rtol=1e-5)
    assert found.error < 0.5 * found.error_before
    held_out = streams.target[4:]
    assert found.error_before == pytest.approx(error(head, held_out, np.ones(64)), rel=0.1)
    assert found.error == pytest.approx(error(head, held_out, found.scale.astype(np.float64)), rel=0.1)


def test_a_scale_that_does_harm_is_not_kept() -> None:
    # What the rule is fitted to is loud where what is held out is not.
    gain = torch.ones(64)
    head, streams = case(gain, torch.ones(64))
    streams.target[:4, :, 5] *= 3000
    found = head_scale(head, W8A8, streams)
    assert found.scale is None
    assert found.error == found.error_before == pytest.approx(error(head, streams.target[4:], np.ones(64)), rel=0.1)


def test_a_long_text_and_a_large_vocabulary_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    gain = torch.exp(normal(64))
    head, streams = case(gain, torch.ones(64))
    whole = head_scale(head, W8A8, streams)
    monkeypatch.setattr("planish.compiler.learn.head_scale._TOKENS", 30)
    monkeypatch.setattr("planish.compiler.learn.head_scale._ENTRIES", 90)
    sampled = head_scale(head, W8A8, streams)
    np.testing.assert_array_equal(sampled.scale, whole.scale)
    assert sampled.error != whole.error
    assert sampled.error == pytest.approx(whole.error, rel=0.2)
