"""The float model of a checkpoint, run by transformers: what compiled models are held against."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.optional import require
from planish.compiler.runtime.language_model import UNLIMITED, Limits, check_call

__all__ = ["Reference", "ReferenceCache"]


@dataclasses.dataclass(frozen=True)
class ReferenceCache:
    """The keys and values of the tokens that the model has seen.

    Attributes:
        heads: keys and values of every layer, float32 [batch, kv_heads, tokens, head_dim] each.
        mask: int64 [batch, tokens], 1 for real tokens, 0 for padding.
    """

    heads: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    def take(self, rows: Sequence[int]) -> "ReferenceCache":
        """Return a copy that holds the sequences `rows` of the batch, in this order; any of them several times."""
        picked = torch.tensor(list(rows))
        heads = tuple((keys[picked], values[picked]) for keys, values in self.heads)
        return ReferenceCache(heads, self.mask[picked])


class Reference:
    """A LlamaForCausalLM of transformers, float32 on the CPU; it runs as `Session` does."""

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:
        """Read all weights of `checkpoint` and widen them to float32.

        Args:
            checkpoint: the model.
            threads: threads of PyTorch, in this whole process; None leaves them as they are.

        Raises:
            MissingExtraError: if transformers is not installed.
            NonFiniteWeightError: if a weight holds NaN or infinity.
        """
        transformers = require("transformers")
        if threads is not None:
            torch.set_num_threads(threads)
        self._new_cache, self._vocabulary = transformers.DynamicCache, checkpoint.config.vocab_size
        config = transformers.LlamaConfig.from_dict(checkpoint.raw_config)
        # Without memory, the weights are not filled with random numbers first; and nothing is computed of them.
        with torch.device("meta"):
            self._model = transformers.LlamaForCausalLM(config).eval()
        weights = {name: _float32(checkpoint.tensor(name)) for name in checkpoint.names()}
        self._model.load_state_dict(weights, strict=False, assign=True)
        # What is no weight has no memory yet either: the frequencies of RoPE, and a head that is the embedding.
        self._model.model.rotary_emb = type(self._model.model.rotary_emb)(config)
        self._model.tie_weights()

    @property
    def limits(self) -> Limits:
        """None: PyTorch takes what there is memory for."""
        return UNLIMITED

    @property
    def runs_on(self) -> str:
        """What runs the model, and where."""
        return f"PyTorch {torch.__version__}, cpu"

    @torch.inference_mode()
    def run(
        self,
        input_ids: npt.ArrayLike,
        cache: ReferenceCache | None = None,
        *,
        mask: npt.ArrayLike | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[npt.NDArray[np.float32], ReferenceCache]:
        """Run new tokens behind the cached ones; arguments and results are those of `Session.run`."""
        tokens = np.asarray(input_ids, np.int64)
        given = np.ones_like(tokens) if mask is None else np.asarray(mask, np.int64)
        check_call(tokens, len(cache.mask) if cache else None, given, logits_to_keep, self._vocabulary)
        ids, real = torch.from_numpy(tokens), torch.from_numpy(given)
        seen = real if cache is None else torch.cat([cache.mask, real], dim=1)
        past = self._new_cache()
        for layer, (keys, values) in enumerate(cache.heads if cache else ()):
            past.update(keys, values, layer)
        done: Any = self._model(
            ids,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :],
            past_key_values=past,
            logits_to_keep=logits_to_keep,
        )
        heads = tuple((layer.keys, layer.values) for layer in done.past_key_values.layers)
        return done.logits.numpy(), ReferenceCache(heads, seen)


def _float32(weights: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(weights, dtype=np.float32))
