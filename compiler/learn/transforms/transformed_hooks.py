"""The float block behind its transforms: online maps run, weights are folded, nothing is rounded."""

import torch

from planish.compiler.learn.block import MODULES, Block
from planish.compiler.learn.low_bit import LowBitHooks
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.fold import fold_block
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, Site, Transforms

__all__ = ["TransformedHooks", "factors_of_layer"]

_FLOAT = Scheme.parse("w16a16")


class TransformedHooks(LowBitHooks):
    """Hooks of a folded block, whose `weights` may be replaced."""

    def __init__(self, block: Block, factors: dict[Site, Factors]) -> None:
        """Take the float block, and the factors to fold into it."""
        folded = fold_block(block, factors)
        super().__init__(folded, factors, _FLOAT)
        self.weights = {module: folded.weight(module) for module in MODULES}


def factors_of_layer(
    transforms: Transforms | None, layer: int, device: torch.device | None = None
) -> dict[Site, Factors]:
    """Return the factors at every site of a layer; identities where there are no transforms."""
    if transforms is None:
        return {site: Factors("identity") for site in SITES}
    return {site: Factors.of(transforms.layers[layer][site], device) for site in SITES}
