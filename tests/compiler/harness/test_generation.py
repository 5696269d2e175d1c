"""Prompts written together give what transformers writes for each alone."""

import numpy as np
import torch
from transformers import LlamaForCausalLM

from planish.compiler.harness.generation import generate_greedily
from planish.compiler.measure.subject import Subject


def test_greedy_text_is_that_of_transformers(subject: Subject, theirs: LlamaForCausalLM) -> None:
    random = np.random.default_rng(1)
    prompts = [random.integers(3, 260, count).tolist() for count in (3, 12, 1, 7)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        written = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=[]
        )
        expected.append(written[0, len(prompt) :].tolist())
    assert generate_greedily(subject.model, prompts, 9, lambda _: False) == expected

    # Texts that end leave the batch, and the others go on as before.
    lengths = iter([2, 9, 1, 5])
    ends = {tuple(text[:length]) for text, length in zip(expected, lengths, strict=True)}
    found = generate_greedily(subject.model, prompts, 9, lambda text: tuple(text) in ends)
    assert found == [text[:length] for text, length in zip(expected, (2, 9, 1, 5), strict=True)]
