"""Say what is in a bundle, from what is truly stored in it."""

import dataclasses
import re
from collections.abc import Iterator
from math import prod
from typing import Any

import onnx

from planish.compiler.bundle.bundle import Bundle
from planish.passes.transforms import Site, site_of

__all__ = ["Inspection", "inspect", "stored_bits"]

#: Node metadata key under which the passes list the checkpoint modules that a product computes.
_MODULES = "planish.modules"
_LM_HEAD = "lm_head"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")

#: Bits of an element of the ONNX types that a bundle stores.
_BITS: dict[int, int] = {
    onnx.TensorProto.FLOAT: 32,
    onnx.TensorProto.FLOAT16: 16,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.INT32: 32,
    onnx.TensorProto.INT64: 64,
}


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a bundle holds.

    Attributes:
        model: the name of the model.
        scheme: the scheme.
        lm_head: the format of the output projection.
        layers: decoder blocks.
        linears: linears of the decoder blocks that are quantised.
        skipped: linears of the decoder blocks that are stored in floating point.
        average_bits: stored bits per weight over all linears of the decoder blocks, scales counted, and the numbers of
            the channels where they are ordered by their impact.
        lm_head_bits: stored bits per weight of the output projection, scales counted.
        kv_bytes_per_token: bytes of cache that one token takes, scales and zeros counted.
        kv_saving: how many times smaller that is than a float16 cache.
        max_context: the longest context, in tokens.
        targets: what the bundle was compiled for.
        sizes: what the files take, in bytes: the portable model, each target, and all together.
    """

    model: str
    scheme: str
    lm_head: str
    layers: int
    linears: int
    skipped: int
    average_bits: float
    lm_head_bits: float
    kv_bytes_per_token: int
    kv_saving: float
    max_context: int
    targets: list[str]
    sizes: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Product:
    """One linear product of the graph, or what takes the channels for one: its modules, its weights, and their bits."""

    modules: tuple[str, ...]
    weights: int
    bits: int
    is_float: bool


def inspect(bundle: Bundle) -> Inspection:
    """Read the portable model of `bundle`, its weights excepted, and count.

    Example:
        >>> inspect(bundle).average_bits < 5
        True
    """
    model = onnx.load(bundle.model_path("portable"), load_external_data=False)
    products = list(_products(model.graph))
    blocks = [product for product in products if product.modules != (_LM_HEAD,)]
    heads = [product for product in products if product.modules == (_LM_HEAD,)]
    config = bundle.config
    kv_bytes = sum(_cache_bytes(value) for value in model.graph.input if value.name.startswith("past_key_values."))
    half = 2 * 2 * config.num_hidden_layers * config.kv_size
    manifest = bundle.manifest
    return Inspection(
        model=manifest.model,
        scheme=manifest.scheme,
        lm_head=manifest.lm_head,
        layers=config.num_hidden_layers,
        linears=len({module for product in blocks if not product.is_float for module in product.modules}),
        skipped=len({module for product in blocks if product.is_float for module in product.modules}),
        average_bits=_average_bits(blocks),
        lm_head_bits=_average_bits(heads),
        kv_bytes_per_token=kv_bytes,
        kv_saving=half / kv_bytes,
        max_context=manifest.max_context,
        targets=list(manifest.targets),
        sizes=_sizes(bundle),
    )


def stored_bits(bundle: Bundle) -> dict[tuple[int, Site], int]:
    """Return by decoder block and site how many bits the linears there take: codes, scales, and orders of channels."""
    found: dict[tuple[int, Site], int] = {}
    for product in _products(onnx.load(bundle.model_path("portable"), load_external_data=False).graph):
        layer, site = _LAYER.match(product.modules[0]), site_of(product.modules[0])
        if layer is not None and site is not None:
            place = int(layer[1]), site
            found[place] = found.get(place, 0) + product.bits
    return found


def _products(graph: onnx.GraphProto) -> Iterator[_Product]:
    stored = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        modules = {entry.key: entry.value for entry in node.metadata_props}.get(_MODULES)
        if modules:
            # The codes and scales of the modules that share one product lie in one tensor each; a linear with
            # high-impact channels is two products, each behind a Gather of its channels.
            tensors = [stored[name] for name in node.input if name in stored]
            yield _describe(tuple(modules.split(",")), node, tensors)
        elif node.op_type == "MatMul" and (weight := _float_weight(node.input[1], stored, producers)):
            module = _LM_HEAD if node.name == "logits" else weight.name.removesuffix(".weight")
            yield _describe((module,), node, [weight])


def _describe(modules: tuple[str, ...], node: onnx.NodeProto, tensors: list[onnx.TensorProto]) -> _Product:
    bits = sum(prod(tensor.dims) * _BITS[tensor.data_type] for tensor in tensors)
    if node.op_type == "Gather":
        return _Product(modules, 0, bits, is_float=False)
    if not node.domain:
        return _Product(modules, prod(tensors[0].dims), bits, is_float=True)
    (k,) = (attribute.i for attribute in node.attribute if attribute.name == "k")
    return _Product(modules, tensors[0].dims[0] * k, bits, is_float=False)


def _float_weight(
    name: str, stored: dict[str, onnx.TensorProto], producers: dict[str, onnx.NodeProto]
) -> onnx.TensorProto | None:
    """Return the initializer behind `name`, looking through the Cast and Transpose in front of lm_head."""
    while name in producers and producers[name].op_type in ("Cast", "Transpose"):
        name = producers[name].input[0]
    return stored.get(name)


def _average_bits(products: list[_Product]) -> float:
    return sum(product.bits for product in products) / sum(product.weights for product in products)


def _cache_bytes(value: onnx.ValueInfoProto) -> int:
    tensor = value.type.tensor_type
    fixed = [dim.dim_value for dim in tensor.shape.dim if dim.dim_value]
    return int(prod(fixed)) * _BITS[tensor.elem_type] // 8


def _sizes(bundle: Bundle) -> dict[str, int]:
    files = {path: path.stat().st_size for path in bundle.path.rglob("*") if path.is_file()}
    portable = bundle.model_path("portable")
    sizes = {"portable": sum(size for path, size in files.items() if str(path) in (str(portable), f"{portable}.data"))}
    for target in bundle.manifest.targets:
        folder = bundle.model_path(target).parent
        sizes[target] = sum(size for path, size in files.items() if folder in path.parents)
    return {**sizes, "total": sum(files.values())}
