"""The oracle: a LLaMA decoder in PyTorch that computes in the arithmetic of a scheme, one layer at a time.

It shares no code with the ONNX graph; the compiled model is right where the two agree.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from planish.compiler.arithmetic import (
    QuantizedWeight,
    dequantize_kv,
    low_bit_linear,
    quantize_kv,
)
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.config import LlamaConfig
from planish.passes.scheme import LinearFormat, Scheme

__all__ = ["Batch", "Oracle", "OracleCache"]

#: module name, such as model.layers.3.self_attn.q_proj -> its codes
WeightCodes = Callable[[str], QuantizedWeight]
#: Per layer the (codes, scales) of keys and of values, or the floats themselves where the cache is not quantised.
OracleCache = list[tuple[Tensor, Tensor | None, Tensor, Tensor | None]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What every layer needs to know of a batch: cos and sin [batch, seq, head_dim / 2], mask [batch, 1, seq, total]."""

    cos: Tensor
    sin: Tensor
    mask: Tensor


class Oracle:
    """A LlamaForCausalLM in the arithmetic of `scheme`.

    Args:
        checkpoint: gives what stays in floating point.
        scheme: gives the formats.
        codes: gives the codes of quantised linears; not called for a float scheme.
    """

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme, codes: WeightCodes) -> None:
        self.config: LlamaConfig = checkpoint.config
        self.scheme = scheme
        self._checkpoint = checkpoint
        self._codes = codes

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits, float32 [batch, sequence, vocab], of int64 `input_ids` [batch, sequence]."""
        *_, hidden = self.hidden_states(input_ids, attention_mask)
        return self.head(hidden)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the input of layer 0, then the output of every layer, float32 [batch, sequence, hidden]."""
        batch = self.batch(input_ids, attention_mask)
        x = self.embed(input_ids)
        yield x
        for i in range(self.config.num_hidden_layers):
            x = self.layer(i, x, batch)
            yield x

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of `input_ids`, float32 [batch, sequence, hidden]."""
        return self._embeddings()[input_ids]

    def batch(self, input_ids: Tensor, attention_mask: Tensor | None = None, past: int = 0) -> Batch:
        """Return the angles and mask of a batch whose cache holds `past` tokens; mask is int [batch, past + seq]."""
        rows, sequence = input_ids.shape
        real = torch.ones(rows, past + sequence) if attention_mask is None else attention_mask
        positions = (real.long().cumsum(1) - 1).clamp_min(0)[:, past:]
        angles = positions[..., None].float() * torch.from_numpy(self.config.inv_freq())
        slots = torch.arange(past + sequence)
        seen = (slots <= slots[past:, None]) & real.bool()[:, None, None, :] | (slots == slots[past:, None])
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        return Batch(angles.cos(), angles.sin(), mask)

    def layer(self, i: int, x: Tensor, batch: Batch, cache: OracleCache | None = None) -> Tensor:
        """Return the output of decoder block `i`; `cache`, if given, is read and then extended."""
        name = f"model.layers.{i}"
        h = self._norm(x, f"{name}.input_layernorm")
        x = x + self._attention(i, h, batch, cache)
        h = self._norm(x, f"{name}.post_attention_layernorm")
        gate, up = (self._linear(h, f"{name}.mlp.{part}_proj", self.config.mlp_bias) for part in ("gate", "up"))
        hidden = torch.nn.functional.silu(gate) * up
        return x + self._linear(hidden, f"{name}.mlp.down_proj", self.config.mlp_bias)

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of the last layer's output."""
        h = self._norm(x, "model.norm")
        if not self.scheme.lm_head.is_float:
            return low_bit_linear(h, self._codes("lm_head"), self.scheme.lm_head)
        table = self._embeddings() if self.config.tie_word_embeddings else self._tensor("lm_head.weight")
        return h @ table.T

    def _attention(self, i: int, h: Tensor, batch: Batch, cache: OracleCache | None) -> Tensor:
        config, name = self.config, f"model.layers.{i}.self_attn"
        query, key, value = (
            self._linear(h, f"{name}.{part}_proj", config.attention_bias).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            for part in "qkv"
        )
        key, key_scale = self._store(_rotate(key, batch), self.scheme.key_bits)
        value, value_scale = self._store(value, self.scheme.value_bits)
        if cache is not None:
            if i < len(cache):
                past = cache[i]
                key, value = torch.cat([past[0], key], 2), torch.cat([past[2], value], 2)
                if key_scale is not None and value_scale is not None:
                    assert past[1] is not None and past[3] is not None
                    key_scale, value_scale = torch.cat([past[1], key_scale], 2), torch.cat([past[3], value_scale], 2)
            cache[i : i + 1] = [(key, key_scale, value, value_scale)]
        keys = key if key_scale is None else dequantize_kv(key, key_scale)
        values = value if value_scale is None else dequantize_kv(value, value_scale)
        keys, values = (t.repeat_interleave(config.groups, 1) for t in (keys, values))
        scores = _rotate(query, batch) @ keys.transpose(2, 3) * config.head_dim**-0.5 + batch.mask
        attended = scores.softmax(-1) @ values
        return self._linear(attended.transpose(1, 2).flatten(2), f"{name}.o_proj", config.attention_bias)

    @staticmethod
    def _store(x: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
        return (x, None) if bits == 16 else quantize_kv(x, bits)

    def _linear(self, x: Tensor, module: str, bias: bool) -> Tensor:
        form: LinearFormat = self.scheme.linear
        if form.is_float:
            y = x @ self._tensor(f"{module}.weight").T
        else:
            y = low_bit_linear(x, self._codes(module), form)
        return y + self._tensor(f"{module}.bias") if bias else y

    def _norm(self, x: Tensor, module: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self._tensor(f"{module}.weight") * (x * scale)

    def _embeddings(self) -> Tensor:
        table = self._tensor("model.embed_tokens.weight")
        return table if self.scheme.linear.is_float else table.half().float()

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self._checkpoint.tensor(name).astype(np.float32))


def _rotate(x: Tensor, batch: Batch) -> Tensor:
    """Rotate the halves of each head, [batch, heads, seq, head_dim], by the angles of its position."""
    first, second = x.chunk(2, -1)
    cos, sin = batch.cos[:, None], batch.sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
