"""Build the TensorRT engine of a planish model."""

import dataclasses
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import onnx_ir as ir

from planish.compiler.backends.tensorrt.device import first_device
from planish.compiler.backends.tensorrt.engine_json import (
    ENGINE_FILE,
    ENGINE_FORMAT,
    ENGINE_JSON,
    EngineRecord,
    PluginsRecord,
    record_file,
)
from planish.compiler.backends.tensorrt.fallbacks import fallbacks
from planish.compiler.backends.tensorrt.flavour import flavour_of
from planish.compiler.backends.tensorrt.job import Job
from planish.compiler.backends.tensorrt.lowering import Plugged, lower_to_tensorrt, plug
from planish.compiler.backends.tensorrt.plugin_library import check_library, library_path, read_library
from planish.compiler.backends.tensorrt.plugin_registry import plugin_nodes
from planish.compiler.backends.tensorrt.process import run_job
from planish.compiler.backends.tensorrt.timings import timing_cache
from planish.compiler.export.float_model import save_model
from planish.compiler.progress import Progress, Silent
from planish.plugins.tensorrt.build import LIBRARY

__all__ = ["DEFAULT_SMS", "EngineBuild", "build_engines"]

#: TensorRT-RTX 1.7 cannot build attention of one sequence and 2 to some 32 new tokens at most: where the batch is a
#: constant it names an op of the mask twice. Shorter profiles than this are built for two sequences.
_LONG_PROMPT = 64

#: Tokens of the cache that kernels read as one.
_CACHE_TILE = 16
#: The folder of what only a build reads.
_SCRATCH = "scratch"

#: GeForce RTX 30 (86), 40 (89) and 50 (120): what one TensorRT-RTX engine is built for unless told otherwise.
DEFAULT_SMS = (86, 89, 120)


@dataclasses.dataclass(frozen=True)
class EngineBuild:
    """A finished engine.

    Attributes:
        folder: holds the engine, the ONNX model it came from, and engine.json.
        record: the contents of engine.json.
    """

    folder: Path
    record: EngineRecord

    @property
    def engine(self) -> Path:
        """The engine file."""
        return self.folder / self.record.engine.file


def build_engines(
    model: ir.Model | Path,
    folder: Path,
    *,
    flavour: str,
    sms: Sequence[int] = DEFAULT_SMS,
    max_batch: int = 4,
    max_prompt: int = 512,
    max_context: int = 2048,
    progress: Progress | None = None,
) -> EngineBuild:
    """Lower a portable model, low-bit or float, and build its engine into `folder`.

    One engine serves all `sms`: TensorRT-RTX stores the graph and makes the kernels on the first run, so that a
    further SM costs bytes, not megabytes. TensorRT builds for the GPU at hand and takes no notice of `sms`; where
    $PLANISH_PLUGINS names a plugin library, low-bit linears and the cache are its plugins, and a copy of it goes beside
    the engine. Files replace older ones only when everything is built, engine.json last.

    Args:
        model: the portable model, or the path of one.
        folder: where to; made if need be.
        flavour: 'rtx' or 'tensorrt'.
        sms: compute capabilities times ten.
        max_batch: sequences at most; engine.json says 2 where an engine for 1 cannot be built.
        max_prompt: new tokens of a call at most; never more than `max_context`.
        max_context: slots of the cache, fixed when the engine is built; with plugins, rounded up to a multiple of 16.
        progress: told how far the build is.

    Raises:
        MissingExtraError: if the package of `flavour` is not installed.
        EngineBuildError: if TensorRT refuses an op, which the message names, or fails.
        EngineMismatchError: if the plugin library is missing or does not fit, or if there is no GPU for TensorRT.
    """
    told, package = progress or Silent(), flavour_of(flavour)
    version, library, timings = str(package.load().__version__), None, None
    if not package.ahead_of_time:
        sm = first_device().sm
        library, timings = library_path(), str(timing_cache(version, sm))
        if library is not None:
            check_library(library, version, sm)
            max_context = -(-max_context // _CACHE_TILE) * _CACHE_TILE
    max_prompt = min(max_prompt, max_context)
    if max_batch == 1 and 1 < max_prompt < _LONG_PROMPT:
        max_batch = 2
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".build-", dir=folder))
    try:
        plugged = _plug(model, work, max_context) if library else Plugged(_loaded(model), [])
        lowered = save_model(
            lower_to_tensorrt(plugged.model, max_context),
            work,
            lambda done, total: told.step(f"lower to {flavour}", done, total),
        )
        job = Job(
            flavour=flavour,
            model=str(lowered),
            engine=str(work / ENGINE_FILE),
            sms=tuple(sms),
            max_batch=max_batch,
            max_prompt=max_prompt,
            plugins=str(library) if library else None,
            timing_cache=timings,
        )
        built = run_job(job, told)
        record = EngineRecord(
            format=ENGINE_FORMAT,
            planish=metadata.version("planish"),
            flavour=flavour,
            tensorrt=built.version,
            cuda=package.cuda_major(),
            system=f"{platform.system()} {platform.machine()}",
            sms=built.sms,
            engine=record_file(work / ENGINE_FILE),
            onnx=tuple(record_file(path) for path in sorted(work.glob(f"{lowered.name}*"))),
            inputs=built.inputs,
            outputs=built.outputs,
            max_batch=max_batch,
            max_prompt=max_prompt,
            max_context=max_context,
            fallbacks=fallbacks(*plugged),
            build_seconds=round(built.seconds, 1),
            plugins=_keep_library(library, lowered, work) if library else None,
        )
        record.write(work)
        _publish(work, folder)
    finally:
        shutil.rmtree(work)
    return EngineBuild(folder, record)


def _loaded(model: ir.Model | Path) -> ir.Model:
    return ir.load(model) if isinstance(model, Path) else model


def _plug(model: ir.Model | Path, work: Path, max_context: int) -> Plugged:
    """Return the model with plugin nodes; what it reads is in a folder of `work`."""
    scratch = work / _SCRATCH
    scratch.mkdir()
    return plug(model if isinstance(model, Path) else save_model(model, scratch), scratch, max_context)


def _keep_library(library: Path, model: Path, work: Path) -> PluginsRecord:
    """Copy the plugin library beside the engine of `model`, and return the record of it."""
    copy = work / LIBRARY
    shutil.copyfile(library, copy)
    told = read_library(copy)
    return PluginsRecord(
        library=record_file(copy), tensorrt=told.tensorrt, layout=told.layout, versions=dict(plugin_nodes(model).keys())
    )


def _publish(work: Path, folder: Path) -> None:
    """Move the files of `work` into `folder`; while engine.json is away, there is no engine."""
    (folder / ENGINE_JSON).unlink(missing_ok=True)
    shutil.rmtree(work / _SCRATCH, ignore_errors=True)
    for path in sorted(work.iterdir(), key=lambda path: path.name == ENGINE_JSON):
        os.replace(path, folder / path.name)
