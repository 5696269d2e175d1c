"""Polish a flattened model as a whole: what stays in floating point learns to make up for what was rounded.

Codes stay as they are. The gains of norms, the scales of weight rows, the clips and the online affine maps move, such
that the distribution of the next token comes close to the float model's: min KL(p_float || p_low_bit) over the
calibration text. Roundings pass the gradient straight through.

The last steps are averaged (Polyak and Juditsky, SIAM J. Control Optim. 30, 1992; Izmailov et al., arXiv
1803.05407): a step follows the gradient of one sequence, and much of it is that sequence's own.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_multi_avg_fn

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.learn.polish.low_bit_model import LowBitModel
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.streams import Sequences
from planish.compiler.quantize.codes import CodesOnDisk
from planish.passes.scheme import Scheme
from planish.passes.transforms import Transforms

__all__ = ["Polished", "polish"]

#: Largest learning rates at 3 bits, and below: of gains, scales and clips, and of the entries of maps. A step moves
#: what codes were rounded for, whatever there is to win, and a bit more leaves a quarter of the error to win: at 4 bits
#: these rates do less good, or harm.
_RATE, _MAP_RATE = 2e-3, 2e-4
#: Share of the steps until the largest rate.
_WARM_UP = 0.15
#: Share of the steps, the last ones, that are averaged.
_AVERAGED = 0.5
#: Of Adam: the first goes down while the rate goes up, and back (Smith, arXiv 1803.09820).
_MOMENTUM, _LEAST_MOMENTUM, _SECOND_MOMENTUM = 0.95, 0.85, 0.95
#: Largest norm of the gradient of all parameters together.
_LONGEST = 1.0
_STATE = "polish.pt"


@dataclasses.dataclass(frozen=True)
class Polished:
    """What polishing made.

    Attributes:
        transforms: with new channel scales at the norms, new affine maps, and new clips.
        row_scales: by module, or segment of it as `Segment.of` calls it, what multiplies the scales of its weight rows,
            float32 [out].
        divergence: mean KL divergence per held-out token, in nats: before, after every epoch, and with the average of
            the last steps. Infinity is that of no use.
        cross_entropy: of the model as it is kept, on held-out tokens, in nats.
    """

    transforms: Transforms
    row_scales: dict[str, Tensor]
    divergence: list[float]
    cross_entropy: float

    @property
    def kept(self) -> float:
        """The divergence of what is kept: the average, or the start if that is closer."""
        return min(self.divergence[0], self.divergence[-1])


def polish(
    checkpoint: Checkpoint,
    scheme: Scheme,
    transforms: Transforms,
    codes: CodesOnDisk,
    token_ids: npt.NDArray[np.int64],
    final: Sequences,
    held_out: int,
    epochs: int,
    folder: Path,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Polished:
    """Return the average of the last steps, or the start where that is closer to the float model on held-out text.

    Nothing in between is a candidate: held-out text is short, and the luckiest of many epochs is not the best.

    Args:
        checkpoint: the float model.
        scheme: of the model.
        transforms: that `codes` were rounded under.
        codes: of all linears of the blocks.
        token_ids: calibration sequences, int64 [sequences, seq].
        final: outputs of the float model's last block for them, float32 [sequences, seq, hidden], on `device`.
        held_out: how many of the last sequences nothing is fitted to.
        epochs: how often to go through the others.
        folder: keeps the state after every epoch, from which a killed run goes on.
        seed: of the order of sequences.
        device: where the model is meanwhile, all of it; None is the CPU.
        progress: (sequences done, sequences in all).
    """
    model = LowBitModel(checkpoint, scheme, transforms, codes, device)
    fitted = len(token_ids) - held_out
    steps = epochs * fitted
    ids = torch.from_numpy(token_ids).to(device)
    share = 4.0 ** min(0, 3 - min(scheme.linear.weight_bits, scheme.linear.activation_bits))
    rates = [share * (_MAP_RATE if is_map else _RATE) for is_map in model.are_maps()]
    groups = [{"params": [each], "lr": rate} for each, rate in zip(model.parameters(), rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(_MOMENTUM, _SECOND_MOMENTUM))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, steps, pct_start=_WARM_UP, base_momentum=_LEAST_MOMENTUM, max_momentum=_MOMENTUM
    )
    state, first = folder / _STATE, steps - max(1, round(_AVERAGED * steps))
    start = average = model.state()
    average_with = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
    with fast_products():
        if state.exists():
            # To the CPU: what counts the optimizer's steps belongs there, and the rest goes where it came from.
            kept = torch.load(state, weights_only=True, map_location="cpu")
            model.load(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
            schedule.load_state_dict(kept["schedule"])
            average, divergence = [each.to(device) for each in kept["average"]], kept["divergence"]
        else:
            divergence = [_divergence(model, ids[fitted:], final[fitted:])]
        for epoch in range(len(divergence) - 1, epochs):
            order = np.random.default_rng((seed, epoch)).permutation(fitted).tolist()
            for step, sequence in enumerate(order, epoch * fitted):
                loss = model.loss(ids[sequence : sequence + 1], final[sequence : sequence + 1])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                length = torch.nn.utils.clip_grad_norm_(model.parameters(), _LONGEST)
                if length.isfinite():
                    optimizer.step()
                schedule.step()
                if step == first:
                    average = model.state()
                elif step > first:
                    average_with(average, model.parameters(), step - first)
                if progress:
                    progress(step + 1, steps)
            divergence.append(_divergence(model, ids[fitted:], final[fitted:]))
            made = {"model": model.state(), "average": average, "divergence": divergence}
            unfinished = state.with_suffix(".part")
            torch.save(made | {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, unfinished)
            unfinished.rename(state)
        model.load(average)
        found = _divergence(model, ids[fitted:], final[fitted:])
        if found >= divergence[0]:
            model.load(start)
        cross_entropy = model.cross_entropy(token_ids[fitted:])
    return Polished(model.transforms(), model.row_scales(), [*divergence, found], cross_entropy)


def _divergence(model: LowBitModel, ids: Tensor, final: Tensor) -> float:
    """Return how far the model is from the float one; infinity where it is of no use."""
    found = model.divergence(ids, final)
    # Maps that can hardly be inverted would not fold into the float model that is verified.
    return found if math.isfinite(found) and model.is_invertible() else math.inf
