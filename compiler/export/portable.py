"""Build the portable low-bit model: the float graph, rewritten by the passes, in the order they must run."""

import onnx_ir as ir
import onnx_ir.passes.common as common

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.export.decoder import build_decoder
from planish.compiler.export.streaming import CheckpointTensor
from planish.passes.codes import CodesSource
from planish.passes.flatten import flatten_passes
from planish.passes.fold_channel_order import FoldChannelOrderPass
from planish.passes.merge_linears import MergeLinearsPass
from planish.passes.quantize_kv_cache import QuantizeKvCachePass
from planish.passes.quantize_linears import QuantizeLinearsPass
from planish.passes.scheme import Scheme
from planish.passes.sequence import run_passes
from planish.passes.transforms import Site, Transforms

__all__ = ["portable_model"]


def portable_model(
    checkpoint: Checkpoint, scheme: Scheme, codes: CodesSource, transforms: Transforms | None = None
) -> tuple[ir.Model, list[str]]:
    """Return the low-bit model, weights still on disk, and the names of the linears left in floating point.

    With `transforms`, the float graph is flattened first; codes are then those of the flattened weights.

    Embeddings are stored as float16 once anything is quantised: their rounding is far below that of the codes.
    """
    table = ir.DataType.FLOAT if scheme.linear.is_float else ir.DataType.FLOAT16

    def weight(name: str, transpose: bool) -> ir.TensorProtocol:
        dtype = table if name == "model.embed_tokens.weight" else ir.DataType.FLOAT
        return CheckpointTensor(checkpoint, name, dtype, transpose=transpose)

    def cache_clip(layer: int, site: Site) -> float:
        return 1.0 if transforms is None else transforms.layers[layer].clip(site)

    grids = () if transforms is None else (transforms.clip, transforms.high)
    quantize_linears = QuantizeLinearsPass(scheme, codes, *grids)
    passes = [
        *([] if transforms is None else flatten_passes(transforms)),
        MergeLinearsPass(),
        quantize_linears,
        FoldChannelOrderPass(),
        QuantizeKvCachePass(scheme, cache_clip),
        common.RemoveUnusedNodesPass(),
    ]
    return run_passes(build_decoder(checkpoint.config, weight), passes), quantize_linears.left_float
