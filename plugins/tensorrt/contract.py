"""What a plugin takes and gives, as data: attributes, tensors, rules, and the words in which a misuse is refused.

A contract is the one source of all that Python and C++ must agree on. Python checks a node before it puts it into a
graph; `header.py` writes the same contract as C++, and the plugin library checks what TensorRT hands it.

Sizes and rules are expressions of the attributes, in what Python and C++ have in common: numbers, names, + - * %,
comparisons that are not chained, `and`, `or`, `not`, and the functions of `FUNCTIONS`.
"""

import ast
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, Literal

__all__ = ["FUNCTIONS", "LEADING", "Attribute", "Contract", "Dtype", "Rule", "Tensor", "names_of"]

#: Types of a plugin's tensors, as numpy and ml_dtypes call them; their order is that of `Type` in C++.
Dtype = Literal["float32", "float16", "bfloat16", "int32"]
#: As first dimension of a shape: any number of dimensions, the same for every tensor of the node that has it.
LEADING = "..."

_ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.BinOp, ast.Add, ast.Sub, ast.Mult),
    *(ast.Mod, ast.Compare, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq, ast.Call, ast.Name, ast.Load),
    ast.Constant,
)


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _padded_channels(channels: int, bits: int) -> int:
    # The channels of a group, by bits; segments.cuh.
    group = {2: 128, 3: 256, 4: 64}.get(bits, 1)
    return _ceil_div(channels, group) * group


def _widest_row(k: int) -> int:
    # 16 results to each of 1024 threads, of which as many work as make up whole rows of k; apply_factors.cuh.
    return 16 * (1024 - (1024 % k if k <= 1024 else 0))


#: What expressions may call, in Python; signature.h has the same in C++.
FUNCTIONS: dict[str, Callable[..., int]] = {
    "ceil_div": _ceil_div,
    "padded_channels": _padded_channels,
    "widest_row": _widest_row,
}


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A number that a node carries, int32 or float32; every attribute of a contract must be given."""

    name: str
    kind: Literal["int", "float"]
    meaning: str


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        name: of the tensor.
        dtypes: the types that it may have.
        shape: its dimensions: `LEADING`, the name of a size that the node finds in its inputs (it must be the same
            wherever the name stands), or an expression.
        meaning: what it holds.
        given: an expression; where it is 0, the node has no such tensor.
        like: the tensor whose type it has; "" is none.
        pick: the attribute that is the number of its type in `dtypes`; "" is none.
        alias: the input whose memory an output is; "" is none.
    """

    name: str
    dtypes: tuple[Dtype, ...]
    shape: tuple[str, ...]
    meaning: str
    given: str = "1"
    like: str = ""
    pick: str = ""
    alias: str = ""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What must hold of the attributes, an expression, and what is said where it does not, with {name} for values."""

    holds: str
    otherwise: str


@dataclasses.dataclass(frozen=True)
class Contract:
    """A plugin.

    Attributes:
        name: of the plugin and of its op type.
        version: raised by any change of attributes, inputs, outputs or layouts: an engine finds its plugins by it.
        meaning: what it computes, in a sentence.
        attributes: in order.
        derived: name -> expression, of attributes and of those before it.
        rules: checked in order.
        inputs: in order.
        outputs: in order.
    """

    name: str
    version: str
    meaning: str
    attributes: tuple[Attribute, ...]
    rules: tuple[Rule, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    derived: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def problem(self, attributes: Mapping[str, float]) -> str | None:
        """Return what is wrong with the attributes of a node, in words, or None."""
        for attribute in self.attributes:
            if attribute.name not in attributes:
                return f"{self.name} lacks the attribute '{attribute.name}' ({attribute.meaning})"
        values = self._values(attributes)
        for rule in self.rules:
            if not _evaluate(rule.holds, values):
                return (
                    f"{self.name}: {rule.otherwise.format(**{name: _spell(value) for name, value in values.items()})}"
                )
        return None

    def given_inputs(self, attributes: Mapping[str, float]) -> list[Tensor]:
        """Return the inputs that a node of these attributes has."""
        values = self._values(attributes)
        return [tensor for tensor in self.inputs if _evaluate(tensor.given, values)]

    def given_outputs(self, attributes: Mapping[str, float]) -> list[Tensor]:
        """Return the outputs that a node of these attributes has: all, or all but some of the last."""
        values = self._values(attributes)
        return [tensor for tensor in self.outputs if _evaluate(tensor.given, values)]

    def outputs_of(
        self, attributes: Mapping[str, float], inputs: Sequence[tuple[str, Sequence[int]]]
    ) -> list[tuple[Dtype, tuple[int, ...]]]:
        """Return type and shape of every output.

        Args:
            attributes: of the node, without a problem.
            inputs: type and shape of every input that is given.

        Raises:
            ValueError: if an input has a type or a shape that the node does not take; the message is the library's.
        """
        values, given = self._values(attributes), self.given_inputs(attributes)
        if len(inputs) != len(given):
            raise ValueError(f"{self.name} takes {len(given)} inputs, and {len(inputs)} are there")
        sizes: dict[str, tuple[int, ...]] = {}
        types: dict[str, Dtype] = {}
        for tensor, (dtype, _) in zip(given, inputs, strict=True):
            allowed = self._dtypes(tensor, values, types)
            if dtype not in allowed:
                raise ValueError(f"{self.name}: '{tensor.name}' is {dtype}; it takes {' or '.join(allowed)}")
            types[tensor.name] = dtype
        for tensor, (_, shape) in zip(given, inputs, strict=True):
            wanted = self._shape(tensor, values)
            if not _bind(wanted, tuple(shape), sizes):
                raise ValueError(
                    f"{self.name}: '{tensor.name}' has shape {_spell_shape(shape)}; it takes "
                    f"{_spell_shape([sizes.get(str(size), (size,)) for size in wanted])}"
                )
        # Those that may be left out are the last: the others keep their places.
        return [
            (
                self._dtypes(tensor, values, types)[0],
                tuple(
                    n
                    for size in self._shape(tensor, values)
                    for n in ((size,) if isinstance(size, int) else sizes[size])
                ),
            )
            for tensor in self.given_outputs(attributes)
        ]

    def _values(self, attributes: Mapping[str, float]) -> dict[str, float]:
        values = {each.name: attributes[each.name] for each in self.attributes}
        for name, expression in self.derived.items():
            values[name] = _evaluate(expression, values)
        return values

    def _dtypes(self, tensor: Tensor, values: Mapping[str, float], types: Mapping[str, Dtype]) -> tuple[Dtype, ...]:
        if tensor.like:
            return (types[tensor.like],)
        return (tensor.dtypes[int(values[tensor.pick])],) if tensor.pick else tensor.dtypes

    def _shape(self, tensor: Tensor, values: Mapping[str, float]) -> list[int | str]:
        """Return sizes, and the names of those that inputs decide."""
        return [
            int(_evaluate(dim, values)) if dim != LEADING and set(names_of(dim)) <= set(values) else dim
            for dim in tensor.shape
        ]


@functools.cache
def names_of(expression: str) -> tuple[str, ...]:
    """Return the names in an expression, functions left out.

    Raises:
        ValueError: if it means something else in C++ or cannot be read there.
    """
    tree = ast.parse(expression, mode="eval")
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED) or (isinstance(node, ast.Compare) and len(node.ops) > 1):
            raise ValueError(f"'{expression}' is not what Python and C++ read alike")
    return tuple(node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in called)


@functools.cache
def _compiled(expression: str) -> CodeType:
    names_of(expression)
    return compile(expression, expression, "eval")


def _evaluate(expression: str, values: Mapping[str, float]) -> Any:
    return eval(_compiled(expression), {"__builtins__": {}, **FUNCTIONS}, dict(values))


def _bind(wanted: Sequence[int | str], shape: tuple[int, ...], sizes: dict[str, tuple[int, ...]]) -> bool:
    """Return whether a shape is what is wanted, and keep the sizes that it gives to names."""
    fixed, leading = list(wanted), len(shape) - len(wanted) + 1
    parts: list[tuple[int, ...]] = [(size,) for size in shape]
    if fixed[0] == LEADING:
        if leading < 1:
            return False
        parts = [shape[:leading], *parts[leading:]]
    if len(parts) != len(fixed):
        return False
    return all(
        part == ((size,) if isinstance(size, int) else sizes.setdefault(size, part))
        for size, part in zip(fixed, parts, strict=True)
    )


def _spell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _spell_shape(shape: Sequence[Any]) -> str:
    flat = [n for size in shape for n in (size if isinstance(size, tuple) else (size,))]
    return f"[{', '.join(map(str, flat))}]"
