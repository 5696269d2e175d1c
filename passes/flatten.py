"""The passes that flatten a float graph, in the order they must run."""

import onnx_ir as ir

from planish.passes.fold_channel_scale import FoldChannelScalePass
from planish.passes.fold_head_scale import FoldHeadScalePass
from planish.passes.fold_norm_gain import FoldNormGainPass
from planish.passes.fold_residual_rotation import FoldResidualRotationPass
from planish.passes.fold_transform_into_weights import FoldTransformIntoWeightsPass
from planish.passes.fold_value_map import FoldValueMapPass
from planish.passes.insert_key_map import InsertKeyMapPass
from planish.passes.insert_online_transform import InsertOnlineTransformPass
from planish.passes.transforms import Transforms
from planish.passes.untie_embeddings import UntieEmbeddingsPass

__all__ = ["flatten_passes"]


def flatten_passes(transforms: Transforms) -> list[ir.passes.PassBase]:
    """Return the passes that put `transforms` into a float decoder graph; each leaves the logits as they were.

    Merging and quantising come after them. Channel scales are folded into the norm gains after the residual rotation
    has made those ones, and in front of the online transforms, as x -> (x * scale) P says.
    """
    stream: list[ir.passes.PassBase] = []
    if transforms.residual is not None or transforms.head is not None:
        stream.append(UntieEmbeddingsPass())
    if transforms.residual is not None:
        stream += [FoldNormGainPass(), FoldResidualRotationPass(transforms.residual)]
    if transforms.head is not None:
        stream.append(FoldHeadScalePass(transforms.head))
    return [
        *stream,
        FoldValueMapPass(transforms),
        FoldChannelScalePass(transforms),
        InsertOnlineTransformPass(transforms),
        FoldTransformIntoWeightsPass(),
        InsertKeyMapPass(transforms),
    ]
