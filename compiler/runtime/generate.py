"""Generate tokens: greedy, or sampled by temperature and top-p."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from planish.compiler.errors import TextError
from planish.compiler.runtime.language_model import LanguageModel

__all__ = ["GREEDY", "Sampling", "generate"]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above 0 the logits are divided by it and a token is drawn.
        top_p: draw only from the likeliest tokens whose probabilities reach this sum, in (0, 1].
        seed: of the draws; None differs from run to run.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    def choose(self, logits: npt.NDArray[np.float32], random: np.random.Generator) -> int:
        """Return the next token, given its logits, float32 [vocab]."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        # A token stays if those likelier than it do not reach top_p by themselves; so the first always stays.
        before = probabilities[order].cumsum() - probabilities[order]
        kept = order[before < self.top_p]
        return int(random.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))


#: The likeliest token, always.
GREEDY = Sampling()


def generate(
    session: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    max_context: int,
    eos: Sequence[int] = (),
    sampling: Sampling = GREEDY,
    chunk: int | None = None,
) -> Iterator[int]:
    """Yield new tokens until one of `eos` (which is not yielded), `max_new_tokens`, or the context is full.

    Args:
        session: the model.
        prompt: the tokens to continue; at least one.
        max_new_tokens: how many tokens to yield at most.
        max_context: how many tokens the model can see, prompt included.
        eos: tokens that end the text.
        sampling: how a token is chosen.
        chunk: prefill this many tokens at a time, which bounds memory for long prompts; None takes all at once.

    Raises:
        TextError: if the prompt is empty or fills the whole context.
        ValueError: if `chunk` is less than 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be 1 or more, not {chunk}")
    if not prompt:
        raise TextError("The prompt has no tokens. Give it some text.")
    if len(prompt) >= max_context:
        raise TextError(
            f"The prompt has {len(prompt)} tokens and the model sees {max_context}, so there is no room for an answer. "
            "Shorten the prompt."
        )
    random = np.random.default_rng(sampling.seed)
    step, cache = chunk or len(prompt), None
    for start in range(0, len(prompt), step):
        logits, cache = session.run([prompt[start : start + step]], cache, logits_to_keep=1)
    # The last token of a full context can still be yielded: only what follows it has no place.
    for count in range(1, min(max_new_tokens, max_context - len(prompt)) + 1):
        token = sampling.choose(logits[0, -1], random)
        if token in eos:
            return
        yield token
        if count < max_new_tokens:
            logits, cache = session.run([[token]], cache, logits_to_keep=1)
