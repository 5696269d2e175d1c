"""Examples of every task that reads local files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CHOICES", "EXAMPLES", "Write"]

#: Writes the lines of a task's file, examples or plain text, and returns the folder.
Write = Callable[..., Path]

CHOICES = {"text": ["a hen", "the tin man", "an inn", "her otter"], "label": ["A", "B", "C", "D"]}

#: Task -> its examples, with the fields of its data set on the Hub.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {
            "goal": f"Keep the hen number {i} in",
            "sol1": "shut the door" * (i + 1),
            "sol2": "shut the inn",
            "label": i % 2,
        }
        for i in range(5)
    ],
    "hellaswag": [
        {
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "endings": [
                "is using wrap.",
                "is ripping tiles [step] off.",
                "holds a cube.",
                "starts pulling up roofing.",
            ],
            "label": "3",
        }
    ],
    "arc_easy": [{"id": "1", "question": "Who ran in?", "choices": CHOICES, "answerKey": "B"}],
    "arc_challenge": [{"id": "2", "question": "Who ran out?", "choices": CHOICES, "answerKey": "D"}],
    "winogrande": [
        {"sentence": "The hen saw the otter, so the _ ran.", "option1": "hen", "option2": "otter", "answer": "2"}
    ],
    "lambada_openai": [{"text": "the hen and the tin man's otter ran in"}],
    "boolq": [{"passage": "An otter is no hen.", "question": "is an otter a hen", "answer": False}],
    "openbookqa": [{"id": "3", "question_stem": "What swims is", "choices": CHOICES, "answerKey": "D"}],
}
