"""A model as lm-evaluation-harness asks it: text in, log-likelihoods and text out.

What is done to the text is what the harness's own backend for transformers does: where a context ends and its
continuation begins, which special tokens are added, what is cut off when it is too long.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from planish.compiler.errors import TaskError
from planish.compiler.harness.answers import Answers
from planish.compiler.harness.generation import generate_greedily
from planish.compiler.harness.scoring import Answer, Request, answer_all, fit_context
from planish.compiler.measure.subject import Subject
from planish.compiler.progress import Progress

__all__ = ["HarnessModel"]

#: Texts that are written at the same time.
_TEXTS = 16
#: New tokens of a text where the task names no number: as many as the backend for transformers takes.
_NEW_TOKENS = 256


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A `Subject`, for lm_eval.evaluator.evaluate; its answers are kept as they come.

    Example:
        >>> model = HarnessModel(open_subject("out/model"), answers, progress)  # doctest: +SKIP
        >>> lm_eval.simple_evaluate(model, tasks=["piqa"], limit=10)  # doctest: +SKIP
    """

    def __init__(self, subject: Subject, answers: Answers, progress: Progress) -> None:
        """Ask `subject`, unless `answers` knows what it says; `progress` is told how many requests are answered."""
        super().__init__()
        self._subject, self._answers, self._progress = subject, answers, progress
        # With linear rope scaling a model sees more, and the backend for transformers still cuts there.
        self._longest = min(subject.max_context, subject.origin.config.max_position_embeddings)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = self._subject.tokenizer.special_token("eos_token")
        return self._subject.eos[0] if end is None and self._subject.eos else end or 0

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return self._subject.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; special ones are added as the tokenizer does, unless the text has BOS itself."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._subject.tokenizer.token(self.prefix_token_id))
        return self._subject.tokenizer.encode(string, special=add_special_tokens)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, every token predicted once, in windows of the context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(*request.args)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self._longest, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += loglikelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy text behind each context, up to the first of its stop texts.

        Raises:
            TaskError: if a task asks for text that is drawn at random.
        """
        texts = [self._answers.get(_generation_key(*request.args)) for request in requests]
        # Prompts of similar length run together, those of one batch with the same settings.
        missing = sorted(
            (number for number, text in enumerate(texts) if text is None),
            key=lambda number: (json.dumps(requests[number].args[1], sort_keys=True), -len(requests[number].args[0])),
        )
        most = min(_TEXTS, self._subject.model.limits.sequences or _TEXTS)
        while missing:
            options = requests[missing[0]].args[1]
            batch = [number for number in missing[:most] if requests[number].args[1] == options]
            missing = missing[len(batch) :]
            written = self._generate([requests[number].args[0] for number in batch], options)
            self._answers.keep(
                {_generation_key(*requests[n].args): text for n, text in zip(batch, written, strict=True)}
            )
            self._progress.step("generate", len(requests) - len(missing), len(requests))
        return [self._answers.get(_generation_key(*request.args)) for request in requests]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        limit = self._longest
        asked = [fit_context(context, continuation, limit) for _, context, continuation in requests]
        missing = [each for each in dict.fromkeys(asked) if self._answers.get(_key(each)) is None]
        done, total = len(set(asked)) - len(missing), len(set(asked))
        if done:
            self._progress.say(f"{done} of {total} requests were answered before")

        def keep(found: dict[Request, Answer]) -> None:
            nonlocal done
            self._answers.keep({_key(each): [answer.loglikelihood, answer.greedy] for each, answer in found.items()})
            done += len(found)
            self._progress.step("answer", done, total)

        answer_all(self._subject.model, missing, keep)
        return [tuple(self._answers.get(_key(each))) for each in asked]

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        settings = normalize_gen_kwargs(options, _NEW_TOKENS)
        if settings["do_sample"]:
            raise TaskError(f"Text drawn at random is not evaluated, and the task asks for it: {options}.")
        room = settings["max_gen_toks"]
        tokenizer, subject = self._subject.tokenizer, self._subject
        if room >= self._longest:
            raise TaskError(f"{room} new tokens leave no room for a context: the model sees {self._longest}.")
        stops = handle_stop_sequences(settings["until"], tokenizer.token(self.eot_token_id))
        prompts = [self.tok_encode(context)[room - self._longest :] or [self.prefix_token_id] for context in contexts]
        ends = {*subject.eos, self.eot_token_id}
        # A stop text may be a special token, which the text that is returned does not show.
        finished = _ends_with(ends, stops, functools.partial(tokenizer.decode, special=True))
        return [
            postprocess_generated_text(tokenizer.decode(tokens), stops, None)
            for tokens in generate_greedily(subject.model, prompts, room, finished)
        ]


def _ends_with(ends: set[int], stops: list[str], decode: Callable[[list[int]], str]) -> Callable[[list[int]], bool]:
    def finished(tokens: list[int]) -> bool:
        return tokens[-1] in ends or any(stop in decode(tokens) for stop in stops if stop)

    return finished


def _key(request: Request) -> str:
    return json.dumps(["loglikelihood", request.context, request.continuation])


def _generation_key(context: str, options: dict[str, Any]) -> str:
    return json.dumps(["generate", context, options], sort_keys=True)
