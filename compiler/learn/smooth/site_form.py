"""The form `smooth`: a Hadamard rotation at ffn_out behind the channel scale that smooth rotation chooses."""

import torch
from torch import Tensor

from planish.compiler.learn.block import Angles, Block, FloatHooks, run_block
from planish.compiler.learn.low_bit import Reached
from planish.compiler.learn.smooth.smooth_rotation import smooth_rotation
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.site_moments import residual_weights
from planish.passes.scheme import Scheme
from planish.passes.transforms import Site

__all__ = ["smooth_ffn_out"]

#: Tokens that scales are chosen on, at most: all of them are in memory at once, at the width of the FFN.
_MOST_TOKENS = 1 << 16


def smooth_ffn_out(
    block: Block, streams: Streams, outputs: Sequences, angles: Angles, scheme: Scheme, seed: int
) -> tuple[Factors, dict[str, float]]:
    """Return the factors at ffn_out, and the error of every rule for its scale.

    Args:
        block: the float block.
        streams: its inputs; of the `seen` stream, the sequences that are fitted to.
        outputs: of the float block, [sequences, seq, hidden]; say what a token counts.
        angles: of the positions.
        scheme: what is rounded.
        seed: of the rotation, and of learning.
    """
    hooks, inputs, weights, tokens = _FfnOut(block), [], [], 0
    for part in streams.batches():
        if tokens >= _MOST_TOKENS:
            break
        try:
            run_block(block.config, hooks, streams.seen[part], angles)
        except Reached as reached:
            inputs.append(reached.x)
        tokens += inputs[-1].shape[0] * inputs[-1].shape[1]
        weights.append(residual_weights(outputs[part]).reshape(outputs[part].shape[:2]))
    together = torch.cat(inputs)
    inputs.clear()
    found = smooth_rotation(
        together,
        block.weight("mlp.down_proj"),
        scheme.at("ffn_out"),
        seed=seed,
        token_weights=torch.cat(weights),
    )
    evidence = {f"error of scales by {each.policy}": each.error.weighted for each in found.candidates}
    return Factors.of(found.transform, outputs.device), evidence


class _FfnOut(FloatHooks):
    """The float block up to what down_proj reads."""

    def site(self, site: Site, x: Tensor) -> Tensor:
        if site == "ffn_out":
            raise Reached(x)
        return x
