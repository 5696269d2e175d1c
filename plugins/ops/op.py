"""What an op of the planish domain is: a name, a contract, and a function body in ONNX text.

The name carries what changes the body (the bits), attributes carry the rest. Names are unique on their own, not
only within the domain, because TensorRT's parser looks functions and built-ins up by name alone.
"""

import dataclasses
import functools

import onnx.parser
import onnx_ir as ir

__all__ = ["DOMAIN", "OPSET", "Op"]

#: The operator domain, also the namespace of the TensorRT plugins.
DOMAIN = "planish"
#: The newest ONNX opset that both ONNX Runtime and TensorRT's parsers read.
OPSET = 24


@dataclasses.dataclass(frozen=True)
class Op:
    """One planish op.

    Attributes:
        name: the globally unique op type, `Planish...`.
        inputs: name -> what it is: dtype, shape, meaning.
        outputs: likewise.
        attributes: name -> what it is; every one is required.
        body: the statements of the function, in ONNX text syntax.
        uses: the other planish ops that the body calls.
    """

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    attributes: dict[str, str]
    body: str
    uses: tuple["Op", ...] = ()

    @property
    def call(self) -> str:
        """How another op's body calls this one."""
        return f"{DOMAIN}.{self.name}"

    def function(self) -> ir.Function:
        """Return a fresh copy of the function definition."""
        return ir.serde.deserialize_function(_parse(self))

    def functions(self) -> list[ir.Function]:
        """Return the functions of every op it uses, then its own: some runtimes read them in order."""
        return [*(function for used in self.uses for function in used.functions()), self.function()]


@functools.cache
def _parse_text(text: str) -> onnx.FunctionProto:
    return onnx.parser.parse_function(text)


def _parse(op: Op) -> onnx.FunctionProto:
    attributes = f"<{', '.join(op.attributes)}>" if op.attributes else ""
    return _parse_text(
        f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}, "{DOMAIN}": 1]>\n'
        f"{op.name} {attributes} ({', '.join(op.inputs)}) => ({', '.join(op.outputs)})\n"
        f"{{{op.body}}}"
    )
