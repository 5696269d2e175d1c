"""The oracle: a LLaMA decoder in PyTorch that computes in the arithmetic of a scheme, one layer at a time.

It shares no code with the ONNX graph, knows no cache (a sequence is computed whole, through the rounding that a cache
would do), and is written to be read: the compiled model is right where the two agree.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.quantize.arithmetic import (
    QuantizedWeight,
    channels_of,
    dequantize_kv,
    low_bit_linear,
    low_bit_product,
    quantize_activation,
    quantize_kv,
)
from planish.passes.formats import LM_HEAD, format_of
from planish.passes.high_impact import Segment, segments
from planish.passes.scheme import FLOAT_BITS, LinearFormat, Scheme
from planish.passes.transforms import Site, Transform, Transforms

__all__ = ["Batch", "Follow", "Oracle"]

#: module, such as model.layers.3.self_attn.q_proj, or segment of it, as `Segment.of` calls it -> its codes
WeightCodes = Callable[[str], QuantizedWeight]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What every layer needs to know of a batch: cos and sin [batch, seq, head_dim / 2], mask [batch, 1, seq, seq]."""

    cos: Tensor
    sin: Tensor
    mask: Tensor


class Follow(Protocol):
    """Codes of another run of the same model, which the oracle checks against its own and then goes on with.

    A value that lies between two codes may round either way when the floats before it differ in their last bit, and
    one other code early on makes other activations everywhere behind it. Following the other run's roundings, once
    each is shown to be within its rights, compares all the arithmetic and none of the luck.
    """

    def activation(self, site: str, segment: Segment, scaled: Tensor, codes: Tensor) -> Tensor:
        """Return the codes to go on with in a segment of the channels at `site`.

        Args:
            site: such as model.layers.3.attn_in, or lm_head.
            segment: says which channels, and their bits.
            scaled: the oracle's x / scale before rounding, of these channels.
            codes: what it was rounded to.
        """

    def cached(self, name: str, x: Tensor, codes: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes and stored scales to go on with for the keys or values `x` that `name` caches."""


class Oracle:
    """A LlamaForCausalLM in the arithmetic of `scheme`.

    Args:
        checkpoint: gives what stays in floating point; with `transforms`, folded with them.
        scheme: gives the formats.
        codes: gives the codes of quantised linears; not called for a float scheme.
        follow: another run whose roundings to follow.
        transforms: what runs online, the clips, and the high-impact channels.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme: Scheme,
        codes: WeightCodes,
        follow: Follow | None = None,
        transforms: Transforms | None = None,
    ) -> None:
        self.config: LlamaConfig = checkpoint.config
        self._transforms = transforms
        self.scheme = scheme
        self._checkpoint = checkpoint
        self._codes = codes
        self._follow = follow

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

    def batch(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Batch:
        """Return the angles and mask of a batch; `attention_mask`, int [batch, sequence], is 0 at padding."""
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (real.cumsum(1) - 1).clamp_min(0)
        angles = positions[..., None].float() * torch.from_numpy(self.config.inv_freq())
        slots = torch.arange(input_ids.shape[1])
        seen = (slots <= slots[:, None]) & real.bool()[:, None, None, :] | (slots == slots[:, None])
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        return Batch(angles.cos(), angles.sin(), mask)

    def layer(self, i: int, x: Tensor, batch: Batch) -> Tensor:
        """Return the output of decoder block `i` for the output `x` of the block before."""
        name = f"model.layers.{i}"
        h = self._norm(x, f"{name}.input_layernorm")
        x = x + self._attention(i, h, batch)
        h = self._norm(x, f"{name}.post_attention_layernorm")
        gate, up = self._linears(h, f"{name}.ffn_in", [f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"])
        hidden = torch.nn.functional.silu(gate) * up
        (down,) = self._linears(hidden, f"{name}.ffn_out", [f"{name}.mlp.down_proj"])
        return x + down

    def head(self, x: Tensor) -> Tensor:
        """Return the logits of the last layer's output."""
        h = self._norm(x, "model.norm")
        if not self.scheme.lm_head.is_float:
            return self._low_bit(h, LM_HEAD, [LM_HEAD], self.scheme.lm_head)[0]
        table = self._embeddings() if self.config.tie_word_embeddings else self._tensor("lm_head.weight")
        return h @ table.T

    def _attention(self, i: int, h: Tensor, batch: Batch) -> Tensor:
        config, layer = self.config, f"model.layers.{i}"
        modules = [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
        query, key, value = (
            y.reshape(*y.shape[:2], -1, config.head_dim).transpose(1, 2)
            for y in self._linears(h, f"{layer}.attn_in", modules)
        )
        query, key = self._map_keys(i, _rotate(query, batch), _rotate(key, batch))
        keys = self._cached(i, "key", key, self.scheme.key_bits)
        values = self._cached(i, "value", value, self.scheme.value_bits)
        keys, values = (t.repeat_interleave(config.groups, 1) for t in (keys, values))
        scores = query @ keys.transpose(2, 3) * config.head_dim**-0.5 + batch.mask
        attended = scores.softmax(-1) @ values
        (y,) = self._linears(attended.transpose(1, 2).flatten(2), f"{layer}.attn_out", [f"{layer}.self_attn.o_proj"])
        return y

    def _map_keys(self, i: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys times the key map of their head, and queries times the transpose of its inverse."""
        right = None if self._transforms is None else self._transforms.layers[i].key.right
        if right is None:
            return query, key
        per_head = torch.from_numpy(right).expand(self.config.num_key_value_heads, -1, -1)
        inverse = torch.linalg.inv(per_head.double()).mT.float().repeat_interleave(self.config.groups, 0)
        return query @ inverse, key @ per_head

    def _cached(self, i: int, site: Site, x: Tensor, bits: int) -> Tensor:
        """Return keys or values as attention reads them back from the cache."""
        if bits == FLOAT_BITS:
            return x
        clip = 1.0 if self._transforms is None else self._transforms.layers[i].clip(site)
        codes, stored = quantize_kv(x, bits, clip)
        if self._follow:
            codes, stored = self._follow.cached(f"model.layers.{i}.{site}", x, codes, stored)
        return dequantize_kv(codes, stored)

    def _linears(self, x: Tensor, site: str, modules: list[str]) -> list[Tensor]:
        """Return the outputs of the linears that read `x`, which is transformed and quantised once, at `site`."""
        if self._transforms is not None:
            x = Factors.of(_transform_at(self._transforms, site).without_scale()).apply(x)
        if self.scheme.linear.is_float:
            outputs = [x @ self._tensor(f"{module}.weight").T for module in modules]
        else:
            outputs = self._low_bit(x, site, modules, format_of(self.scheme, modules[0]))
        has_bias = self.config.attention_bias if "self_attn" in modules[0] else self.config.mlp_bias
        if has_bias:
            outputs = [y + self._tensor(f"{module}.bias") for y, module in zip(outputs, modules, strict=True)]
        return outputs

    def _low_bit(self, x: Tensor, site: str, modules: list[str], form: LinearFormat) -> list[Tensor]:
        clip, high = 1.0, None
        if self._transforms is not None:
            clip, high = self._transforms.clip(modules[0]), self._transforms.high(modules[0])
        by_segment = [self._segment(x, site, modules, segment) for segment in segments(form, high, clip)]
        return [functools.reduce(torch.add, products) for products in zip(*by_segment, strict=True)]

    def _segment(self, x: Tensor, site: str, modules: list[str], segment: Segment) -> list[Tensor]:
        """Return the products of one segment of the input channels with those of `modules`."""
        x, form = channels_of(x, segment), segment.format
        weights = [self._codes(segment.of(module)) for module in modules]
        if form.weight_only:
            return [low_bit_linear(x, weight, form) for weight in weights]
        codes, scale = quantize_activation(x, form.activation_bits, form.clip)
        if self._follow:
            codes = self._follow.activation(site, segment, x / scale, codes)
        return [low_bit_product(codes, scale, weight, form.activation_bits) for weight in weights]

    def _norm(self, x: Tensor, module: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self._tensor(f"{module}.weight") * (x * scale)

    def _embeddings(self) -> Tensor:
        table = self._tensor("model.embed_tokens.weight")
        return table if self.scheme.linear.is_float else table.half().float()

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self._checkpoint.tensor(name).astype(np.float32))


def _transform_at(transforms: Transforms, site: str) -> Transform:
    """Return the transform at a site spelled model.layers.3.attn_in."""
    *_, layer, name = site.split(".")
    return transforms.layers[int(layer)][cast(Site, name)]


def _rotate(x: Tensor, batch: Batch) -> Tensor:
    """Rotate the halves of each head, [batch, heads, seq, head_dim], by the angles of its position."""
    first, second = x.chunk(2, -1)
    cos, sin = batch.cos[:, None], batch.sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
