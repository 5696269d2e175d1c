"""What an engine is fed besides its cache, in both forms that engines have.

Engines without plugins for the cache know slots: padding takes one, a mask says which slots are real. The plugins know
lengths: real tokens of a sequence stand one behind the other, and padding behind those of a call.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

__all__ = ["Call", "call_by_lengths", "call_by_slots"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Call:
    """One run of an engine.

    Attributes:
        feeds: name of the input -> integers.
        keep: how many of the last positions need logits; one at least, because 0 asks for all.
        columns: int64 [batch, wanted], which of the kept positions has the logits of each token that is asked for; -1
            marks padding that has none.
    """

    feeds: dict[str, Ints]
    keep: int
    columns: Ints

    def pick(self, logits: Floats) -> Floats:
        """Return the wanted of the kept logits, float32 [batch, wanted, vocab]; 0 where there are none."""
        if self.columns.shape[1] == logits.shape[1] and (self.columns == np.arange(logits.shape[1])).all():
            return logits
        rows = np.arange(len(logits))[:, None]
        return np.where((self.columns >= 0)[..., None], logits[rows, self.columns], np.float32(0))


def call_by_slots(ids: Ints, seen: Ints, context: int, wanted: int) -> Call:
    """Return the call of an engine whose inputs are attention_mask and write_indices.

    Args:
        ids: int64 [batch, tokens], the new tokens.
        seen: int64 [batch, past + tokens], 1 for real tokens.
        context: slots of the cache.
        wanted: how many of the last positions are asked for.
    """
    batch, tokens = ids.shape
    past = seen.shape[1] - tokens
    mask = np.zeros((batch, context), np.int64)
    mask[:, : seen.shape[1]] = seen
    feeds = {
        "input_ids": ids,
        "attention_mask": mask,
        "write_indices": np.full(batch, past, np.int64),
        "position_ids": np.maximum(seen.cumsum(axis=1) - 1, 0)[:, past:],
    }
    keep = max(wanted, 1)
    return Call(feeds, keep, np.tile(np.arange(keep - wanted, keep), (batch, 1)))


def call_by_lengths(ids: Ints, seen: Ints, wanted: int) -> Call:
    """Return the call of an engine whose inputs are past_lengths and new_lengths; see `call_by_slots`."""
    tokens = ids.shape[1]
    past, real = seen[:, :-tokens].sum(axis=1), seen[:, -tokens:]
    counts = real.sum(axis=1)
    width = max(int(counts.max()), 1)
    steps = np.arange(width)
    # Real tokens first, in their order.
    order = np.argsort(1 - real, axis=1, kind="stable")[:, :width]
    feeds = {
        "input_ids": np.take_along_axis(ids, order, axis=1),
        "past_lengths": past,
        "new_lengths": counts,
        # Padding may stand where the model has no position any more.
        "position_ids": np.where(steps < counts[:, None], past[:, None] + steps, 0),
    }
    places = np.where(real == 1, real.cumsum(axis=1) - 1, -1)[:, tokens - wanted :]
    first = int(np.where(places >= 0, places, width - 1).min(initial=width - 1))
    return Call(feeds, width - first, np.where(places >= 0, places - first, -1))
