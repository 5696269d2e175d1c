"""Every error of the compiler, each with its own exit code.

0 is success, 1 an unforeseen failure, 2 wrong usage of the command line (set by typer), 130 an interrupt. The other
codes are below; docs/errors.md repeats them for users.
"""

from planish.plugins.errors import PlanishError

__all__ = [
    "AccuracyError",
    "BundleCorruptError",
    "BundleFormatError",
    "CalibrationError",
    "CheckpointError",
    "ComparisonError",
    "DeviceError",
    "DiskFullError",
    "EngineBuildError",
    "EngineLimitError",
    "EngineMismatchError",
    "MissingExtraError",
    "NonFiniteWeightError",
    "NotPlanishModelError",
    "OutputFolderError",
    "PlanError",
    "PlanishError",
    "RecipeError",
    "SelectionError",
    "TaskError",
    "TextError",
    "TokenizerError",
    "UnsupportedModelError",
]


class UnsupportedModelError(PlanishError):
    """The checkpoint is whole but asks for something planish does not implement."""

    exit_code = 3


class AccuracyError(PlanishError):
    """The compiled model does not compute what the oracle computes."""

    exit_code = 4


class MissingExtraError(PlanishError):
    """An optional package is needed and not installed."""

    exit_code = 5


class CheckpointError(PlanishError):
    """A checkpoint file is missing, truncated, or disagrees with config.json."""

    exit_code = 10


class NonFiniteWeightError(CheckpointError):
    """A weight holds NaN or infinity."""

    exit_code = 11


class OutputFolderError(PlanishError):
    """The output folder is not empty, or cannot be written."""

    exit_code = 12


class DiskFullError(OutputFolderError):
    """The disk that holds the output folder is full."""

    exit_code = 13


class TokenizerError(PlanishError):
    """The tokenizer is missing or unreadable, or gives tokens that the model does not have."""

    exit_code = 14


class BundleFormatError(PlanishError):
    """The bundle was written by a newer format than this planish reads, or is not a bundle."""

    exit_code = 15


class BundleCorruptError(PlanishError):
    """A file of the bundle is missing or differs from its recorded hash."""

    exit_code = 16


class NotPlanishModelError(PlanishError):
    """An ONNX file was given that planish did not write."""

    exit_code = 17


class RecipeError(PlanishError):
    """A recipe file is unreadable or asks for something that does not exist."""

    exit_code = 19


class TextError(PlanishError):
    """The text for evaluation is missing, empty, out of reach, or shorter than what was asked for."""

    exit_code = 20


class EngineBuildError(PlanishError):
    """A TensorRT engine could not be built; what was built before is kept."""

    exit_code = 21


class EngineMismatchError(PlanishError):
    """An engine or a plugin library is for another GPU, TensorRT, CUDA or planish than what is here, or missing."""

    exit_code = 22


class CalibrationError(PlanishError):
    """The calibration text cannot be used (missing, too short, of another language), or the model overflows on it."""

    exit_code = 24


class SelectionError(PlanishError):
    """A selection policy that cannot be read, or one that no choice of transforms or channels fulfils."""

    exit_code = 25


class PlanError(PlanishError):
    """A plan is unreadable, contradicts itself, or belongs to another model."""

    exit_code = 26


class DeviceError(PlanishError):
    """A device to learn or run on does not exist, cannot be used, fails, or has too little memory."""

    exit_code = 28


class EngineLimitError(PlanishError):
    """An engine is given more sequences, or longer ones, than it was built for."""

    exit_code = 33


class TaskError(PlanishError):
    """A task does not exist, its examples cannot be read or are not what it needs, or it asks for what is not done."""

    exit_code = 30


class ComparisonError(PlanishError):
    """Models that cannot be compared: their tokenizers or logits differ, or the float model is not the bundle's."""

    exit_code = 31
