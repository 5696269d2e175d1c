"""A float export as a bundle, so that whatever runs a bundle runs it too."""

from importlib.metadata import version
from math import prod
from pathlib import Path

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.manifest import Manifest
from planish.compiler.checkpoint.first_layers import open_first_layers
from planish.compiler.export.float_model import export_float
from planish.compiler.pipeline.work_folder import WorkFolder, check_output, check_space, clear_errors, code_fingerprint
from planish.compiler.progress import Progress, Silent
from planish.passes.scheme import Scheme

__all__ = ["export_bundle"]


def export_bundle(
    model: str | Path, out: str | Path, *, num_layers: int | None = None, progress: Progress | None = None
) -> Bundle:
    """Export a checkpoint in float32 to a bundle that holds the portable model alone.

    Args:
        model: a checkpoint folder, a GGUF file, a Hub id, or `smollm2`.
        out: the output folder, new or empty.
        num_layers: keep only this many of the first decoder blocks; None keeps all.
        progress: is told how far the run is.

    Raises:
        PlanishError: one of its subclasses in `planish.compiler.errors`.
    """
    out, told = Path(out), progress or Silent()
    check_output(out)
    checkpoint = open_first_layers(model, num_layers)
    checkpoint.check_tokenizer()
    fingerprint = checkpoint.fingerprint()
    settings = {
        "recipe": {"command": "export", "model": str(model), "num_layers": num_layers},
        "checkpoint": fingerprint,
        "code": code_fingerprint(),
    }
    with WorkFolder.hold(out, settings, told) as work, clear_errors(out):
        check_space(work.path, 4 * sum(prod(checkpoint.shape(name)) for name in checkpoint.names()))
        export_float(checkpoint, work.bundle, lambda done, total: told.step("export", done, total))
        scheme = Scheme.parse("w16a16k16v16")
        Manifest(
            planish_version=version("planish"),
            model=checkpoint.name,
            checkpoint=fingerprint,
            scheme=str(scheme),
            lm_head=str(scheme.lm_head),
            targets=(),
            max_context=checkpoint.config.max_context,
        ).write(work.bundle)
        work.publish()
    return Bundle.open(out, verify=False)
