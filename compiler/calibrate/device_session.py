"""A float checkpoint run by PyTorch on a GPU, token behind token: what writes calibration text there."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.block import Angles, Block, FloatHooks, read_block, run_block

__all__ = ["DeviceCache", "DeviceSession"]


@dataclasses.dataclass
class DeviceCache:
    """Keys and values of every block, float32 [batch, kv_heads, tokens, head_dim] each."""

    heads: list[tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        """Return the number of cached tokens."""
        return self.heads[0][0].shape[2]


class DeviceSession:
    """The model on a device, its weights in the type in which they are stored; it runs as `Session` does.

    A block is widened to float32 while it runs, so that the sums are those of the float export.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Bring the weights of `checkpoint` to `device`."""
        self._config, self._device = checkpoint.config, device
        self._blocks = []
        for layer in range(self._config.num_hidden_layers):
            tensors = read_block(checkpoint, layer).tensors
            prefix = f"model.layers.{layer}."
            self._blocks.append({name: self._narrow(checkpoint, prefix + name, t) for name, t in tensors.items()})
        self._table, self._gain = (self._read(checkpoint, f"model.{part}.weight") for part in ("embed_tokens", "norm"))
        self._head = self._table if self._config.tie_word_embeddings else self._read(checkpoint, "lm_head.weight")

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of cache that one token takes in one sequence."""
        return 2 * 4 * self._config.kv_size * self._config.num_hidden_layers

    @torch.no_grad()
    def run(
        self, input_ids: npt.ArrayLike, cache: DeviceCache | None = None, *, logits_to_keep: int = 0
    ) -> tuple[npt.NDArray[np.float32], DeviceCache]:
        """Run new tokens behind the cached ones.

        Args:
            input_ids: int64 [batch, sequence], the new tokens; a single one where there is a cache.
            cache: what the call before returned; None starts anew.
            logits_to_keep: how many of the last positions get logits; 0 is all of them.

        Returns:
            Logits, float32 [batch, kept, vocab], and the cache extended by the new tokens.
        """
        ids = torch.from_numpy(np.asarray(input_ids, np.int64)).to(self._device)
        done = 0 if cache is None else len(cache)
        all_angles = Angles.of(self._config, done + ids.shape[1], self._device)
        angles = Angles(all_angles.cos[done:], all_angles.sin[done:])
        x, heads = self._table[ids].float(), []
        for layer, stored in enumerate(self._blocks):
            block = Block(self._config, {name: tensor.float() for name, tensor in stored.items()})
            hooks = _CachedHooks(block, None if cache is None else cache.heads[layer])
            x = run_block(self._config, hooks, x, angles)
            heads.append(hooks.extended)
        x = x[:, -logits_to_keep:]
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self._config.rms_norm_eps)
        logits = self._gain.float() * (x * scale) @ self._head.float().T
        return logits.cpu().numpy(), DeviceCache(heads)

    def _read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        tensor: Any = checkpoint.tensor(name)
        return self._narrow(checkpoint, name, torch.from_numpy(tensor.astype(np.float32)))

    def _narrow(self, checkpoint: Checkpoint, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, getattr(torch, checkpoint.dtype(name).name))


class _CachedHooks(FloatHooks):
    """The float block, whose attention reads cached keys and values before the new ones."""

    extended: tuple[Tensor, Tensor]

    def __init__(self, block: Block, cached: tuple[Tensor, Tensor] | None) -> None:
        super().__init__(block)
        self._cached = cached

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, and the keys and values of all tokens."""
        if self._cached is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(self._cached, (key, value), strict=True))
        self.extended = key, value
        return query, key, value
