"""A clip as something that gradient descent may move: a logit."""

import torch
from torch import Tensor

__all__ = ["clip_of", "clip_parameter"]

#: Clips are this times a sigmoid, cut at 1: so a grid may start with all of its range, where a logit would be infinite.
_REACH = 1.02


def clip_parameter(clip: float, device: torch.device | None = None) -> Tensor:
    """Return the logit, float32 [], that `clip_of` makes a clip in (0, 1] of."""
    return torch.tensor(clip / _REACH, device=device).logit().requires_grad_()


def clip_of(parameter: Tensor) -> Tensor:
    """Return the clip, [], of a logit. The gradient passes where the clip is cut, so that it may become less again."""
    clip = _REACH * parameter.sigmoid()
    return clip - (clip.detach() - 1).clamp_min(0)
