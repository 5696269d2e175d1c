"""Read a portable model into what the CUDA kernels take: weights in kernel layout, factors, clips, maps, on a GPU.

The graph is the one source of all of it: what runs is what the portable model says, whatever plan it came from.
"""

import dataclasses
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from planish.compiler.errors import UnsupportedModelError
from planish.passes.blocks import initializer_of
from planish.passes.formats import LM_HEAD
from planish.passes.high_impact import SUFFIXES
from planish.passes.online import factors_of
from planish.plugins.byte_linear import ByteWeight
from planish.plugins.kernel_layout import KERNEL_BITS, TILE_ROWS, gated_rows, pack_for_kernel
from planish.plugins.linear_ops import DeviceWeight
from planish.plugins.ops import append_kv, matmul
from planish.plugins.packing import PACKED_BITS
from planish.plugins.token_ops import TokenSegment

__all__ = ["Head", "KeyMaps", "LayerWeights", "LinearWeights", "Prologue", "Weights", "read_weights"]

_PRODUCTS = {matmul(bits).name: bits for bits in PACKED_BITS}
_APPENDS = {append_kv(bits).name: bits for bits in PACKED_BITS}
#: The bits of high-impact weights that the kernels of two segments take.
_HIGH_BITS = 4

#: Maps of keys and of queries behind RoPE, float32 [1 or kv_heads, head_dim, head_dim] each.
KeyMaps = tuple[Tensor, Tensor]


class Prologue(TypedDict, total=False):
    """What `quantize_tokens` does in front of the codes; its arguments of these names."""

    gain: Tensor
    epsilon: float
    right: Tensor
    left: Tensor
    permutation: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class LinearWeights:
    """A linear from its float input on.

    Attributes:
        prologue: norm, transform and order of the channels in front of the codes.
        segments: one, or the high-impact channels and the others.
        low: weights of the last segment.
        high: weights of the first one where there are two.
        gated: whether it is gate and up, and gives silu(gate) * up.
    """

    prologue: Prologue
    segments: tuple[TokenSegment, ...]
    low: DeviceWeight
    high: DeviceWeight | None
    gated: bool


@dataclasses.dataclass(frozen=True, eq=False)
class LayerWeights:
    """One decoder block.

    Attributes:
        qkv: queries, keys and values, one behind the other.
        o: what attention gives, back to the residual stream.
        gate_up: the gated half of the FFN.
        down: the other one.
        maps: of keys and queries; None is none.
        bits: of cached keys and values.
        clips: share of the range that the grids of keys and of values span.
    """

    qkv: LinearWeights
    o: LinearWeights
    gate_up: LinearWeights
    down: LinearWeights
    maps: KeyMaps | None
    bits: tuple[int, int]
    clips: tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """The last norm and `lm_head`: its prologue, the one segment of its tokens, and its weights."""

    prologue: Prologue
    segment: TokenSegment
    weight: ByteWeight


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """All that a decoder reads.

    Attributes:
        embedding: float16 [vocab, hidden].
        layers: the blocks.
        head: behind them.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    head: Head


def read_weights(model: Path, layers: int, device: torch.device) -> Weights:
    """Read a portable model of so many layers; memory of the host holds one weight at a time.

    Raises:
        UnsupportedModelError: if something in it has no kernel; the message names it.
        NativeBuildError: if the packer cannot be compiled.
    """
    reader = _Reader(model, device)
    return Weights(reader.embedding(), tuple(reader.layer(i) for i in range(layers)), reader.head())


class _Reader:
    def __init__(self, model: Path, device: torch.device) -> None:
        graph = ir.load(model).graph
        self._nodes = {str(node.name): node for node in graph}
        self._initializers = graph.initializers
        self._device = device

    def embedding(self) -> Tensor:
        table = self._initializers["model.embed_tokens.weight"].const_value
        assert table is not None
        return self._put(table.numpy())

    def layer(self, i: int) -> LayerWeights:
        name = f"model.layers.{i}"
        for bias in ("q_proj", "o_proj", "gate_proj", "down_proj"):
            part = "self_attn" if bias in ("q_proj", "o_proj") else "mlp"
            if f"{name}.{part}.{bias}.bias" in self._initializers:
                raise UnsupportedModelError(f"{name}.{part}.{bias} has a bias, and the kernels of linears add none.")
        attention = f"{name}.self_attn"
        appends = [self._append(f"{attention}.{role}.append") for role in ("key", "value")]
        return LayerWeights(
            qkv=self._linear(f"{attention}.qkv_proj", norm=f"{name}.input_layernorm"),
            o=self._linear(f"{attention}.o_proj"),
            gate_up=self._linear(f"{name}.mlp.gate_up_proj", norm=f"{name}.post_attention_layernorm", gated=True),
            down=self._linear(f"{name}.mlp.down_proj"),
            maps=self._maps(attention),
            bits=(appends[0][0], appends[1][0]),
            clips=(appends[0][1], appends[1][1]),
        )

    def head(self) -> Head:
        product = self._product(LM_HEAD)
        if _PRODUCTS[product.op_type] != 8:
            raise UnsupportedModelError(
                f"lm_head has weights of {_PRODUCTS[product.op_type]} bits, and the decoder multiplies it with 8. "
                "Compile with --lm-head w8a8."
            )
        bits, clip = _grid(product)
        weight = ByteWeight.of(_array(product, 2), _row_scales(product), self._device)
        return Head(self._norm("model.norm"), weight.segment(bits, clip), weight)

    def _append(self, name: str) -> tuple[int, float]:
        """Return bits and clip of what a node appends to the cache."""
        if name not in self._nodes:
            raise UnsupportedModelError(
                "The cache stays in floating point, and the kernels read a packed one. Compile with a scheme that "
                "gives keys and values bits, such as w3a3k3v3."
            )
        node = self._nodes[name]
        return _APPENDS[node.op_type], node.attributes.get_float("clip", 1.0)

    def _maps(self, attention: str) -> KeyMaps | None:
        key, query = (self._nodes.get(f"{attention}.{part}_map") for part in ("key", "query"))
        if key is None or query is None:
            return None
        of_keys, of_queries = (each.reshape(-1, *each.shape[-2:]) for each in (_array(key, 1), _array(query, 1)))
        # The graph has one for each query head; those of a group are the same.
        return self._put(of_keys), self._put(of_queries[:: len(of_queries) // len(of_keys)])

    def _linear(self, name: str, norm: str | None = None, gated: bool = False) -> LinearWeights:
        products = [self._product(name + suffix) for suffix in SUFFIXES if f"{name}{suffix}.product" in self._nodes]
        if not products:
            raise UnsupportedModelError(f"{name} stays in floating point, and the decoder multiplies low bits alone.")
        high_bits = _PRODUCTS[products[0].op_type]
        if len(products) == 2 and high_bits != _HIGH_BITS:
            raise UnsupportedModelError(
                f"{name} has high-impact channels of {high_bits} bits, and kernels take them with {_HIGH_BITS}. "
                f"Compile with --hic-bits {_HIGH_BITS}."
            )
        weights = [self._weight(product, gated) for product in products]
        grids = [_grid(product) for product in products]
        segments = [
            TokenSegment(w.channels, bits, w.bits, clip) for w, (bits, clip) in zip(weights, grids, strict=True)
        ]
        prologue = self._norm(norm) if norm else Prologue()
        prologue |= self._in_front(products)
        return LinearWeights(prologue, tuple(segments), weights[-1], weights[0] if len(weights) == 2 else None, gated)

    def _in_front(self, products: list[ir.Node]) -> Prologue:
        """Return the order of the channels and the online transform in front of the codes."""
        found = Prologue()
        x = _input(_input(products[0]).producer())
        if len(products) == 2:
            takers = [_input(_input(product).producer()).producer() for product in products]
            if all(taker is not None and taker.op_type == "Gather" for taker in takers):
                order = np.concatenate([_array(taker, 1) for taker in takers])
                found["permutation"] = self._put(order.astype(np.int32))
            x = _input(takers[0])
        maker = x.producer()
        if maker is not None and maker.op_type.startswith("PlanishTransform"):
            width = sum(product.attributes.get_int("k", 0) for product in products)
            transform = factors_of(maker, width)
            if transform.right is not None:
                right = transform.right
                found["right"] = self._put(right[0] if len(right) == 1 else right)
            if transform.left is not None:
                found["left"] = self._put(transform.left)
        return found

    def _weight(self, product: ir.Node, gated: bool) -> DeviceWeight:
        bits, channels = _PRODUCTS[product.op_type], product.attributes.get_int("k", 0)
        codes, scales = _array(product, 2), _row_scales(product)
        if bits not in KERNEL_BITS:
            raise UnsupportedModelError(
                f"{product.name} has weights of {bits} bits; {', '.join(map(str, KERNEL_BITS))} have a kernel."
            )
        if gated:
            if len(codes) % TILE_ROWS:
                raise UnsupportedModelError(
                    f"{product.name} has {len(codes)} rows of gate and up, and the kernel takes them in sixteens."
                )
            order = gated_rows(len(codes))
            codes, scales = codes[order], scales[order]
        return DeviceWeight.of(pack_for_kernel(codes, channels, bits), scales, self._device)

    def _norm(self, name: str) -> Prologue:
        node = self._nodes[name]
        return Prologue(gain=self._put(_array(node, 1)), epsilon=node.attributes.get_float("epsilon", 0.0))

    def _product(self, name: str) -> ir.Node:
        node = self._nodes.get(f"{name}.product")
        if node is None or node.op_type not in _PRODUCTS:
            remedy = "--lm-head w8a8" if name == LM_HEAD else "a scheme that gives weights and activations bits"
            raise UnsupportedModelError(
                f"The activations in front of {name} stay in floating point, and the decoder multiplies codes. Compile "
                f"with {remedy}."
            )
        return node

    def _put(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self._device)


def _grid(product: ir.Node) -> tuple[int, float]:
    """Return bits and clip of the activations of a product."""
    quantize = _input(product).producer()
    assert quantize is not None
    return quantize.attributes.get_int("bits", 0), quantize.attributes.get_float("clip", 1.0)


def _row_scales(product: ir.Node) -> npt.NDArray[np.float32]:
    scales = _array(product, 3)
    if len(scales) != 1:
        raise UnsupportedModelError(
            f"{product.name} has {len(scales)} scales to a row of weights, and kernels take one. Compile with a scheme "
            "without groups."
        )
    return np.asarray(scales[0], np.float32)


def _array(node: ir.Node | None, i: int) -> npt.NDArray[Any]:
    assert node is not None
    tensor = initializer_of(node, i).const_value
    assert tensor is not None
    return tensor.numpy()


def _input(node: ir.Node | None) -> ir.Value:
    assert node is not None
    assert node.inputs[0] is not None
    return node.inputs[0]
