"""What the building process is told, and what it answers: JSON, one message to a line."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from planish.compiler.backends.tensorrt.engine_json import InputRecord, OutputRecord

__all__ = ["Built", "Failed", "Job", "Log", "Message", "Progressed"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Job(_Part):
    """One engine to build.

    Attributes:
        flavour: 'rtx' or 'tensorrt'.
        model: path of the lowered ONNX model.
        engine: path to write.
        sms: compute capabilities times ten; empty for the GPU at hand.
        max_batch: sequences at most.
        max_prompt: new tokens of a call at most.
        plugins: path of the plugin library to load; None if the model has no plugins.
        timing_cache: path of what earlier builds measured, read if it is there and written; None is none.
    """

    flavour: str
    model: str
    engine: str
    sms: tuple[int, ...]
    max_batch: int
    max_prompt: int
    plugins: str | None = None
    timing_cache: str | None = None


class Progressed(_Part):
    """The build is `percent` done."""

    kind: Literal["progress"] = "progress"
    percent: int


class Log(_Part):
    """A line of TensorRT's log, severity WARNING or worse."""

    kind: Literal["log"] = "log"
    text: str


class Failed(_Part):
    """The build is given up; `text` says why."""

    kind: Literal["failed"] = "failed"
    text: str


class Built(_Part):
    """The engine is written."""

    kind: Literal["built"] = "built"
    version: str
    sms: tuple[int, ...]
    inputs: dict[str, InputRecord]
    outputs: dict[str, OutputRecord]
    seconds: float


class Message(BaseModel):
    """Any answer."""

    message: Progressed | Log | Failed | Built
