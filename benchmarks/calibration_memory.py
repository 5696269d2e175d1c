"""Memory of calibration and flattening: the widths of LLaMA-3.2-3B, two decoder blocks against four.

    python benchmarks/calibration_memory.py [--blocks 2 --blocks 4] [--nsamples 8] [--seqlen 128] [--json]

If memory is bounded by one block and one batch, the peaks are the same. Every run has a process of its own; its peak
is VmHWM, the most it ever had resident. Weights and tokens are random, which moves no size. Four blocks take about
2.5 GB in the folder, and minutes.
"""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from export import CONFIG_3B, write_3b
from rich.console import Console
from rich.table import Table

_MIB = 1 << 20
#: Sequences in a batch: the default of `Streams.batches`.
_BATCH = 4


def peak_mib() -> float:
    """Return the most memory that this process ever had resident."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def flatten(checkpoint: Path, blocks: int, tokens: tuple[int, int], scheme: str, refine: int) -> dict[str, float]:
    """Flatten the first blocks of a checkpoint; return the peaks in MiB after the imports and after every block."""
    from planish.compiler.checkpoint.first_layers import open_first_layers
    from planish.compiler.learn.flattening import flatten_checkpoint
    from planish.compiler.learn.gradient.refine import Refinement
    from planish.compiler.quantize.codes import CodesOnDisk
    from planish.compiler.select.forms import forms_of_groups
    from planish.passes.scheme import Scheme

    started, peaks = time.perf_counter(), {"imports": peak_mib()}
    model, bits = open_first_layers(str(checkpoint), blocks), Scheme.parse(scheme)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens)
    forms = [forms_of_groups({"attn": "affine", "ffn": "affine"})] * blocks

    def note(done: int, total: int) -> None:
        peaks[f"block {done}"] = peak_mib()

    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as name:
        codes = CodesOnDisk(Path(name), model, bits)
        refinement = Refinement(epochs=refine) if refine else None
        flatten_checkpoint(model, bits, forms, ids, Path(name) / "work", codes, refinement=refinement, progress=note)
    return {**peaks, "seconds": time.perf_counter() - started}


def sizes(seqlen: int) -> dict[str, float]:
    """Return in MiB what the peak is made of, by the shapes alone."""
    hidden, inner = CONFIG_3B["hidden_size"], CONFIG_3B["intermediate_size"]
    kv = CONFIG_3B["num_key_value_heads"] * CONFIG_3B["head_dim"]
    q = CONFIG_3B["num_attention_heads"] * CONFIG_3B["head_dim"]
    block = hidden * (2 * q + 2 * kv + 3 * inner)
    return {
        "one block, float32": 4 * block / _MIB,
        "one batch at its widest, float32": 4 * _BATCH * seqlen * inner / _MIB,
        "moments of inputs and weights, float64": 2 * 8 * (2 * hidden**2 + q**2 + inner**2) / _MIB,
        "Hessian and cross moment at ffn_out, float64": 2 * 8 * inner**2 / _MIB,
    }


def measure(work: Path, blocks: Sequence[int], tokens: tuple[int, int], scheme: str, refine: int) -> dict[str, Any]:
    """Write a checkpoint and flatten as many of its blocks as is asked for, in a process each."""
    checkpoint = work / "3b"
    checkpoint.mkdir()
    write_3b(checkpoint, max(blocks))
    runs = {}
    for count in blocks:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            runs[count] = pool.submit(flatten, checkpoint, count, tokens, scheme, refine).result()
    return {"sizes": sizes(tokens[1]), "runs": runs}


def main(
    blocks: Annotated[list[int] | None, typer.Option(help="Decoder blocks of a run; repeatable. [2 and 4]")] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = 8,
    seqlen: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 128,
    scheme: Annotated[str, typer.Option(help="Bits per tensor role.")] = "w3a3k3v3",
    refine: Annotated[int, typer.Option(help="Epochs of refining each block.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Where to make the temporary folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Measure the memory of calibration and flattening."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        found = measure(Path(name), blocks or [2, 4], (nsamples, seqlen), scheme, refine)
    table = Table("what", "MiB")
    for name, size in found["sizes"].items():
        table.add_row(name, f"{size:.0f}")
    for count, peaks in found["runs"].items():
        shown = ", ".join(f"{peak:.0f}" for at, peak in peaks.items() if at.startswith("block"))
        table.add_row(f"peak of {count} blocks, after each of them; {peaks['seconds']:.0f} s", shown)
        table.add_row("  of it the imports", f"{peaks['imports']:.0f}")
    Console(width=120).print(table)
    if as_json:
        print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
