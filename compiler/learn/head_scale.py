"""The channel scale between the last norm and lm_head, so that lm_head's inputs and weights round well together."""

import dataclasses

import torch
from torch import Tensor

from planish.compiler.learn.polish.next_token import Head
from planish.compiler.learn.streams import Streams
from planish.compiler.learn.transforms.closed_forms import rms_scale
from planish.compiler.quantize.arithmetic import low_bit_linear, quantize_weight
from planish.passes.scheme import LinearFormat
from planish.passes.transforms import Array

__all__ = ["HeadScale", "head_scale"]

#: What the error is measured on, at most: tokens of the held-out text, entries of the vocabulary.
_TOKENS, _ENTRIES = 1024, 8192


@dataclasses.dataclass(frozen=True)
class HeadScale:
    """What was found for lm_head.

    Attributes:
        scale: float32 [hidden], what the last norm's outputs are multiplied by; None leaves them as they are.
        error_before: squared error of lm_head's outputs on held-out text, a share of their squares, without it.
        error: the same with what was kept.
    """

    scale: Array | None
    error_before: float
    error: float


@torch.no_grad()
def head_scale(head: Head, form: LinearFormat, streams: Streams) -> HeadScale:
    """Return the RMS rule's scale, (E[w^2] / E[x^2])^(1/4), if lm_head on its grid errs less with it.

    Args:
        head: of the float model.
        form: of lm_head, whose inputs are on a grid too.
        streams: the outputs of the last block.
    """
    device, width = head.gain.device, len(head.gain)
    squares, tokens = torch.zeros(width, dtype=torch.float64, device=device), 0
    for part in streams.batches(size=1):
        x = head.normalized(streams.target[part].to(device)).reshape(-1, width)
        squares, tokens = squares + x.double().square().sum(0), tokens + len(x)
    # Some rows at a time: lm_head is the largest matrix of the model, and squares of all of it would be as large.
    parts = [rows.double().square().sum(0) for rows in torch.split(head.weight, _ENTRIES)]
    weights = torch.stack(parts).sum(0) / len(head.weight)
    scale = rms_scale(squares / tokens, weights).float()
    held_out = torch.cat([streams.target[part] for part in streams.batches(held_out=True, size=1)]).to(device)
    x, rows = _every(head.normalized(held_out).reshape(-1, width), _TOKENS), _every(head.weight, _ENTRIES)
    before, error = (_error(x, rows, form, each) for each in (torch.ones_like(scale), scale))
    return HeadScale(scale.cpu().numpy(), before, error) if error < before else HeadScale(None, before, before)


def _every(rows: Tensor, most: int) -> Tensor:
    """Return at most `most` of the rows, evenly spaced."""
    return rows[:: -(-len(rows) // most)]


def _error(x: Tensor, weight: Tensor, form: LinearFormat, scale: Tensor) -> float:
    y = x @ weight.T
    rounded = low_bit_linear(x * scale, quantize_weight(weight / scale, form), form)
    return float((rounded - y).square().sum() / y.square().sum())
