"""Build one engine in a process of its own: `python -m planish.compiler.backends.tensorrt.worker` < job.

TensorRT aborts the process on some inputs; here that ends the worker and not the program. A job is read from
standard input, messages are written to standard output, one JSON object to a line.
"""

import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from planish.compiler.backends.tensorrt.device import first_device
from planish.compiler.backends.tensorrt.engine_json import InputRecord, OutputRecord
from planish.compiler.backends.tensorrt.flavour import Flavour, flavour_of
from planish.compiler.backends.tensorrt.job import Built, Failed, Job, Log, Message, Progressed
from planish.compiler.backends.tensorrt.monitor import ProgressTree, make_monitor
from planish.compiler.backends.tensorrt.plugin_registry import load_plugins, look_up, plugin_nodes
from planish.compiler.backends.tensorrt.preflight import refused_nodes
from planish.compiler.backends.tensorrt.shapes import dtype_name, profile
from planish.compiler.backends.tensorrt.timings import keep_timings
from planish.compiler.errors import EngineBuildError, PlanishError

__all__ = ["main"]


def main() -> None:
    """Read a job, build its engine, and tell how it went."""
    out = _take_stdout()

    def send(message: Progressed | Log | Failed | Built) -> None:
        print(Message(message=message).model_dump_json(), file=out, flush=True)

    try:
        send(_build(Job.model_validate_json(sys.stdin.read()), send))
    except (PlanishError, OSError) as error:
        send(Failed(text=str(error)))


def _take_stdout() -> TextIO:
    """Return standard output for messages, and let whatever else is printed go to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def _build(job: Job, send: Any) -> Built:
    started = time.perf_counter()
    flavour = flavour_of(job.flavour)
    if flavour.ahead_of_time:
        # polygraphy decides on import which of the two packages it drives.
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
    trt = flavour.load()
    sms = _sms(flavour, trt, job.sms)
    logger = _logger(trt, send)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(flavour, trt, network, logger, job)
    inputs = profile(network, job.max_batch, job.max_prompt)
    tree = ProgressTree(lambda percent: send(Progressed(percent=percent)))
    config = _config(flavour, trt, builder, network, inputs, sms, make_monitor(trt, tree), job)
    engine = builder.build_serialized_network(network, config)
    if job.timing_cache is not None:
        keep_timings(config, Path(job.timing_cache))
    if engine is None:
        raise EngineBuildError(f"{flavour.title} {trt.__version__} built no engine.")
    if logger.unused:
        raise EngineBuildError(
            f"{flavour.title} {trt.__version__} would ignore part of the model:\n  " + "\n  ".join(logger.unused)
        )
    with Path(job.engine).open("wb") as file:
        file.write(memoryview(engine))
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return Built(
        version=trt.__version__,
        sms=sms,
        inputs=inputs,
        outputs={o.name: OutputRecord(dtype=dtype_name(o), shape=tuple(o.shape)) for o in outputs},
        seconds=time.perf_counter() - started,
    )


def _sms(flavour: Flavour, trt: ModuleType, wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Return the SMs to build for, or raise if this package cannot."""
    if not flavour.ahead_of_time:
        return (first_device().sm,)
    known = sorted(int(name[2:]) for name in trt.ComputeCapability.__members__ if name[2:].isdigit())
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        raise EngineBuildError(
            f"{flavour.title} {trt.__version__} cannot build for SM {', '.join(map(str, unknown)) or '(none given)'}; "
            f"it builds for {', '.join(map(str, known))}. Choose among these."
        )
    return tuple(sorted(set(wanted)))


def _logger(trt: ModuleType, send: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            #: Warnings that nothing reads an input: the engine would build, and mean something else.
            self.unused: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if "Unused Input" in text:
                self.unused.append(text)
            if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                send(Log(text=text))

    return Logger()


def _parse(flavour: Flavour, trt: ModuleType, network: Any, logger: Any, job: Job) -> None:
    if job.plugins is not None:
        look_up(load_plugins(trt, Path(job.plugins)), plugin_nodes(Path(job.model)))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.model):
        refused = refused_nodes(parser)
        raise EngineBuildError(
            f"{flavour.title} {trt.__version__} cannot parse {len(refused)} part(s) of the model:\n  "
            + "\n  ".join(refused)
        )


def _config(
    flavour: Flavour,
    trt: ModuleType,
    builder: Any,
    network: Any,
    inputs: dict[str, InputRecord],
    sms: tuple[int, ...],
    monitor: Any,
    job: Job,
) -> Any:
    from polygraphy.backend.trt import CreateConfig, Profile

    shapes = Profile()
    for name, record in inputs.items():
        shapes.add(name, record.min, record.opt, record.max)
    if not flavour.ahead_of_time:
        known = job.timing_cache if job.timing_cache is not None and Path(job.timing_cache).is_file() else None
        # Caches are written in place.
        preview = [trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03] if job.plugins is not None else None
        create = CreateConfig(
            profiles=[shapes], progress_monitor=monitor, load_timing_cache=known, preview_features=preview
        )
        return create(builder, network)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    capabilities = [divmod(sm, 10) for sm in sms]
    create_rtx = CreateConfigRTX(compute_capabilities=capabilities, profiles=[shapes], progress_monitor=monitor)
    return create_rtx(builder, network)


if __name__ == "__main__":
    main()
