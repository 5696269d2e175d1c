"""Run a model with plugin nodes without TensorRT: numpy does what the plugins do, by the texts of the planish ops."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from planish.plugins.kernel_layout import KernelWeight, padded_channels, unpack_from_kernel
from planish.plugins.ops import DOMAIN
from planish.plugins.packing import pack, unpack
from planish.plugins.tensorrt.contract import Contract
from planish.plugins.tensorrt.plugins import KV_APPEND, KV_ATTEND, LINEAR, PLUGINS, QUANTIZE_TOKENS
from tests.plugin_host import Host

__all__ = ["PluginModel", "hosted_plugins", "plugin_evaluator"]

Array = npt.NDArray[Any]


class _Plugin(OpRun):
    """A node: inputs by their names in the contract, types and shapes checked by it."""

    op_domain = DOMAIN
    contract: Contract

    def _run(self, *arrays: Array, plugin_namespace: str, plugin_version: str, **values: Any) -> tuple[Array, ...]:
        assert (plugin_namespace, plugin_version) == (DOMAIN, self.contract.version)
        assert self.contract.problem(values) is None
        assert values.keys() == {each.name for each in self.contract.attributes}
        expected = self.contract.outputs_of(values, [(str(array.dtype), array.shape) for array in arrays])
        names = [tensor.name for tensor in self.contract.given_inputs(values)]
        outputs = self.outputs_of(values, dict(zip(names, arrays, strict=True)))
        assert [(str(each.dtype), each.shape) for each in outputs] == expected
        return outputs

    def outputs_of(self, values: dict[str, Any], inputs: dict[str, Array]) -> tuple[Array, ...]:
        return self.compute(**inputs)

    def compute(self, **inputs: Array) -> tuple[Array, ...]:
        raise NotImplementedError


def hosted_plugins(host: Host) -> list[type[OpRun]]:
    """Return plugins that the library of `host` computes, its kernels emulated, and not numpy."""

    def outputs_of(self: _Plugin, values: dict[str, Any], inputs: dict[str, Array]) -> tuple[Array, ...]:
        plugin = host.create(self.contract, values)
        assert plugin is not None, host.said()
        made = plugin.run([np.ascontiguousarray(each) for each in inputs.values()], aliased=False)
        plugin.delete()
        assert made is not None, host.said()
        return tuple(made)

    return [type(contract.name, (_Plugin,), {"contract": contract, "outputs_of": outputs_of}) for contract in PLUGINS]


def _stored_places(count: int) -> npt.NDArray[np.int64]:
    """Return where the codes of `count` channels lie: within every eight, the even ones first."""
    i = np.arange(count)
    return i // 8 * 8 + i % 2 * 4 + i % 8 // 2


class PlanishQuantizeTokens(_Plugin):
    contract = QUANTIZE_TOKENS

    def compute(
        self,
        x: Array,
        residual: Array | None = None,
        gain: Array | None = None,
        right: Array | None = None,
        left: Array | None = None,
        permutation: Array | None = None,
    ) -> tuple[Array, ...]:
        total = x if residual is None else x + residual
        normal = total.astype(np.float32)
        if gain is not None:
            normal = normal / np.sqrt((normal**2).mean(-1, keepdims=True) + np.float32(self.epsilon)) * gain
        grid = normal.reshape(*x.shape[:-1], self.m, self.k)
        if right is not None:
            grid = np.einsum("...ij,ijk->...ik", grid, np.broadcast_to(right, (self.m, self.k, self.k)))
        if left is not None:
            grid = np.einsum("ij,...ik->...jk", left, grid)
        row = grid.reshape(x.shape)
        row = row if permutation is None else row[..., permutation]
        rest = (self.channels, padded_channels(self.channels, self.bits), self.activation_bits, self.clip)
        high = (self.high_channels, self.high_channels, self.high_activation_bits, self.high_clip)
        parts, scales, sums, first = [], [], [], 0
        for channels, padded, bits, clip in [high, rest] if self.high_channels else [rest]:
            part, zero = row[..., first : first + channels], 1 << bits - 1
            factor = np.float32(clip) / np.float32(zero - 1)
            scale = np.maximum(np.abs(part).max(-1, keepdims=True) * factor, np.float32(1e-10))
            codes = np.full((*x.shape[:-1], padded), zero, np.uint8)
            codes[..., _stored_places(channels)] = np.clip(np.rint(part / scale), -zero, zero - 1) + zero
            parts.append(codes)
            scales.append(scale)
            sums.append(np.stack([np.full(x.shape[:-1], zero), codes.sum(-1, dtype=np.int64)], -1))
            first += channels
        words = np.ascontiguousarray(np.concatenate(parts, -1)).view(np.int32)
        made = words, np.concatenate(scales, -1).astype(np.float32), np.stack(sums, -2).astype(np.int32)
        return made if residual is None else (*made, total)


class PlanishLinear(_Plugin):
    contract = LINEAR

    def compute(self, codes: Array, scales: Array, zero_sums: Array, **weights: Array) -> tuple[Array, ...]:
        stored = np.ascontiguousarray(codes).view(np.uint8)
        segments = [("", self.channels, self.bits)]
        if self.high_channels:
            segments.insert(0, ("high_", self.high_channels, 4))
        y, first = np.zeros((*codes.shape[:-1], self.rows), np.float32), 0
        for i, (prefix, channels, bits) in enumerate(segments):
            words, sums = weights[f"{prefix}words"].view(np.uint32), weights[f"{prefix}row_sums"]
            weight = unpack_from_kernel(KernelWeight(words, sums, self.rows, channels, bits))
            tokens = stored[..., first + _stored_places(channels)].astype(np.int64) - zero_sums[..., i, :1]
            products = tokens @ (weight.astype(np.int64) - (1 << bits - 1)).T
            y += products.astype(np.float32) * weights[f"{prefix}weight_scales"] * scales[..., i : i + 1]
            first += channels
        if self.gated:
            gate, up = np.moveaxis(y.reshape(*y.shape[:-1], -1, 2, 8), -2, 0)
            y = (gate / (1 + np.exp(-gate)) * up).reshape(*y.shape[:-1], -1)
        return (y,)


class _Cache(_Plugin):
    def rows(self, words: Array, grids: Array, bits: int) -> Array:
        """Return the float32 rows of packed ones."""
        codes = unpack(np.ascontiguousarray(words).view(np.uint8), bits, self.head_dim).astype(np.float32)
        return codes * grids[..., :1].astype(np.float32) + grids[..., 1:].astype(np.float32)


class PlanishKvAppend(_Cache):
    contract = KV_APPEND

    def compute(
        self, key: Array, value: Array, past_lengths: Array, new_lengths: Array, **cache: Array
    ) -> tuple[Array, ...]:
        made = {name: array.copy() for name, array in cache.items()}
        for side, new, bits, clip in (
            ("key", key, self.key_bits, self.key_clip), ("value", value, self.value_bits, self.value_clip)
        ):  # fmt: skip
            x = new.reshape(*new.shape[:2], self.kv_heads, self.head_dim).astype(np.float32)
            levels = np.float32(2**bits - 1) / np.float32(clip)
            span = x.max(-1, keepdims=True) - x.min(-1, keepdims=True)
            scale = np.maximum(span / levels, np.float32(2**-14)).astype(np.float16)
            zero = (x.min(-1, keepdims=True) + span * ((1 - np.float32(clip)) / np.float32(2))).astype(np.float16)
            steps = (x - zero.astype(np.float32)) / scale.astype(np.float32)
            codes = np.clip(np.rint(steps), 0, 2**bits - 1).astype(np.uint8)
            words = np.ascontiguousarray(pack(codes, bits)).view(np.int32)
            for b, (past, count) in enumerate(zip(past_lengths, new_lengths, strict=True)):
                slots = slice(past, past + count)
                made[f"{side}_cache"][b, :, slots] = words[b, :count].swapaxes(0, 1)
                grids = np.concatenate([scale, zero], -1)
                made[f"{side}_grids"][b, :, slots] = grids[b, :count].swapaxes(0, 1)
        return tuple(made[name] for name in ("key_cache", "key_grids", "value_cache", "value_grids"))


class PlanishKvAttend(_Cache):
    contract = KV_ATTEND

    def compute(self, query: Array, past_lengths: Array, new_lengths: Array, **cache: Array) -> tuple[Array, ...]:
        keys = self.rows(cache["key_cache"], cache["key_grids"], self.key_bits)
        values = self.rows(cache["value_cache"], cache["value_grids"], self.value_bits)
        group, y = self.heads // self.kv_heads, np.full_like(query, np.nan)
        for b, (past, count) in enumerate(zip(past_lengths, new_lengths, strict=True)):
            for i in range(count):
                q = query[b, i].reshape(self.heads, self.head_dim)
                seen = slice(past + i + 1)
                k, v = (np.repeat(each[b, :, seen], group, 0) for each in (keys, values))
                scores = np.einsum("hd,htd->ht", q, k) / np.sqrt(self.head_dim)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                y[b, i] = np.einsum("ht,htd->hd", weights, v).reshape(-1)
            # Padding goes on through the model: any number will do that is one.
            y[b, count:] = 0
        return (y.astype(query.dtype),)


def plugin_evaluator(model: onnx.ModelProto, plugins: list[type[OpRun]] | None = None) -> ReferenceEvaluator:
    """Return what runs a model with plugin nodes, computed by `plugins`; None is numpy."""
    ops = [PlanishQuantizeTokens, PlanishLinear, PlanishKvAppend, PlanishKvAttend]
    assert [op.contract for op in ops] == list(PLUGINS)
    return ReferenceEvaluator(model, new_ops=plugins or ops)


class PluginModel:
    """A model with plugin nodes for the cache, its caches kept between calls.

    Args:
        path: the model.
        batch: sequences.
        plugins: what computes them; None is numpy.
    """

    def __init__(self, path: Path, batch: int, plugins: list[type[OpRun]] | None = None) -> None:
        graph = ir.load(path).graph
        inputs = {str(value.name): value for value in graph.inputs}
        self._evaluator = plugin_evaluator(onnx.load(path), plugins)
        self._outputs = [str(value.name) for value in graph.outputs]
        self.lengths = np.zeros(batch, np.int32)
        # What the empty cache holds must not matter.
        self.caches: dict[str, Array] = {
            name: np.full([batch, *value.shape[1:]], -1, value.dtype.numpy())  # type: ignore[index, union-attr]
            for name, value in inputs.items()
            if name.startswith("past_key_values.")
        }

    def __call__(self, ids: Array, counts: Array) -> Array:
        """Return the logits of `ids` [batch, tokens], of which sequence b has `counts`[b], the rest being padding."""
        feeds = {
            "input_ids": ids,
            "past_lengths": self.lengths,
            "new_lengths": counts.astype(np.int32),
            "position_ids": self.lengths[:, None] + np.arange(ids.shape[1]),
            "num_logits_to_keep": np.array(0),
            **self.caches,
        }
        made = dict(zip(self._outputs, self._evaluator.run(self._outputs, feeds), strict=True))
        logits: Array = made.pop("logits")
        self.caches = {name.replace("present.", "past_key_values."): value for name, value in made.items()}
        self.lengths = self.lengths + counts.astype(np.int32)
        return logits
