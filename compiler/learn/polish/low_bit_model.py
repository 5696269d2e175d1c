"""The low-bit model that polishing moves: see `polish.py`."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.block import MODULES, SITE_MODULES, Angles, read_block, run_block
from planish.compiler.learn.gradient.block_loss import conditioning
from planish.compiler.learn.polish.next_token import Head
from planish.compiler.learn.polish.polished_hooks import PolishedHooks
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.fold import fold_block
from planish.compiler.quantize.arithmetic import dequantize_weight
from planish.compiler.quantize.codes import CodesOnDisk
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Transforms

__all__ = ["LowBitModel"]


class LowBitModel:
    """A flattened model on its grids, all of it in memory, with everything that learns.

    Args:
        checkpoint: the float model.
        scheme: of the model.
        transforms: that `codes` were rounded under.
        codes: of all linears of the blocks.
        device: where the model is; None is the CPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme: Scheme,
        transforms: Transforms,
        codes: CodesOnDisk,
        device: torch.device | None = None,
    ) -> None:
        self._config, self._transforms = checkpoint.config, transforms
        table = torch.from_numpy(checkpoint.tensor("model.embed_tokens.weight").astype(np.float32))
        # As they are stored in the compiled model.
        self._embeddings = table.half().float().to(device)
        self._head = Head.of(checkpoint, device)
        self._layers = []
        for i, layer in enumerate(transforms.layers):
            factors = {site: Factors.of(layer[site], device) for site in SITES}
            folded = fold_block(read_block(checkpoint, i).to(device), factors)
            weights = {
                segment.of(module): dequantize_weight(codes.quantized(segment.of(f"model.layers.{i}.{module}"))).to(
                    device
                )
                for module in MODULES
                for segment in codes.segments(f"model.layers.{i}.{module}")
            }
            self._layers.append(PolishedHooks(folded, factors, scheme.block(i), layer, weights))

    def parameters(self) -> list[Tensor]:
        """Return everything that learns."""
        return [parameter for layer in self._layers for parameter in layer.learned.values()]

    def are_maps(self) -> list[bool]:
        """Return which of the parameters are maps."""
        return [PolishedHooks.is_map(name) for layer in self._layers for name in layer.learned]

    @torch.no_grad()
    def is_invertible(self) -> bool:
        """Return whether all maps are; see `conditioning`."""
        return all(
            conditioning({site: Factors.of(layer[site]) for site in SITE_MODULES}).problem is None
            for layer in self.transforms().layers
        )

    def state(self) -> list[Tensor]:
        """Return a copy of the parameters."""
        return [parameter.detach().clone() for parameter in self.parameters()]

    @torch.no_grad()
    def load(self, state: Sequence[Tensor]) -> None:
        """Take a copy of the parameters back."""
        for parameter, value in zip(self.parameters(), state, strict=True):
            parameter.copy_(value)

    def loss(self, ids: Tensor, final: Tensor) -> Tensor:
        """Return the mean KL divergence per token, in nats, for sequences [batch, seq]."""
        return self._head.divergence(self.outputs(ids), final)

    def outputs(self, ids: Tensor) -> Tensor:
        """Return what the last block puts out for sequences [batch, seq]."""
        x, angles = self._embeddings[ids], Angles.of(self._config, ids.shape[1], ids.device)
        for layer in self._layers:
            # Activations are computed again for the gradient: memory holds those of one block.
            if torch.is_grad_enabled():
                x = recompute(run_block, self._config, layer, x, angles, use_reentrant=False)
            else:
                x = run_block(self._config, layer, x, angles)
        return x

    @torch.no_grad()
    def divergence(self, ids: Tensor, final: Tensor) -> float:
        """Return the mean KL divergence per token, in nats, of sequences taken one by one."""
        losses = [float(self.loss(ids[i : i + 1], final[i : i + 1])) for i in range(len(ids))]
        return sum(losses) / len(losses)

    @torch.no_grad()
    def cross_entropy(self, token_ids: npt.NDArray[np.int64]) -> float:
        """Return the cross entropy of tokens, int64 [sequences, seq], in nats; see `Head.mean_cross_entropy`."""
        ids = torch.from_numpy(token_ids).to(self._embeddings.device)
        outputs = torch.cat([self.outputs(ids[i : i + 1]) for i in range(len(ids))])
        return self._head.mean_cross_entropy(outputs, token_ids)

    def row_scales(self) -> dict[str, Tensor]:
        """Return by module, or segment of it, what multiplies the scales of its rows."""
        return {
            f"model.layers.{i}.{name}": layer.learned[name].detach().exp().cpu()
            for i, layer in enumerate(self._layers)
            for name in layer.weights
        }

    def transforms(self) -> Transforms:
        """Return the transforms with what was learned of scales and clips."""
        layers = tuple(
            layer.polished(before) for layer, before in zip(self._layers, self._transforms.layers, strict=True)
        )
        return dataclasses.replace(self._transforms, layers=layers)
