"""Greedy tokens are those of transformers; sampling keeps to its rules; generation ends where it must."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.errors import TextError
from planish.compiler.runtime.generate import Sampling, generate

PROMPT = [10, 200, 31, 77, 5, 140]


def greedy(bundle: Bundle, prompt: Sequence[int] = PROMPT, **options: object) -> list[int]:
    settings = {"max_new_tokens": 64, "max_context": 256, **options}
    return list(generate(bundle.session(threads=1), prompt, **settings))


def test_64_greedy_tokens_are_those_of_transformers(float_bundle: Bundle, tiny: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, eos_token_id=None
        )
    assert greedy(float_bundle) == made[0, len(PROMPT) :].tolist()


def test_chunked_prefill_gives_the_same_tokens(float_bundle: Bundle) -> None:
    assert greedy(float_bundle, chunk=4) == greedy(float_bundle)


def test_ends_before_an_end_token(float_bundle: Bundle) -> None:
    tokens = greedy(float_bundle)
    end = tokens[20]
    assert greedy(float_bundle, eos=(end,)) == tokens[: tokens.index(end)]


def test_ends_when_the_context_is_full(float_bundle: Bundle) -> None:
    tokens = greedy(float_bundle, max_context=len(PROMPT) + 9)
    assert tokens == greedy(float_bundle)[:9]


def test_refuses_prompts_without_room_for_an_answer(float_bundle: Bundle) -> None:
    with pytest.raises(TextError, match="6 tokens and the model sees 6"):
        greedy(float_bundle, max_context=len(PROMPT))
    with pytest.raises(TextError, match="no tokens"):
        greedy(float_bundle, prompt=[])


def test_a_seed_repeats_and_another_differs(float_bundle: Bundle) -> None:
    first, again, other = (greedy(float_bundle, sampling=Sampling(1.5, 1.0, seed)) for seed in (7, 7, 8))
    assert first == again != other


def test_draws_follow_temperature_and_top_p() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(probabilities).astype(np.float32)
    random = np.random.default_rng(0)

    def frequencies(sampling: Sampling) -> np.ndarray:
        draws = [sampling.choose(logits, random) for _ in range(4000)]
        return np.bincount(draws, minlength=4) / len(draws)

    np.testing.assert_allclose(frequencies(Sampling(1.0)), probabilities, atol=0.03)
    squared = probabilities**2 / (probabilities**2).sum()
    np.testing.assert_allclose(frequencies(Sampling(0.5)), squared, atol=0.03)
    # 0.5 alone does not reach 0.6; 0.5 + 0.3 does.
    np.testing.assert_allclose(frequencies(Sampling(1.0, 0.6)), [0.625, 0.375, 0, 0], atol=0.03)
    assert frequencies(Sampling(1.0, 0.4)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(("temperature", "top_p"), [(-1, 1), (1, 0), (1, 1.5)])
def test_impossible_sampling_is_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        Sampling(temperature, top_p)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_of_nothing(float_bundle: Bundle, chunk: int) -> None:
    with pytest.raises(ValueError, match="chunk must be 1 or more"):
        greedy(float_bundle, chunk=chunk)
