"""The contracts as ONNX schemas, for what reads a model with plugin nodes: onnx's checker, viewers, ONNX Runtime."""

import onnx.defs
from onnx.defs import OpSchema

from planish.plugins.ops.op import DOMAIN
from planish.plugins.tensorrt.contract import Contract, Tensor

__all__ = ["onnx_schema", "register_schemas"]

_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int32": "tensor(int32)",
}
_KINDS = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT}
#: What a node says so that TensorRT before 10.10 finds its plugin.
_FOUND_BY = ("plugin_namespace", "plugin_version")


def onnx_schema(contract: Contract) -> OpSchema:
    """Return the schema of a plugin.

    An input that may be left out leaves no gap: those behind it move up. ONNX has no word for that, so from the first
    such input on a schema takes any.
    """
    fixed = next((i for i, each in enumerate(contract.inputs) if each.given != "1"), len(contract.inputs))
    inputs = [_parameter(each) for each in contract.inputs[:fixed]]
    if fixed < len(contract.inputs):
        rest = contract.inputs[fixed:]
        meaning = "; ".join(f"{each.name} if {each.given}: {each.meaning}" for each in rest)
        inputs.append(
            OpSchema.FormalParameter(
                "others",
                "T_others",
                meaning,
                param_option=OpSchema.FormalParameterOption.Variadic,
                is_homogeneous=False,
                min_arity=0,
            )
        )
    tensors = [*contract.inputs[:fixed], *contract.outputs]
    constraints = [(f"T_{each.name}", [_TYPES[dtype] for dtype in each.dtypes], each.meaning) for each in tensors]
    if fixed < len(contract.inputs):
        constraints.append(("T_others", list(_TYPES.values()), "by the contract"))
    return OpSchema(
        contract.name,
        DOMAIN,
        1,
        doc=contract.meaning,
        inputs=inputs,
        outputs=[_parameter(each) for each in contract.outputs],
        type_constraints=constraints,
        attributes=[
            *(OpSchema.Attribute(each.name, _KINDS[each.kind], each.meaning) for each in contract.attributes),
            *(OpSchema.Attribute(name, OpSchema.AttrType.STRING, "where TensorRT finds it") for name in _FOUND_BY),
        ],
    )


def register_schemas(contracts: tuple[Contract, ...]) -> None:
    """Make the schemas of plugins known to the onnx package of this process."""
    for contract in contracts:
        onnx.defs.register_schema(onnx_schema(contract))


def _parameter(tensor: Tensor) -> OpSchema.FormalParameter:
    options = OpSchema.FormalParameterOption
    return OpSchema.FormalParameter(
        tensor.name,
        f"T_{tensor.name}",
        f"[{', '.join(tensor.shape)}]: {tensor.meaning}",
        param_option=options.Single if tensor.given == "1" else options.Optional,
    )
