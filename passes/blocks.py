"""Find the parts of decoder blocks in a float graph: linears, their biases, norms, and the sites between them."""

import dataclasses

import onnx_ir as ir

from planish.passes.builder import dim
from planish.passes.merge_linears import linear_modules
from planish.passes.transforms import SITE_MODULES, Site, Transform, Transforms
from planish.plugins.errors import PlanishError

__all__ = ["Blocks", "GraphError", "Linear", "expect_readers", "expect_width", "initializer_of", "of_query_heads"]

#: The sites that are the input of linears -> the node of the block that makes their value.
_MAKERS: dict[Site, str] = {
    "attn_in": "input_layernorm",
    "attn_out": "self_attn.attend",
    "ffn_in": "post_attention_layernorm",
    "ffn_out": "mlp.hidden",
}


class GraphError(PlanishError):
    """A pass was given a graph that is not in the form it needs."""

    exit_code = 27


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear of a decoder block.

    Attributes:
        module: its checkpoint module.
        node: the MatMul.
        weight: its weight, an initializer [in, out].
        bias: its bias, an initializer [out]; None is none.
    """

    module: str
    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None

    @property
    def x(self) -> ir.Value:
        """What it reads."""
        return _given(self.node, 0)


class Blocks:
    """The decoder blocks of a graph as `build_decoder` makes it, before linears are merged.

    Attributes:
        layers: how many there are.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._nodes = {str(node.name): node for node in graph}
        self._linears: dict[str, ir.Node] = {}
        for node in graph:
            modules = linear_modules(node)
            if len(modules) == 1:
                self._linears[modules[0]] = node
            elif modules:
                raise GraphError(f"'{node.name}' is a merged product. This pass has to run before MergeLinearsPass.")
        self.layers = sum(module.endswith(".self_attn.o_proj") for module in self._linears)

    def linear(self, layer: int, name: str) -> Linear:
        """Return a linear of a block, such as 'self_attn.q_proj'.

        Raises:
            GraphError: if the graph has none of that name.
        """
        module = f"model.layers.{layer}.{name}"
        if module not in self._linears:
            raise GraphError(f"The graph has no product by '{module}.weight'. This pass needs the float decoder graph.")
        node = self._linears[module]
        bias = None
        for use in node.outputs[0].uses():
            for value in use.node.inputs:
                if value is not None and value.name == f"{module}.bias":
                    bias = value
        return Linear(module, node, _given(node, 1), bias)

    def readers(self, layer: int, site: Site) -> list[Linear]:
        """Return the linears behind a site that is the input of linears.

        Raises:
            GraphError: if one is missing, or something stands in front of it already.
        """
        linears = [self.linear(layer, name) for name in SITE_MODULES[site]]
        made = self.node(f"model.layers.{layer}.{_MAKERS[site]}").outputs[0]
        for each in linears:
            if each.x is not made:
                raise GraphError(
                    f"'{each.module}' reads '{each.x.name}' and should read '{made.name}'. This pass has to run "
                    "before online transforms are inserted."
                )
        return linears

    def heads(self, layer: int) -> tuple[int, int, int]:
        """Return the query heads, the KV heads and the channels of a head of a block.

        Raises:
            GraphError: if its attention is not one over a float cache.
        """
        node = self.node(f"model.layers.{layer}.self_attn.attend")
        if node.op_type != "Attention":
            raise GraphError(f"'{node.name}' is a {node.op_type}. This pass has to run before QuantizeKvCachePass.")
        past = _given(node, 4)
        return node.attributes.get_int("q_num_heads"), dim(past, 1), dim(past, 3)

    def norm(self, name: str) -> tuple[ir.Node, ir.Value]:
        """Return the node of a norm, such as 'model.norm', and its gain.

        Raises:
            GraphError: if it is not there, or its gain is no initializer.
        """
        node = self.node(name)
        if node.op_type != "RMSNormalization":
            raise GraphError(f"'{name}' is a {node.op_type}, not an RMSNormalization.")
        return node, initializer_of(node, 1)

    def node(self, name: str) -> ir.Node:
        """Return the node called `name`.

        Raises:
            GraphError: if there is none.
        """
        if name not in self._nodes:
            raise GraphError(f"The graph has no node '{name}'. This pass needs the float decoder graph.")
        return self._nodes[name]

    def head(self) -> ir.Value:
        """Return the initializer that lm_head multiplies by, [vocab, hidden], through its Cast and Transpose."""
        node = self.node("logits")
        value = _given(node, 1)
        while not value.is_initializer():
            producer = value.producer()
            if producer is None or producer.op_type not in ("Cast", "Transpose"):
                raise GraphError(f"'logits' multiplies by '{value.name}', which is not a weight.")
            value = _given(producer, 0)
        return value

    def expect(self, transforms: Transforms) -> None:
        """Check that there is one set of transforms per block.

        Raises:
            GraphError: if there is not.
        """
        if len(transforms.layers) != self.layers:
            raise GraphError(
                f"There are transforms for {len(transforms.layers)} blocks, and the graph has {self.layers}."
            )


def expect_readers(norm: ir.Node, expected: set[ir.Node]) -> None:
    """Check that nothing but `expected` reads a norm, looking through the Slice that keeps the last positions.

    Raises:
        GraphError: if something else does.
    """
    for use in norm.outputs[0].uses():
        if use.node.op_type == "Slice":
            expect_readers(use.node, expected)
        elif use.node not in expected:
            raise GraphError(
                f"'{use.node.name}' reads '{norm.name}', and what is folded into a norm can be undone only in the "
                "linears behind it."
            )


def expect_width(linear: Linear, axis: int, transform: Transform) -> None:
    """Check that a transform has as many channels as the input (axis 0) or output (axis 1) of a linear.

    Raises:
        GraphError: if it has not.
    """
    channels = dim(linear.weight, axis)
    if channels != transform.width:
        side = ("input", "output")[axis]
        raise GraphError(f"'{linear.module}' has {channels} {side} channels, and its transform has {transform.width}.")


def of_query_heads(transform: Transform, blocks: Blocks, layer: int) -> Transform:
    """Return the map of a block's query heads from that of its KV heads.

    Raises:
        GraphError: if it does not map single heads of this model.
    """
    query_heads, kv_heads, head_dim = blocks.heads(layer)
    if transform.width != kv_heads * head_dim or transform.grid[1] != head_dim:
        raise GraphError(
            f"Layer {layer} has {kv_heads} KV heads of {head_dim} channels, and a map of its heads reads "
            f"{transform.grid[0]} of {transform.grid[1]}."
        )
    return transform.for_query_heads(query_heads // kv_heads)


def initializer_of(node: ir.Node, i: int) -> ir.Value:
    """Return input `i` of a node, which must be an initializer.

    Raises:
        GraphError: if it is not.
    """
    value = _given(node, i)
    if not value.is_initializer() or value.const_value is None:
        raise GraphError(f"Input {i} of '{node.name}' is '{value.name}', which is not an initializer.")
    return value


def _given(node: ir.Node, i: int) -> ir.Value:
    value = node.inputs[i] if i < len(node.inputs) else None
    if value is None:
        raise GraphError(f"'{node.name}' has no input {i}.")
    return value
