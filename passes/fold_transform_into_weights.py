"""Take the inverses of online transforms into the weights behind them."""

import onnx_ir as ir

from planish.passes.blocks import GraphError, initializer_of
from planish.passes.builder import dim
from planish.passes.folding import fold
from planish.passes.insert_online_transform import INVERSE
from planish.passes.merge_linears import linear_modules
from planish.passes.online import factors_of

__all__ = ["FoldTransformIntoWeightsPass"]


class FoldTransformIntoWeightsPass(ir.passes.InPlacePass):
    """Replaces W behind ``PlanishTransform*`` and its inverse by W P^-T, and removes the inverse.

    P is read from the online op, so the weights get the exact inverse of what runs, taken in float64.

    Before: marked inverses (InsertOnlineTransformPass), read by linears that are not merged yet. After: the same
    logits, and no marked inverse.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold every marked inverse.

        Raises:
            GraphError: if something other than linears reads one.
        """
        graph = model.graph
        inverses: dict[str, list[ir.Node]] = {}
        for node in graph:
            if INVERSE in node.metadata_props:
                inverses.setdefault(node.metadata_props[INVERSE], []).append(node)
        for chain in inverses.values():
            _fold(graph, chain)
        return ir.passes.PassResult(model, modified=bool(inverses))


def _fold(graph: ir.Graph, chain: list[ir.Node]) -> None:
    """Fold the inverses of one online transform, given in the order in which they run."""
    transformed = chain[0].inputs[0]
    online = transformed.producer() if transformed is not None else None
    if online is None or transformed is None:
        raise GraphError(f"'{chain[0].name}' undoes a transform, and there is none in front of it.")
    for use in list(chain[-1].outputs[0].uses()):
        linear = use.node
        if len(linear_modules(linear)) != 1 or use.idx != 0:
            raise GraphError(f"'{linear.name}' reads the inverse '{chain[-1].name}', which only a linear can take in.")
        weight = initializer_of(linear, 1)
        fold(weight, 0, factors_of(online, dim(weight, 0)).apply_to_weight)
        linear.replace_input_with(0, transformed)
    factors = [initializer_of(node, i) for node in chain for i in range(1, len(node.inputs))]
    graph.remove(reversed(chain), safe=True)
    for factor in factors:
        del graph.initializers[str(factor.name)]
