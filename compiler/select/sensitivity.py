"""How much the loss of the model depends on every channel of every linear: the empirical Fisher information.

F = E[(dL / dW)^2] with the mean over sequences, taken one by one, and L the mean cross entropy of a sequence's next
tokens: the diagonal of the loss's curvature, as far as gradients tell it. Rounding moves a weight by W - Q(W), so
F (W - Q(W))^2 / 2 is what it costs to second order; F alone, the score of arXiv 2511.17801, is what it costs where all
weights move alike.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import CalibrationError
from planish.compiler.learn.block import MODULES, Angles, Block, FloatHooks, read_block, run_block
from planish.compiler.learn.flattening import run_finite
from planish.compiler.learn.precision import fast_products
from planish.compiler.progress import Progress
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.compiler.select.channel_split import Axis
from planish.passes.scheme import LinearFormat

__all__ = ["BlockSensitivity", "Score", "channel_order", "measure_sensitivity"]

#: How channels are ranked: by the sum of F, or of F (W - Q(W))^2.
Score = Literal["fisher", "damage"]

_INPUTS = "sensitivity-inputs.npy"


@dataclasses.dataclass(frozen=True)
class BlockSensitivity:
    """How much the loss depends on one block.

    Attributes:
        scores: by module, score and axis, the sum over each channel, float32 [channels].
        output_weight: mean over sequences of sum_t ||dL / dy_t||^2 ||y_t||^2 / hidden, with y_t the block's output at
            token t: twice the loss that an error of the output costs to second order, per squared size of the error
            relative to y_t, if it is alike in all directions. So losses of blocks by `residual_loss`, times this, add
            up to what they mean for the model.
    """

    scores: dict[str, dict[Score, dict[Axis, Tensor]]]
    output_weight: float


def measure_sensitivity(
    checkpoint: Checkpoint, token_ids: npt.NDArray[np.int64], form: LinearFormat, folder: Path, progress: Progress
) -> list[BlockSensitivity]:
    """Return the sensitivity of every block of the float model.

    The inputs of all blocks are kept on disk, 4 bytes x blocks x tokens x hidden, and each block is computed again for
    its gradient, all sequences through one block before the next. So memory holds one block's weights, as much again
    twice over for its gradient and the sum of squares, and the gradient of the hidden states; and while the loss is
    taken, the output projection and the logits of one sequence.

    Args:
        checkpoint: the float model.
        token_ids: calibration sequences, int64 [sequences, seq].
        form: what weights are rounded to, by `quantize_weight`.
        folder: to work in.
        progress: is told how far the run is.

    Raises:
        CalibrationError: if activations or gradients are not finite; the message names the block.
    """
    config, ids = checkpoint.config, torch.from_numpy(token_ids)
    count, angles = config.num_hidden_layers, Angles.of(config, ids.shape[1])
    path, found = folder / _INPUTS, []
    with fast_products():
        hidden = _inputs_of_blocks(checkpoint, ids, angles, path)
        gradients = _gradients_at_the_end(checkpoint, ids, hidden[count])
        for layer in reversed(range(count)):
            block, outputs = read_block(checkpoint, layer), hidden[layer + 1]
            strength = gradients.square().sum(-1) * outputs.square().sum(-1)
            squares = _backward(block, hidden[layer], gradients, angles)
            if not gradients.isfinite().all():
                raise CalibrationError(
                    f"The gradient of the loss at decoder block {layer} is NaN or infinity. Calibrate on other text."
                )
            scores = {module: _scores(block.weight(module), each, form) for module, each in squares.items()}
            found.append(BlockSensitivity(scores, float(strength.sum(-1).mean()) / config.hidden_size))
            progress.step("sensitivity of channels", len(found), count)
    path.unlink()
    return found[::-1]


def channel_order(block: BlockSensitivity, modules: Sequence[str], axis: Axis, score: Score) -> Tensor:
    """Return the channels that `modules` have together, those that matter most first, int64 [channels].

    Input channels are those of the input that the modules share, and their scores add up. Output channels are the rows
    of the modules' weights one below the other.
    """
    scores = [block.scores[module][score][axis] for module in modules]
    together = torch.stack(scores).sum(0) if axis == "in" else torch.cat(scores)
    return torch.argsort(together, descending=True, stable=True)


@torch.no_grad()
def _inputs_of_blocks(checkpoint: Checkpoint, ids: Tensor, angles: Angles, path: Path) -> Tensor:
    """Return the inputs of every block and the outputs of the last, [blocks + 1, sequences, seq, hidden], on disk."""
    config = checkpoint.config
    shape = (config.num_hidden_layers + 1, *ids.shape, config.hidden_size)
    hidden = torch.from_numpy(np.lib.format.open_memmap(path, "w+", np.float32, shape))
    hidden[0] = _float(checkpoint, "model.embed_tokens.weight")[ids]
    for layer in range(config.num_hidden_layers):
        block = read_block(checkpoint, layer)
        for i in range(len(ids)):
            hidden[layer + 1, i] = run_finite(block, hidden[layer, i : i + 1], angles, layer)[0]
    return hidden


def _gradients_at_the_end(checkpoint: Checkpoint, ids: Tensor, final: Tensor) -> Tensor:
    """Return dL / dy of the last block's outputs, [sequences, seq, hidden]."""
    config, gain = checkpoint.config, _float(checkpoint, "model.norm.weight")
    tied = config.tie_word_embeddings
    head = _float(checkpoint, "model.embed_tokens.weight" if tied else "lm_head.weight")
    gradients = torch.empty(final.shape)
    for i, tokens in enumerate(ids):
        y = final[i].clone().requires_grad_()
        h = gain * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + config.rms_norm_eps))
        loss = torch.nn.functional.cross_entropy(h[:-1] @ head.T, tokens[1:])
        (gradients[i],) = torch.autograd.grad(loss, y)
    return gradients


def _backward(block: Block, inputs: Tensor, gradients: Tensor, angles: Angles) -> dict[str, Tensor]:
    """Take `gradients` from the outputs to the inputs, in place; return E[(dL / dW)^2] by module, [out, in]."""
    leaves = {module: block.weight(module).detach().requires_grad_() for module in MODULES}
    hooks = FloatHooks(Block(block.config, block.tensors | {f"{name}.weight": leaf for name, leaf in leaves.items()}))
    squares = {module: torch.zeros_like(block.weight(module)) for module in MODULES}
    for i in range(len(inputs)):
        x = inputs[i : i + 1].clone().requires_grad_()
        y = run_block(block.config, hooks, x, angles)
        gradients[i : i + 1], *of_weights = torch.autograd.grad(y, [x, *leaves.values()], gradients[i : i + 1])
        for module, gradient in zip(MODULES, of_weights, strict=True):
            squares[module] += gradient.square_()
    return {module: each.div_(len(inputs)) for module, each in squares.items()}


def _scores(weight: Tensor, fisher: Tensor, form: LinearFormat) -> dict[Score, dict[Axis, Tensor]]:
    damage = fisher * (weight - dequantize_weight(quantize_weight(weight, form))).square()
    return {
        "fisher": {"in": fisher.sum(0), "out": fisher.sum(1)},
        "damage": {"in": damage.sum(0), "out": damage.sum(1)},
    }


def _float(checkpoint: Checkpoint, name: str) -> Tensor:
    return torch.from_numpy(checkpoint.tensor(name).astype(np.float32))
