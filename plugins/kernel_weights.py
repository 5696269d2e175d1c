"""The low-bit linears of a portable model, one after the other, in the form that kernels read."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from planish.plugins.kernel_layout import KERNEL_BITS, KernelWeight, pack_for_kernel
from planish.plugins.ops.op import DOMAIN

__all__ = ["KernelLinear", "kernel_linears"]

_OP = "PlanishMatMul"


@dataclasses.dataclass(frozen=True, eq=False)
class KernelLinear:
    """One `PlanishMatMul` of a portable model.

    Attributes:
        name: of its weight, an initializer.
        weight: in kernel layout; None where no kernel reads it: codes of 8 bits, or several scales to a row.
        scale: float32 [rows]; None beside no weight.
        activation_bits: bits of the codes that it multiplies.
    """

    name: str
    weight: KernelWeight | None
    scale: npt.NDArray[np.float32] | None
    activation_bits: int


def kernel_linears(model: Path) -> Iterator[KernelLinear]:
    """Yield every `PlanishMatMul` of a portable model, in the order of the graph.

    The model's data is mapped, not read: memory holds one weight at a time.

    Raises:
        NativeBuildError: if the packer cannot be compiled.
    """
    for node in ir.load(model).graph:
        if node.domain == DOMAIN and node.op_type.startswith(_OP):
            yield _linear(node)


def _linear(node: ir.Node) -> KernelLinear:
    name, tensor = _initializer(node, 2)
    scale = _initializer(node, 3)[1].numpy()
    bits, channels = int(node.op_type.removeprefix(_OP)), node.attributes.get_int("k", 0)
    activation_bits = node.attributes.get_int("activation_bits", 0)
    if bits not in KERNEL_BITS or len(scale) != 1:
        return KernelLinear(name, None, None, activation_bits)
    weight = pack_for_kernel(tensor.numpy().astype(np.uint8, copy=False), channels, bits)
    return KernelLinear(name, weight, scale[0].astype(np.float32), activation_bits)


def _initializer(node: ir.Node, index: int) -> tuple[str, ir.TensorProtocol]:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None, f"'{node.name}' has no initializer as input {index}"
    return str(value.name), value.const_value
