"""Log-likelihoods are those of whole sequences in transformers, however requests are batched; contexts run once."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.errors import TaskError
from planish.compiler.harness import scoring
from planish.compiler.harness.scoring import Answer, Request, answer_all, fit_context
from planish.compiler.measure.subject import Subject

RANDOM = np.random.default_rng(0)


def tokens(count: int) -> tuple[int, ...]:
    return tuple(RANDOM.integers(3, 260, count).tolist())


LONG, SHORT = tokens(20), tokens(7)
START = tokens(6)
REQUESTS = [
    Request(LONG, tokens(4)),
    Request(SHORT, tokens(9)),
    Request(LONG, tokens(30)),
    # Equal but for the last token; and twice the same.
    Request(SHORT, (*START, 11)),
    Request(SHORT, (*START, 12)),
    Request(SHORT, (*START, 12)),
    Request(LONG, (5,)),
    Request(LONG, (6,)),
    # A context of one token has no prefix to run first.
    Request((0,), tokens(12)),
    Request((0,), (9,)),
    Request(tokens(11), tokens(2)),
]


def whole(model: LlamaForCausalLM, request: Request) -> Answer:
    """The definition, on the whole sequence at once."""
    ids = torch.tensor([[*request.context, *request.continuation]])
    with torch.no_grad():
        rows = model(ids).logits[0, len(request.context) - 1 : -1].double().log_softmax(-1)
    wanted = torch.tensor(request.continuation)
    return Answer(float(rows.gather(1, wanted[:, None]).sum()), bool((rows.argmax(1) == wanted).all()))


def greedy(model: LlamaForCausalLM, context: tuple[int, ...], count: int) -> Request:
    ids = torch.tensor([context])
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return Request(context, tuple(ids[0, len(context) :].tolist()))


def answers_of(model: Any, requests: list[Request]) -> dict[Request, Answer]:
    found: dict[Request, Answer] = {}
    answer_all(model, requests, found.update)
    return found


@pytest.mark.parametrize(("contexts", "positions"), [(4096, 1024), (30, 12), (1, 1)])
def test_answers_are_those_of_whole_sequences(
    subject: Subject, theirs: LlamaForCausalLM, contexts: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_CONTEXT_TOKENS", contexts)
    monkeypatch.setattr(scoring, "_POSITIONS", positions)
    # Two continuations are greedy; the third only in its second token.
    late = greedy(theirs, (*LONG, 9), 1)
    requests = [*REQUESTS, greedy(theirs, LONG, 3), greedy(theirs, (7,), 5), Request(LONG, (9, *late.continuation))]
    found = answers_of(subject.model, requests)
    assert set(found) == set(requests)
    for request in requests:
        expected = whole(theirs, request)
        assert found[request].loglikelihood == pytest.approx(expected.loglikelihood, abs=2e-4)
        assert found[request].greedy == expected.greedy
    assert sum(answer.greedy for answer in found.values()) == 2


def test_low_bit_models_answer_alike_in_batches_and_alone(bundle: Bundle) -> None:
    model = bundle.session(threads=1)
    together = answers_of(model, REQUESTS)
    for request in REQUESTS:
        (alone,) = answers_of(model, [request]).values()
        # A value between two codes may be rounded either way.
        assert together[request].loglikelihood == pytest.approx(alone.loglikelihood, abs=0.02)


class Counting:
    """Counts the tokens that a model runs, padding left out."""

    def __init__(self, model: Any) -> None:
        self._model, self.real, self.limits = model, 0, model.limits

    def run(self, input_ids: Any, cache: Any = None, *, mask: Any = None, logits_to_keep: int = 0) -> Any:
        self.real += int(np.sum(mask))
        return self._model.run(input_ids, cache, mask=mask, logits_to_keep=logits_to_keep)


def test_a_context_runs_once(of_bundle: Subject) -> None:
    counting = Counting(of_bundle.model)
    answers_of(counting, [Request(LONG, tokens(4)), Request(LONG, tokens(5)), Request(LONG, (3,)), Request(LONG, (4,))])
    # The context but for its last token; then that token and all but the last of each continuation; the two
    # continuations of one token share their run.
    assert counting.real == 19 + 4 + 5 + 1


class Sizes:
    """Notes how many tokens every run sees, cached ones included, and how many positions get logits."""

    def __init__(self, model: Any) -> None:
        self._model, self.limits = model, model.limits
        self.tokens: list[int] = []
        self.positions: list[int] = []

    def run(self, ids: Any, cache: Any = None, **options: Any) -> Any:
        logits, after = self._model.run(ids, cache, **options)
        self.positions.append(logits.shape[0] * logits.shape[1])
        self.tokens.append(math.prod(after.mask.shape))
        return logits, after


def test_many_continuations_of_one_context_fit_into_memory(
    of_checkpoint: Subject, theirs: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_POSITIONS", 64)
    monkeypatch.setattr(scoring, "_COPIED_TOKENS", 128)
    model = Sizes(of_checkpoint.model)
    # As where the context is nothing, of which BOS remains.
    requests = [Request((0,), tokens(1 + number % 30)) for number in range(100)]
    parts: list[int] = []
    found: dict[Request, Answer] = {}

    def told(answers: dict[Request, Answer]) -> None:
        parts.append(len(answers))
        found.update(answers)

    answer_all(model, requests, told)
    assert max(model.positions) <= 64
    assert max(model.tokens) <= 128
    assert len(parts) > 10
    for request in requests[:40]:
        assert found[request].loglikelihood == pytest.approx(whole(theirs, request).loglikelihood, abs=1e-3)


def test_batches_come_longest_first(of_bundle: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_CONTEXT_TOKENS", 1)
    batches: list[list[Request]] = []
    answer_all(of_bundle.model, REQUESTS, lambda found: batches.append(list(found)))
    assert [len(batch[0].context) for batch in batches] == [20, 11, 7, 1]


def test_a_long_context_is_cut_from_the_left() -> None:
    assert fit_context([1, 2, 3, 4], [5, 6], 5) == Request((1, 2, 3, 4), (5, 6))
    # As in lm-evaluation-harness, the model need not see the last token.
    assert fit_context([1, 2, 3, 4], [5, 6], 4) == Request((2, 3, 4), (5, 6))
    assert fit_context([1, 2, 3, 4], [5, 6], 2) == Request((4,), (5, 6))


@pytest.mark.parametrize("continuation", [[], [1, 2, 3]])
def test_continuations_that_cannot_be_scored(continuation: list[int]) -> None:
    with pytest.raises(TaskError, match=f"continuation of {len(continuation)} tokens"):
        fit_context([1], continuation, 2)
