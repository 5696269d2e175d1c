"""Round a weight whose channels have two formats: clips of the low part, then AdaRound of the high one."""

from torch import Tensor

from planish.compiler.learn.rounding.adaround import Beside, adaround
from planish.compiler.learn.rounding.weight_clips import learn_clips
from planish.compiler.quantize.arithmetic import dequantize_weight, quantize_weight
from planish.compiler.select.channel_split import ChannelSplit, SplitWeight

__all__ = ["round_split"]


def round_split(
    weight: Tensor, order: Tensor, count: int, split: ChannelSplit, moment: Tensor, held_out: Tensor
) -> SplitWeight:
    """Round both parts of a weight such that its output moves least (the two roundings of arXiv 2511.17801).

    The low part learns how much of its range it spans, as if the high one were exact. The high part then learns its
    rounding with the low one as it is, and with input channels makes up for what that does to the output.

    Args:
        weight: float [out, in].
        order: the channels, those that matter most first, int64.
        count: how many of them are high.
        split: how channels are stored.
        moment: E[x^T x] of the inputs to learn on, float64 [in, in].
        held_out: the same of other inputs, on which every row keeps what is best.

    Raises:
        ValueError: if the moment to learn on is not finite.
    """
    weight = weight.detach().float()
    high, low = order[:count], order[count:]
    if split.axis == "out":
        low_rows = learn_clips(weight[low], moment, held_out, split.low) if len(low) else None
        high_rows = None
        if count:
            high_rows = adaround(weight[high], quantize_weight(weight[high], split.high), moment, held_out)
        return SplitWeight(split.axis, order, high_rows, low_rows)
    low_part = high_part = None
    error = weight.new_zeros(len(weight), 0)
    if len(low):
        low_part = learn_clips(weight[:, low], moment[low][:, low], held_out[low][:, low], split.low)
        error = weight[:, low] - dequantize_weight(low_part)
    if count:
        start = quantize_weight(weight[:, high], split.high)
        high_part = adaround(weight[:, high], start, moment, held_out, Beside(high, low, error))
    return SplitWeight(split.axis, order, high_part, low_part)
