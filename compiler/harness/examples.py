"""Examples of tasks in local files: one JSON object a line, with the fields of the data set that a task reads.

A record is checked against the fields of its task before a model is asked anything.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from planish.compiler.errors import TaskError

__all__ = ["LOCAL_TASKS", "read_examples"]


class _Example(BaseModel):
    """What all tasks have in common: types are not converted, and fields that a task does not read do not count."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Piqa(_Example):
    goal: str
    sol1: str
    sol2: str
    label: Literal[0, 1]


class _Choices(_Example):
    text: Annotated[list[str], Field(min_length=2)]
    label: list[str]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.text) != len(self.label):
            raise ValueError(f"{len(self.text)} texts and {len(self.label)} labels")
        return self


class _WithChoices(_Example):
    choices: _Choices
    # Some data sets have blanks around it, which the harness would not find among the labels.
    answerKey: Annotated[str, AfterValidator(str.strip)]  # noqa: N815  the field is spelled so

    @model_validator(mode="after")
    def _check_answer(self) -> Self:
        if self.answerKey not in self.choices.label:
            raise ValueError(f"'answerKey' is {self.answerKey!r}, and the labels are {self.choices.label}")
        return self


class _Arc(_WithChoices):
    question: str


class _OpenBookQa(_WithChoices):
    question_stem: str


def _one_gap(sentence: str) -> str:
    if "_" not in sentence:
        raise ValueError("there is no gap '_'")
    return sentence


class _Winogrande(_Example):
    sentence: Annotated[str, AfterValidator(_one_gap)]
    option1: str
    option2: str
    answer: Literal["1", "2"]


class _Hellaswag(_Example):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Annotated[list[str], Field(min_length=4, max_length=4)]
    label: Literal["0", "1", "2", "3"]


def _words(text: str) -> str:
    if " " not in text.strip():
        raise ValueError("there is no word in front of the last one")
    return text


class _Lambada(_Example):
    text: Annotated[str, AfterValidator(_words)]


class _BoolQ(_Example):
    passage: str
    question: str
    label: Literal[0, 1]

    @model_validator(mode="before")
    @classmethod
    def _take_answer(cls, record: Any) -> Any:
        """The data set google/boolq spells the label as a boolean `answer`."""
        if isinstance(record, dict) and "label" not in record and isinstance(record.get("answer"), bool):
            return {**record, "label": int(record["answer"])}
        return record


#: Task -> the fields that it reads.
LOCAL_TASKS: dict[str, type[_Example]] = {
    "piqa": _Piqa,
    "hellaswag": _Hellaswag,
    "arc_easy": _Arc,
    "arc_challenge": _Arc,
    "winogrande": _Winogrande,
    "lambada_openai": _Lambada,
    "boolq": _BoolQ,
    "openbookqa": _OpenBookQa,
}


def read_examples(folder: Path, task: str) -> list[dict[str, Any]]:
    """Return the examples of FOLDER/TASK.jsonl, with the fields that the task reads.

    Args:
        folder: holds one file for each task.
        task: one of `LOCAL_TASKS`.

    Raises:
        TaskError: if the file is missing or unreadable, holds no example, or a line is not an example of this task; the
            message names the file and the line.
    """
    path = folder / f"{task}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"The examples of {task} cannot be read: {error}. Put them into {path}, a line each."
        ) from error
    examples = [_read(path, number, line, task) for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise TaskError(
            f"{path} holds no examples. Put one a line, as JSON with the fields of {task}: {_fields(task)}."
        )
    return examples


def _read(path: Path, number: int, line: str, task: str) -> dict[str, Any]:
    try:
        return LOCAL_TASKS[task].model_validate(json.loads(line)).model_dump()
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        found = f"'{field}': {problem['msg']}" if field else problem["msg"]
        raise TaskError(
            f"{path}, line {number} is no example of {task}: {found}. Its fields are {_fields(task)}."
        ) from error
    except ValueError as error:
        raise TaskError(f"{path}, line {number}: not JSON ({error}).") from error


def _fields(task: str) -> str:
    return ", ".join(LOCAL_TASKS[task].model_fields)
