"""How much the loss of the model depends on every channel of every linear: the empirical Fisher information.

F = E[(dL / dW)^2] with the mean over sequences, taken one by one, and L the mean cross entropy of a sequence's next
tokens: the diagonal of the loss's curvature, as far as gradients tell it. Rounding moves a weight by W - Q(W), so
F (W - Q(W))^2 / 2 is what it costs to second order; F alone, the score of arXiv 2511.17801, is what it costs where all
weights move alike. E[x^2] (W - Q(W))^2, with x the channel's input, is what it costs the output of the linear.

Channels are those behind the transforms of a site, where there are any: W is then the weight that they are folded into.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import CalibrationError
from planish.compiler.learn.block import MODULES, SITE_MODULES, Angles, Block, read_block, run_block
from planish.compiler.learn.flattening import run_finite
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.transformed_hooks import TransformedHooks, factors_of_layer
from planish.compiler.progress import Progress
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.compiler.select.channel_split import Axis
from planish.passes.scheme import LinearFormat
from planish.passes.transforms import Site, Transforms

__all__ = ["BlockSensitivity", "Score", "channel_order", "measure_sensitivity"]

#: How channels are ranked: by the sum of F, of F (W - Q(W))^2, or of E[x^2] (W - Q(W))^2.
Score = Literal["fisher", "damage", "moment"]

_AXES: tuple[Axis, ...] = ("in", "out")
_NAME, _WEIGHT = "sensitivity", "output_weight"


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
    checkpoint: Checkpoint,
    token_ids: npt.NDArray[np.int64],
    form: LinearFormat,
    folder: Path,
    progress: Progress,
    transforms: Transforms | None = None,
    device: torch.device | None = None,
) -> list[BlockSensitivity]:
    """Return the sensitivity of every block of the float model; a killed run goes on behind the last block.

    The inputs of all blocks are kept on disk, 4 bytes x blocks x tokens x hidden, and each block is computed again for
    its gradient, all sequences through one block before the next. So memory holds one block's weights, as much again
    twice over for its gradient and the sum of squares, and the gradient of the hidden states; and while the loss is
    taken, the output projection and the logits of one sequence.

    Args:
        checkpoint: the float model.
        token_ids: calibration sequences, int64 [sequences, seq].
        form: what weights are rounded to, by `quantize_weight`.
        folder: keeps what is found, of this checkpoint, these tokens and these transforms alone.
        progress: is told how far the run is.
        transforms: behind which channels are; None is none.
        device: where a block and a sequence are; None is the CPU.

    Raises:
        CalibrationError: if activations or gradients are not finite; the message names the block.
    """
    config, ids = checkpoint.config, torch.from_numpy(token_ids)
    count, angles = config.num_hidden_layers, Angles.of(config, ids.shape[1], device)
    paths = [folder / f"{_NAME}-{layer}.safetensors" for layer in range(count)]
    inputs, done = folder / f"{_NAME}-inputs.npy", sum(path.exists() for path in paths)
    with fast_products():
        if done < count:
            if not inputs.exists():
                _write_inputs_of_blocks(checkpoint, ids, angles, inputs, device)
            hidden = torch.from_numpy(np.load(inputs, mmap_mode="r+"))
            kept = _gradient_file(folder, count - done)
            if not kept.exists():
                _write(kept, _gradients_at_the_end(checkpoint, ids, hidden[count], device))
            gradients = torch.from_numpy(np.load(kept))
        for layer in reversed(range(count - done)):
            block, outputs = read_block(checkpoint, layer).to(device), hidden[layer + 1]
            strength = gradients.square().sum(-1) * outputs.square().sum(-1)
            hooks = _Recording(block, factors_of_layer(transforms, layer, device))
            squares = _backward(block, hooks, hidden[layer], gradients, angles)
            if not gradients.isfinite().all():
                raise CalibrationError(
                    f"The gradient of the loss at decoder block {layer} is NaN or infinity. Calibrate on other text."
                )
            tokens = ids.numel()
            moments = {module: hooks.squares[site] / tokens for site in SITE_MODULES for module in SITE_MODULES[site]}
            scores = {
                module: _scores(hooks.weights[module].detach(), squares[module], moments[module], form)
                for module in MODULES
            }
            _write(_gradient_file(folder, layer), gradients)
            _keep(paths[layer], BlockSensitivity(scores, float(strength.sum(-1).mean()) / config.hidden_size))
            _gradient_file(folder, layer + 1).unlink()
            progress.step("sensitivity of channels", count - layer, count)
    for path in (inputs, _gradient_file(folder, 0)):
        path.unlink(missing_ok=True)
    return [_read(path) for path in paths]


def channel_order(block: BlockSensitivity, modules: Sequence[str], axis: Axis, score: Score) -> Tensor:
    """Return the channels that `modules` have together, those that matter most first, int64 [channels].

    Input channels are those of the input that the modules share, and their scores add up. Output channels are the rows
    of the modules' weights one below the other.
    """
    scores = [block.scores[module][score][axis] for module in modules]
    together = torch.stack(scores).sum(0) if axis == "in" else torch.cat(scores)
    return torch.argsort(together, descending=True, stable=True)


class _Recording(TransformedHooks):
    """Sums the squares of what linears read, by site, float32 [channels]."""

    def __init__(self, block: Block, factors: dict[Site, Factors]) -> None:
        super().__init__(block, factors)
        self.squares: dict[Site, Tensor] = {}

    def transform(self, site: Site, x: Tensor) -> Tensor:
        """Return what runs online at `site`."""
        x = super().transform(site, x)
        squares = x.detach().square().sum((0, 1))
        self.squares[site] = self.squares[site] + squares if site in self.squares else squares
        return x


@torch.no_grad()
def _write_inputs_of_blocks(
    checkpoint: Checkpoint, ids: Tensor, angles: Angles, path: Path, device: torch.device | None
) -> None:
    """Write the inputs of every block and the outputs of the last, float32 [blocks + 1, sequences, seq, hidden]."""
    config, unfinished = checkpoint.config, path.with_suffix(".part")
    shape = (config.num_hidden_layers + 1, *ids.shape, config.hidden_size)
    hidden = torch.from_numpy(np.lib.format.open_memmap(unfinished, "w+", np.float32, shape))
    hidden[0] = _float(checkpoint, "model.embed_tokens.weight")[ids]
    for layer in range(config.num_hidden_layers):
        block = read_block(checkpoint, layer).to(device)
        for i in range(len(ids)):
            hidden[layer + 1, i] = run_finite(block, hidden[layer, i : i + 1].to(device), angles, layer)[0]
    unfinished.rename(path)


def _gradients_at_the_end(
    checkpoint: Checkpoint, ids: Tensor, final: Tensor, device: torch.device | None = None
) -> Tensor:
    """Return dL / dy of the last block's outputs, [sequences, seq, hidden], on the CPU."""
    config, gain = checkpoint.config, _float(checkpoint, "model.norm.weight").to(device)
    tied = config.tie_word_embeddings
    head = _float(checkpoint, "model.embed_tokens.weight" if tied else "lm_head.weight").to(device)
    gradients = torch.empty(final.shape)
    for i, tokens in enumerate(ids.to(device)):
        y = final[i].to(device, copy=True).requires_grad_()
        h = gain * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + config.rms_norm_eps))
        loss = torch.nn.functional.cross_entropy(h[:-1] @ head.T, tokens[1:])
        (gradients[i],) = torch.autograd.grad(loss, y)
    return gradients


def _backward(
    block: Block, hooks: TransformedHooks, inputs: Tensor, gradients: Tensor, angles: Angles
) -> dict[str, Tensor]:
    """Take `gradients` from the outputs to the inputs, in place; return E[(dL / dW)^2] by module, [out, in]."""
    hooks.weights = {module: weight.detach().requires_grad_() for module, weight in hooks.weights.items()}
    squares = {module: torch.zeros_like(hooks.weights[module]) for module in MODULES}
    leaves = [hooks.weights[module] for module in MODULES]
    for i in range(len(inputs)):
        x = inputs[i : i + 1].to(leaves[0].device, copy=True).requires_grad_()
        y = run_block(block.config, hooks, x, angles)
        found, *of_weights = torch.autograd.grad(y, [x, *leaves], gradients[i : i + 1].to(x))
        gradients[i : i + 1] = found
        for module, gradient in zip(MODULES, of_weights, strict=True):
            squares[module] += gradient.square_()
    return {module: each.div_(len(inputs)) for module, each in squares.items()}


def _scores(weight: Tensor, fisher: Tensor, moment: Tensor, form: LinearFormat) -> dict[Score, dict[Axis, Tensor]]:
    lost = (weight - dequantize_weight(quantize_weight(weight, form))).square()
    of_weights: dict[Score, Tensor] = {"fisher": fisher, "damage": fisher * lost, "moment": moment * lost}
    return {score: {"in": each.sum(0).cpu(), "out": each.sum(1).cpu()} for score, each in of_weights.items()}


def _float(checkpoint: Checkpoint, name: str) -> Tensor:
    return torch.from_numpy(checkpoint.tensor(name).astype(np.float32))


def _gradient_file(folder: Path, layer: int) -> Path:
    """Return where the gradient of the inputs of a block is kept, or of the outputs of the last one."""
    return folder / f"{_NAME}-gradient-{layer}.npy"


def _write(path: Path, gradients: Tensor) -> None:
    unfinished = path.with_suffix(".part.npy")
    np.save(unfinished, gradients.numpy())
    unfinished.rename(path)


def _keep(path: Path, found: BlockSensitivity) -> None:
    tensors = {
        f"{module}|{score}|{axis}": found.scores[module][score][axis].contiguous()
        for module in MODULES
        for score in get_args(Score)
        for axis in _AXES
    }
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, metadata={_WEIGHT: repr(found.output_weight)})
    unfinished.rename(path)


def _read(path: Path) -> BlockSensitivity:
    scores: dict[str, dict[Score, dict[Axis, Tensor]]] = {
        module: {score: {} for score in get_args(Score)} for module in MODULES
    }
    with safe_open(path, framework="pt") as file:
        for module, of_module in scores.items():
            for score, by_axis in of_module.items():
                by_axis |= {axis: file.get_tensor(f"{module}|{score}|{axis}") for axis in _AXES}
        return BlockSensitivity(scores, float(file.metadata()[_WEIGHT]))
