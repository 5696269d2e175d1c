"""`planish generate`: text from a bundle, as it comes."""

import time
from pathlib import Path
from typing import Annotated

import typer

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.cli import measured_on as options
from planish.compiler.cli.app import JsonFlag, Output
from planish.compiler.runtime.generate import Sampling
from planish.compiler.runtime.provider import Provider

__all__ = ["run_generate"]


def run_generate(
    bundle: Annotated[Path, typer.Argument(help="A bundle.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue or, with --chat, what the user says.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put PROMPT into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(min=0.001, max=1.0, help="Draw from this share of probability. [1]")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws; the same seed, the same text.")] = None,
    target: options.TargetOption = None,
    provider: options.ProviderOption = Provider.CPU,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of ONNX Runtime. [one per core]")] = None,
    json: JsonFlag = False,
) -> None:
    """Generate text, greedy unless a temperature is given."""
    if temperature == 0:
        options.check_without("--temperature", top_p=top_p, seed=seed is not None)
    options.check_run(target, provider)
    out, opened = Output(json), Bundle.open(bundle)
    opened.load(target, threads, provider)
    sampling = Sampling(temperature, 1.0 if top_p is None else top_p, seed)
    pieces, started = [], time.perf_counter()
    written = opened.generate(
        prompt,
        chat=chat,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        threads=threads,
        target=target,
        provider=provider,
    )
    for piece in written:
        out.piece(piece)
        pieces.append(piece)
    out.piece("\n")
    out.result({"text": "".join(pieces), "seconds": round(time.perf_counter() - started, 3)})
