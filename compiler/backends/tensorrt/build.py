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
from planish.compiler.backends.tensorrt.flavour import Flavour, flavour_of
from planish.compiler.backends.tensorrt.job import Built, Job
from planish.compiler.backends.tensorrt.lowering import Plugged, lower_to_tensorrt, plug
from planish.compiler.backends.tensorrt.parser_versions import check_ops, read_version, spelled_out_for
from planish.compiler.backends.tensorrt.plugin_choice import PluginChoice, chosen_library, plugs_without_library
from planish.compiler.backends.tensorrt.plugin_library import read_library
from planish.compiler.backends.tensorrt.plugin_registry import plugin_nodes
from planish.compiler.backends.tensorrt.process import run_job
from planish.compiler.backends.tensorrt.shapes import inputs_of, outputs_of
from planish.compiler.backends.tensorrt.timings import timing_cache
from planish.compiler.export.float_model import save_model
from planish.compiler.progress import Progress, Silent
from planish.plugins.tensorrt.build import LIBRARY
from planish.plugins.tensorrt.plugins import LAYOUT

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
    """A finished engine, or a model lowered for a TensorRT elsewhere.

    Attributes:
        folder: holds the engine, if it is built, the ONNX model it comes from, and engine.json.
        record: the contents of engine.json.
    """

    folder: Path
    record: EngineRecord

    @property
    def engine(self) -> Path:
        """The engine file, which must be built."""
        assert self.record.engine is not None
        return self.folder / self.record.engine.file


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the engine is to run.

    Attributes:
        tensorrt: version of TensorRT.
        here: whether that is this machine, so that the engine is built.
        plugged: whether the model gets plugin nodes.
        library: of the plugins, where the engine is built with them.
        timings: file of what earlier builds measured, where there may be one.
    """

    tensorrt: str
    here: bool
    plugged: bool = False
    library: Path | None = None
    timings: str | None = None


def build_engines(
    model: ir.Model | Path,
    folder: Path,
    *,
    flavour: str,
    sms: Sequence[int] = DEFAULT_SMS,
    max_batch: int = 4,
    max_prompt: int = 512,
    max_context: int = 2048,
    plugins: PluginChoice = "auto",
    tensorrt_version: str | None = None,
    progress: Progress | None = None,
) -> EngineBuild:
    """Lower a portable model, low-bit or float, and build its engine into `folder`.

    One engine serves all `sms`: TensorRT-RTX stores the graph and makes the kernels on the first run, so that a
    further SM costs bytes, not megabytes. TensorRT builds for the GPU at hand and takes no notice of `sms`; where
    $PLANISH_PLUGINS names a plugin library, low-bit linears and the cache are its plugins, and a copy of it goes beside
    the engine. What its parser does not know yet is spelled out in older ops. Files replace older ones only when
    everything is built, engine.json last.

    Args:
        model: the portable model, or the path of one.
        folder: where to; made if need be.
        flavour: 'rtx' or 'tensorrt'.
        sms: compute capabilities times ten.
        max_batch: sequences at most; engine.json says 2 where an engine for 1 cannot be built.
        max_prompt: new tokens of a call at most; never more than `max_context`.
        max_context: slots of the cache, fixed when the engine is built; with plugins, rounded up to a multiple of 16.
        plugins: whether engines of TensorRT have plugins; 'require' fails where they cannot.
        tensorrt_version: the TensorRT of another machine, such as 10.3, to lower the model for; no engine is built,
            and neither TensorRT nor a GPU is needed. Plugin nodes are put in if they are required. None is the one
            that is installed; TensorRT-RTX takes no notice of it.
        progress: told how far the build is.

    Raises:
        MissingExtraError: if the package of `flavour` is not installed.
        EngineBuildError: if TensorRT lacks or refuses an op, which the message names, or fails.
        EngineMismatchError: if the plugin library is missing or does not fit, or if there is no GPU for TensorRT.
    """
    told, package = progress or Silent(), flavour_of(flavour)
    place = _place(package, plugins, tensorrt_version)
    if place.plugged:
        max_context = -(-max_context // _CACHE_TILE) * _CACHE_TILE
    version = None if package.ahead_of_time else read_version(place.tensorrt)
    max_prompt = min(max_prompt, max_context)
    if max_batch == 1 and 1 < max_prompt < _LONG_PROMPT:
        max_batch = 2
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".build-", dir=folder))
    try:
        plugged = _plug(model, work, max_context) if place.plugged else Plugged(_loaded(model), [])
        lowered_model = lower_to_tensorrt(plugged.model, max_context, version)
        if version is not None:
            check_ops(lowered_model, version)
        lowered = save_model(lowered_model, work, lambda done, total: told.step(f"lower to {flavour}", done, total))
        if place.here:
            job = Job(
                flavour=flavour,
                model=str(lowered),
                engine=str(work / ENGINE_FILE),
                sms=tuple(sms),
                max_batch=max_batch,
                max_prompt=max_prompt,
                plugins=str(place.library) if place.library else None,
                timing_cache=place.timings,
            )
            built = run_job(job, told)
        else:
            built = Built(
                version=place.tensorrt,
                sms=(),
                inputs=inputs_of(lowered_model, max_batch, max_prompt),
                outputs=outputs_of(lowered_model),
                seconds=0.0,
            )
        record = EngineRecord(
            format=ENGINE_FORMAT,
            planish=metadata.version("planish"),
            flavour=flavour,
            tensorrt=built.version,
            cuda=package.cuda_major() if place.here else None,
            system=f"{platform.system()} {platform.machine()}",
            sms=built.sms,
            engine=record_file(work / ENGINE_FILE) if place.here else None,
            onnx=tuple(record_file(path) for path in sorted(work.glob(f"{lowered.name}*"))),
            inputs=built.inputs,
            outputs=built.outputs,
            max_batch=max_batch,
            max_prompt=max_prompt,
            max_context=max_context,
            fallbacks=fallbacks(*plugged, place.tensorrt, spelled_out_for(version) if version is not None else ()),
            build_seconds=round(built.seconds, 1),
            plugins_asked=plugins,
            plugins=_record_plugins(place.library, lowered, work) if place.plugged else None,
        )
        record.write(work)
        _publish(work, folder)
    finally:
        shutil.rmtree(work)
    return EngineBuild(folder, record)


def _place(package: Flavour, plugins: PluginChoice, tensorrt_version: str | None) -> _Place:
    if package.ahead_of_time:
        return _Place(str(package.load().__version__), here=True)
    if tensorrt_version is not None:
        plugged = plugs_without_library(plugins, read_version(tensorrt_version))
        return _Place(tensorrt_version, here=False, plugged=plugged)
    version, sm = str(package.load().__version__), first_device().sm
    library = chosen_library(plugins, version, sm)
    return _Place(version, True, library is not None, library, str(timing_cache(version, sm)))


def _loaded(model: ir.Model | Path) -> ir.Model:
    return ir.load(model) if isinstance(model, Path) else model


def _plug(model: ir.Model | Path, work: Path, max_context: int) -> Plugged:
    """Return the model with plugin nodes; what it reads is in a folder of `work`."""
    scratch = work / _SCRATCH
    scratch.mkdir()
    return plug(model if isinstance(model, Path) else save_model(model, scratch), scratch, max_context)


def _record_plugins(library: Path | None, model: Path, work: Path) -> PluginsRecord:
    """Copy the plugin library, if there is one, beside the engine of `model`, and return the record of the plugins."""
    versions = dict(plugin_nodes(model).keys())
    if library is None:
        return PluginsRecord(library=None, tensorrt=None, layout=LAYOUT, versions=versions)
    copy = work / LIBRARY
    shutil.copyfile(library, copy)
    told = read_library(copy)
    return PluginsRecord(library=record_file(copy), tensorrt=told.tensorrt, layout=told.layout, versions=versions)


def _publish(work: Path, folder: Path) -> None:
    """Move the files of `work` into `folder`; while engine.json is away, there is no engine."""
    (folder / ENGINE_JSON).unlink(missing_ok=True)
    shutil.rmtree(work / _SCRATCH, ignore_errors=True)
    for path in sorted(work.iterdir(), key=lambda path: path.name == ENGINE_JSON):
        os.replace(path, folder / path.name)
