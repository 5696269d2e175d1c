"""Write the contracts of the plugins as C++: `python -m planish.plugins.tensorrt.header` renews contracts.h.

A contract becomes a struct of its attributes, which can say what is wrong with them and what tensors they ask for.
"""

import re
import string
import typing
from collections.abc import Iterator
from pathlib import Path

from planish.plugins.cuda_build import ARCHITECTURES
from planish.plugins.ops.op import DOMAIN
from planish.plugins.tensorrt.contract import LEADING, Contract, Dtype, Tensor, names_of
from planish.plugins.tensorrt.plugins import LAYOUT, PLUGINS

__all__ = ["HEADER", "contracts_header"]

HEADER = Path(__file__).with_name("contracts.h")

_TYPES = {"int": "int32_t", "float": "float"}
_DTYPES = {dtype: f"Type::k{dtype.capitalize()}" for dtype in typing.get_args(Dtype)}


def contracts_header() -> str:
    """Return the text of contracts.h."""
    sms = ", ".join(each.rstrip("a") for each in ARCHITECTURES)
    lines = [
        "// Written by planish.plugins.tensorrt.header from the contracts in plugins.py. Change those.",
        "#pragma once",
        "",
        '#include "signature.h"',
        "",
        "namespace planish::plugin {",
        "",
        f'constexpr const char* kNamespace = "{DOMAIN}";',
        f"constexpr int kLayout = {LAYOUT};",
        "// Compute capabilities, times ten, that have kernels.",
        f"constexpr int kSms[] = {{{sms}}};",
    ]
    for contract in PLUGINS:
        lines += ["", *_struct(contract)]
    names = ", ".join(contract.name for contract in PLUGINS)
    lines += ["", "// The operations of the library.", f"using Plugins = Types<{names}>;", ""]
    return "\n".join([*lines, "}  // namespace planish::plugin", ""])


def _struct(contract: Contract) -> Iterator[str]:
    yield f"// {contract.meaning}"
    yield f"struct {contract.name} {{"
    for attribute in contract.attributes:
        yield f"    {_TYPES[attribute.kind]} {attribute.name};  // {attribute.meaning}"
    yield ""
    yield f'    static constexpr const char* kName = "{contract.name}";'
    yield f'    static constexpr const char* kVersion = "{contract.version}";'
    for part, tensors in (("Input", contract.inputs), ("Output", contract.outputs)):
        names = ["k" + _camel(tensor.name) for tensor in tensors]
        yield f"    enum {part} {{ {', '.join([*names, f'k{part}s'])} }};"
    yield ""
    yield "    // The attributes, for reading and writing them by name."
    yield "    static const std::vector<Field>& fields() {"
    yield "        static const std::vector<Field> all = {"
    for attribute in contract.attributes:
        kind = attribute.kind.capitalize()
        place = f"offsetof({contract.name}, {attribute.name})"
        yield f'            {{"{attribute.name}", Field::k{kind}, {place}, "{attribute.meaning}"}},'
    yield "        };"
    yield "        return all;"
    yield "    }"
    for name, expression in contract.derived.items():
        yield f"    int64_t {name}() const {{ return {_cpp(contract, expression)}; }}"
    yield ""
    yield "    // What is wrong with the attributes; empty if nothing is."
    yield "    std::string problem() const {"
    for rule in contract.rules:
        values = [(name, _cpp(contract, name)) for name in _placeholders(rule.otherwise)]
        spelled = ", ".join(f'{{"{name}", spell({value})}}' for name, value in values)
        yield f"        if (!({_cpp(contract, rule.holds)})) {{"
        yield f'            return words("{contract.name}: {rule.otherwise}", {{{spelled}}});'
        yield "        }"
    yield "        return {};"
    yield "    }"
    yield ""
    yield "    Signature signature() const {"
    yield f'        Signature made = {{"{contract.name}", {{}}, {{}}}};'
    for part, tensors in (("inputs", contract.inputs), ("outputs", contract.outputs)):
        for tensor in tensors:
            yield from _tensor(contract, part, tensor)
    yield "        return made;"
    yield "    }"
    yield "};"


def _tensor(contract: Contract, part: str, tensor: Tensor) -> Iterator[str]:
    dtypes = [_DTYPES[dtype] for dtype in tensor.dtypes]
    types = f"{{{', '.join(dtypes)}}}"
    if tensor.pick:
        types = f"{{pick({types}, {tensor.pick})}}"
    shape = ", ".join(_dim(contract, dim) for dim in tensor.shape)
    known = [each.name for each in contract.inputs]
    like, alias = (known.index(name) if name else -1 for name in (tensor.like, tensor.alias))
    number = (contract.inputs if part == "inputs" else contract.outputs).index(tensor)
    given = "" if tensor.given == "1" else f"if ({_cpp(contract, tensor.given)}) "
    yield f'        {given}made.{part}.push_back({{"{tensor.name}", {number}, {types}, {{{shape}}}, {like}, {alias}}});'


def _dim(contract: Contract, dim: str) -> str:
    known = {each.name for each in contract.attributes} | set(contract.derived)
    if dim == LEADING or not set(names_of(dim)) <= known:
        return f'named("{dim}")'
    return f"sized({_cpp(contract, dim)})"


def _cpp(contract: Contract, expression: str) -> str:
    """Return an expression in C++, where derived sizes are functions."""
    text = expression
    for name in set(names_of(expression)) & set(contract.derived):
        text = re.sub(rf"\b{name}\b", f"{name}()", text)
    return text


def _placeholders(message: str) -> list[str]:
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(message) if name))


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


if __name__ == "__main__":
    HEADER.write_text(contracts_header())
