"""Greedy text of many prompts at once, each until it ends or one of its stop texts appears."""

from collections.abc import Callable, Sequence

import numpy as np

from planish.compiler.runtime.language_model import LanguageModel

__all__ = ["generate_greedily"]


def generate_greedily(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    finished: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Return the likeliest tokens behind every prompt; the prompts run together.

    Args:
        model: what writes.
        prompts: their tokens, one or more each.
        max_new_tokens: how many tokens each text has at most.
        finished: is asked after each token of a text, with all its tokens so far, whether it ends with them.
    """
    length = max(map(len, prompts))
    ids = np.zeros((len(prompts), length), np.int64)
    mask = np.zeros_like(ids)
    # Padding stands in front, so that the last position of every row is its prompt's last token.
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    texts: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    logits, cache = model.run(ids, mask=mask, logits_to_keep=1)
    for count in range(1, max_new_tokens + 1):
        for place, row in enumerate(going):
            texts[row].append(int(logits[place, -1].argmax()))
        kept = [place for place, row in enumerate(going) if not finished(texts[row])]
        if not kept or count == max_new_tokens:
            break
        if len(kept) < len(going):
            going, cache = [going[place] for place in kept], cache.take(kept)
        logits, cache = model.run([[texts[row][-1]] for row in going], cache, logits_to_keep=1)
    return texts
