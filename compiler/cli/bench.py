"""`planish bench`: a bundle against the float model, in speed and memory."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.cli import measured_on as options
from planish.compiler.cli.app import JsonFlag, Output
from planish.compiler.runtime.provider import Provider

__all__ = ["run_bench"]


class Against(StrEnum):
    """What a bundle can be compared with."""

    FLOAT = "float"


def run_bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    against: Annotated[Against, typer.Option(help="float: the float32 export of the same checkpoint.")] = Against.FLOAT,
    tokens: Annotated[int | None, typer.Option(min=1, help="Length of the prompt. [512, or what fits]")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often both are measured; medians count.")] = 5,
    target: options.TargetOption = None,
    provider: options.ProviderOption = Provider.CPU,
    threads: Annotated[int, typer.Option(min=1, help="Threads of ONNX Runtime.")] = 2,
    json: JsonFlag = False,
) -> None:
    """Measure prefill, decode and resident memory, both models in turn, each in a process of its own."""
    from planish.compiler.measure.bench import bench
    from planish.compiler.progress import progress_for

    options.check_run(target, provider)
    out, opened = Output(json), Bundle.open(bundle)
    with progress_for(sys.stderr) as progress:
        found = bench(
            opened,
            target=target,
            provider=provider,
            threads=threads,
            tokens=tokens,
            repeats=repeats,
            progress=lambda done, total: progress.step("repeats", done, total),
        )
    content = found.to_dict()
    low, other = found.bundle, found.against
    ours = "bundle" if found.runs_on == Provider.CPU else f"bundle on {found.runs_on}"
    out.line(
        f"{found.tokens} tokens, {threads} threads, medians of {repeats} repeats in turn; {ours} and {against.value}"
    )
    for name, left, right, ratio in (
        ("prefill tokens/s", low.prefill, other.prefill, content["prefill_speedup"]),
        ("decode tokens/s", low.decode, other.decode, content["decode_speedup"]),
        ("resident MiB", low.resident_mib, other.resident_mib, content["memory_ratio"]),
        ("peak MiB", low.peak_mib, other.peak_mib, low.peak_mib / other.peak_mib),
        ("load seconds", low.load_seconds, other.load_seconds, low.load_seconds / other.load_seconds),
    ):
        out.line(f"{name:<16} {left:9.2f} {right:9.2f}   {ratio:.2f} x")
    out.result(content)
