"""Files of examples are read as the harness reads them from the Hub; what is wrong is named by file and line."""

from pathlib import Path
from typing import Any

import pytest

from planish.compiler.errors import TaskError
from planish.compiler.harness.examples import LOCAL_TASKS, read_examples
from tests.task_examples import CHOICES, EXAMPLES, Write


@pytest.mark.parametrize("task", LOCAL_TASKS)
def test_fields_that_tasks_read_are_kept(write: Write, task: str) -> None:
    found = read_examples(write(task, *EXAMPLES[task], ""), task)
    assert len(found) == len(EXAMPLES[task])
    read = set(LOCAL_TASKS[task].model_fields) - ({"label"} if task == "boolq" else set())
    for ours, given in zip(found, EXAMPLES[task], strict=True):
        assert {name: ours[name] for name in read} == {name: given[name] for name in read}


def test_blanks_around_a_key_do_not_count(write: Write) -> None:
    (example,) = read_examples(write("arc_easy", {**ARC, "answerKey": "B "}), "arc_easy")
    assert example["answerKey"] == "B"


def test_boolq_takes_either_spelling_of_its_label(write: Write) -> None:
    either = {"passage": "p", "question": "q"}
    found = read_examples(write("boolq", {**either, "answer": True}, {**either, "label": 0}), "boolq")
    assert [example["label"] for example in found] == [1, 0]


GOOD = EXAMPLES["piqa"][0]
ARC = EXAMPLES["arc_easy"][0]


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("piqa", '{"goal": ', "not JSON"),
        ("piqa", '["goal"]', "no example of piqa"),
        ("piqa", {**GOOD, "label": 2}, "'label': Input should be 0 or 1"),
        ("piqa", {**GOOD, "goal": 3}, "'goal': Input should be a valid string"),
        ("piqa", EXAMPLES["winogrande"][0], "'goal': Field required.*Its fields are goal, sol1, sol2, label"),
        ("arc_easy", {**ARC, "answerKey": "E"}, "'answerKey' is 'E', and the labels are"),
        ("arc_easy", {**ARC, "choices": {**CHOICES, "label": ["A"]}}, "'choices': .*4 texts and 1 labels"),
        ("winogrande", {**EXAMPLES["winogrande"][0], "sentence": "no gap"}, "'sentence': .*there is no gap"),
        ("hellaswag", {**EXAMPLES["hellaswag"][0], "label": "4"}, "'label'"),
        ("lambada_openai", {"text": "word"}, "'text': .*no word in front"),
        ("boolq", {"passage": "p", "question": "q", "answer": "yes"}, "'label': Field required"),
    ],
)
def test_wrong_lines_are_named(write: Write, task: str, line: Any, message: str) -> None:
    folder = write(task, EXAMPLES[task][0], "", line)
    with pytest.raises(TaskError, match=f"{task}.jsonl, line 3.*{message}"):
        read_examples(folder, task)


def test_no_examples(write: Write, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"piqa\.jsonl holds no examples"):
        read_examples(write("piqa", "", ""), "piqa")
    with pytest.raises(TaskError, match="examples of piqa cannot be read"):
        read_examples(tmp_path, "piqa")
