"""Export a checkpoint as a float32 ONNX model that plain ONNX Runtime runs."""

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from planish.compiler.bundle.layout import MODEL_FILE
from planish.compiler.checkpoint import Checkpoint
from planish.compiler.export.decoder import build_decoder
from planish.compiler.export.streaming import CheckpointTensor

__all__ = ["export_float", "float_model", "save_model"]

#: (tensors written, tensors in all) -> None
Progress = Callable[[int, int], None]


def float_model(checkpoint: Checkpoint) -> ir.Model:
    """Return the float32 graph of a checkpoint, its weights still on disk.

    Example:
        >>> model = float_model(open_checkpoint("smollm2"))
        >>> model.graph.inputs[0].name
        'input_ids'
    """

    def weight(name: str, transpose: bool) -> ir.TensorProtocol:
        return CheckpointTensor(checkpoint, name, transpose=transpose)

    return build_decoder(checkpoint.config, weight)


def save_model(model: ir.Model, folder: Path, progress: Progress | None = None, *, workers: int = 1) -> Path:
    """Write model.onnx and model.onnx.data into `folder`, streaming one tensor at a time; return the model's path.

    Large tensors are aligned to pages, so that they can be memory-mapped. More than one worker overlaps reading,
    converting and writing; the model's tensors must then not share what they read from (onnx_ir loads an
    ExternalTensor once, and not from two threads).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL_FILE
    callback = (lambda _, info: progress(info.index + 1, info.total)) if progress else None
    ir.save(model, path, external_data=f"{MODEL_FILE}.data", callback=callback, alignment=4096, max_workers=workers)
    return path


def export_float(checkpoint: Checkpoint, folder: Path, progress: Progress | None = None) -> Path:
    """Write the float32 model of `checkpoint`, its config and tokenizer into `folder`; return the model's path."""
    checkpoint.check_tokenizer()
    path = save_model(float_model(checkpoint), folder, progress, workers=2)
    checkpoint.write_sidecars(folder)
    return path
