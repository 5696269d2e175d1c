"""How likely a model finds continuations of contexts: a context runs once, whatever follows it.

The continuations of a context start from copies of its keys and values. Its last token is held back and runs with each
continuation, because its logits are those of the continuation's first token.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from planish.compiler.errors import TaskError
from planish.compiler.runtime.language_model import LanguageModel, Limits

__all__ = ["Answer", "Request", "answer_all", "fit_context"]

#: Tokens of contexts, and positions that get logits, in one run: 1024 positions of 128k tokens take 512 MiB.
_CONTEXT_TOKENS, _POSITIONS = 4096, 1024
#: Tokens in one run of continuations of the same context, which counts for each: every one has a copy of its cache.
_COPIED_TOKENS = 4 * _CONTEXT_TOKENS

#: Told the answers of each batch, as they come.
Told = Callable[[dict["Request", "Answer"]], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        context: tokens that are given, one or more.
        continuation: tokens behind them, one or more.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model says.

    Attributes:
        loglikelihood: log p(continuation | context), natural log.
        greedy: whether every token of the continuation is the likeliest one where it stands.
    """

    loglikelihood: float
    greedy: bool


def fit_context(context: Sequence[int], continuation: Sequence[int], max_context: int) -> Request:
    """Return the request, its context cut from the left so that the model sees all tokens but the last.

    lm-evaluation-harness cuts in the same way.

    Raises:
        TaskError: if the continuation is empty, or too long by itself.
    """
    if not 0 < len(continuation) <= max_context:
        raise TaskError(
            f"A continuation of {len(continuation)} tokens cannot be scored by a model that sees {max_context}."
        )
    tokens = tuple(context) + tuple(continuation)
    return Request(tokens[-max_context - 1 : -len(continuation)], tuple(continuation))


def answer_all(model: LanguageModel, requests: Sequence[Request], told: Told) -> None:
    """Answer every request, in batches of similar length, the longest first.

    Args:
        model: what to ask.
        requests: may repeat themselves; equal ones are answered once.
        told: gets the answers of each batch.
    """
    for batch in _batches(_group(requests), model.limits):
        told(_run(model, batch))


@dataclasses.dataclass
class _Group:
    """The requests of one context.

    Attributes:
        context: their tokens.
        by_input: what runs behind the context, the last token of each continuation left out -> continuations.
    """

    context: tuple[int, ...]
    by_input: dict[tuple[int, ...], list[tuple[int, ...]]]

    @property
    def positions(self) -> int:
        """The most positions that a row of this group has behind its context, the context's last token included."""
        return 1 + max(map(len, self.by_input))


def _group(requests: Sequence[Request]) -> list[_Group]:
    groups: dict[tuple[int, ...], _Group] = {}
    for request in dict.fromkeys(requests):
        group = groups.setdefault(request.context, _Group(request.context, {}))
        group.by_input.setdefault(request.continuation[:-1], []).append(request.continuation)
    parts = [part for group in groups.values() for part in _parts(group)]
    return sorted(parts, key=lambda group: (-len(group.context), -group.positions))


def _parts(group: _Group) -> Iterator[_Group]:
    """Yield the requests of a context in parts that fit into memory, the longest first."""
    inputs = sorted(group.by_input, key=len, reverse=True)
    while inputs:
        positions = 1 + len(inputs[0])
        most = max(1, min(_POSITIONS // positions, _COPIED_TOKENS // (len(group.context) + positions)))
        yield _Group(group.context, {each: group.by_input[each] for each in inputs[:most]})
        inputs = inputs[most:]


def _batches(groups: list[_Group], limits: Limits) -> Iterator[list[_Group]]:
    """Yield neighbours that fit into one run; a group that is too large by itself is one alone."""
    batch: list[_Group] = []
    rows = positions = 0
    for group in groups:
        rows += len(group.by_input)
        positions = max(positions, group.positions)
        if batch and (
            rows * positions > _POSITIONS
            or len(batch[0].context) * (len(batch) + 1) > _CONTEXT_TOKENS
            or rows > (limits.sequences or rows)
            or len(batch[0].context) - 1 + positions > (limits.context or math.inf)
        ):
            yield batch
            batch, rows, positions = [], len(group.by_input), group.positions
        batch.append(group)
    if batch:
        yield batch


def _run(model: LanguageModel, groups: list[_Group]) -> dict[Request, Answer]:
    owners, rows = [], []
    for number, group in enumerate(groups):
        for tokens in group.by_input:
            owners.append(number)
            rows.append((group.context[-1], *tokens))
    cache = None
    if len(groups[0].context) > 1:
        ids, mask = _padded([group.context[:-1] for group in groups])
        _, cache = model.run(ids, mask=mask, logits_to_keep=1)
    wanted = [groups[owner].by_input[row[1:]] for owner, row in zip(owners, rows, strict=True)]
    sums = []
    # Only the continuations of one context can be more than the model takes at once.
    step = model.limits.sequences or len(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        sums += _sums(model, cache.take(owners[part]) if cache else None, rows[part], wanted[part])
    return {
        Request(groups[owner].context, continuation): Answer(total, greedy)
        for owner, of_row in zip(owners, sums, strict=True)
        for continuation, (total, greedy) in of_row.items()
    }


def _sums(
    model: LanguageModel,
    cache: object,
    rows: list[tuple[int, ...]],
    wanted: list[list[tuple[int, ...]]],
) -> list[dict[tuple[int, ...], tuple[float, bool]]]:
    """Run `rows` behind their contexts; return for each the log-likelihood of its continuations, and if it is greedy.

    The continuations of a row differ in their last token only.
    """
    ids, mask = _padded(rows)
    found: list[dict[tuple[int, ...], tuple[float, bool]]] = [dict.fromkeys(each, (0.0, True)) for each in wanted]
    step = max(1, _POSITIONS // len(rows))
    for start in range(0, ids.shape[1], step):
        columns = slice(start, start + step)
        logits, cache = model.run(ids[:, columns], cache, mask=mask[:, columns])
        for row, answers in enumerate(found):
            for continuation in answers:
                targets = np.asarray(continuation[start : start + step])
                if len(targets):
                    total, greedy = answers[continuation]
                    more, all_first = _score(logits[row, : len(targets)], targets)
                    answers[continuation] = total + more, greedy and all_first
    return found


def _score(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]) -> tuple[float, bool]:
    """Return the summed log-probabilities of `targets`, and whether each has the largest logit."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    chosen = rows[np.arange(len(targets)), targets]
    total = chosen - np.log(np.exp(rows).sum(axis=1))
    return float(total.sum()), bool((rows.argmax(axis=1) == targets).all())


def _padded(rows: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return tokens and mask, int64 [rows, longest], padded behind the tokens."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask
