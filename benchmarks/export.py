"""Time and memory of the float export: a synthetic 3B checkpoint, and SmolLM2 against torch.onnx.export.

    python benchmarks/export.py [--synthetic-3b] [--against-torch] [--folder DIR] [--json]

Every job runs in a process of its own. Seconds are of the whole process, imports and flushing to disk included;
memory is the process's VmHWM, the most it ever had resident. The 3B run needs about 20 GB free in the folder.
"""

import dataclasses
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

#: The shape of LLaMA-3.2-3B.
CONFIG_3B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
SHARD_BYTES = 1 << 30
BLOCK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Run:
    """What one job cost."""

    job: str
    seconds: float
    peak_mib: float | None = None
    read_mb: float = 0.0
    written_mb: float = 0.0

    @property
    def written_mb_per_s(self) -> float:
        """Megabytes written per second, over the whole job."""
        return self.written_mb / self.seconds


def folder_mb(folder: Path) -> float:
    """Return the size of a folder's weight files in MB (10^6 bytes), and have them all on disk."""
    total = 0
    for path in folder.iterdir():
        if path.suffix in (".data", ".onnx", ".safetensors"):
            total += path.stat().st_size
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return total / 1e6


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache, so that the next read comes from the disk."""
    folder_mb(folder)
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def alone(name: str, job: Callable[..., None], source: Path | str, out: Path) -> Run:
    """Run `job(source, out)` in a fresh process and measure it."""
    read = 0.0
    if isinstance(source, Path):
        forget(source)
        read = folder_mb(source)
    start = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peak, written = pool.submit(_measured, job, source, out).result()
    run = Run(name, time.perf_counter() - start, peak, read, written)
    shutil.rmtree(out)
    return run


def _measured(job: Callable[..., None], source: Path | str, out: Path) -> tuple[float, float]:
    out.mkdir(parents=True)
    job(source, out)
    written = folder_mb(out)
    # VmHWM starts anew with the process; ru_maxrss would begin at what its parent had.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024, written


def planish_export(source: Path | str, out: Path) -> None:
    """Export with planish."""
    from planish.compiler.checkpoint import open_checkpoint
    from planish.compiler.export.float_model import export_float

    export_float(open_checkpoint(str(source)), out)


def torch_export(source: Path, out: Path) -> None:
    """Export with torch.onnx.export(dynamo=True), the cache given and returned as tensors.

    A DynamicCache as an argument, registered with pytree by transformers, traces but fails to decompose (torch 2.13,
    transformers 5.23), so a module around the model makes one of the tensors.
    """
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    class WithCache(torch.nn.Module):
        def __init__(self, model: LlamaForCausalLM) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
            cache = DynamicCache(config=self.model.config)
            for layer, (key, value) in zip(cache.layers, past, strict=True):
                layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
                layer.keys, layer.values = key, value
            y = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache
            )
            return y.logits, [(layer.keys, layer.values) for layer in cache.layers]

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    config = model.config
    batch, sequence, past = 2, 5, 7
    shape = (batch, config.num_key_value_heads, past, config.head_dim)
    layers = range(config.num_hidden_layers)
    dynamic = torch.export.Dim.DYNAMIC
    free, free_cache = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    torch.onnx.export(
        WithCache(model).eval(),
        (),
        out / "model.onnx",
        kwargs={
            "input_ids": torch.zeros(batch, sequence, dtype=torch.int64),
            "attention_mask": torch.ones(batch, past + sequence, dtype=torch.int64),
            "position_ids": torch.arange(past, past + sequence).repeat(batch, 1),
            "past": [(torch.zeros(shape), torch.zeros(shape)) for _ in layers],
        },
        dynamic_shapes={
            "input_ids": free,
            "attention_mask": free,
            "position_ids": free,
            "past": [(free_cache, free_cache) for _ in layers],
        },
        dynamo=True,
        external_data=True,
    )


def copy_disk(source: Path, out: Path, written_mb: float) -> None:
    """Do only the disk's share of an export: read `source`, then write as many bytes as the export wrote."""
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(BLOCK_BYTES):
                pass
    block = np.random.default_rng(0).bytes(BLOCK_BYTES)
    with (out / "model.data").open("wb", buffering=0) as file:
        for start in range(0, int(written_mb * 1e6), BLOCK_BYTES):
            file.write(block[: int(written_mb * 1e6) - start])


def write_3b(folder: Path, layers: int = 28) -> None:
    """Write a bfloat16 checkpoint of CONFIG_3B in shards, or of its first decoder blocks alone.

    Random numbers are drawn once and written again and again.
    """
    from tokenizers import Tokenizer, models

    from planish.compiler.checkpoint import expected_tensors
    from planish.compiler.checkpoint.config import LlamaConfig

    config = {**CONFIG_3B, "num_hidden_layers": layers}
    noise = np.random.default_rng(0).standard_normal(BLOCK_BYTES // 2, np.float32) * 0.02
    block = memoryview(noise.astype(ml_dtypes.bfloat16).view(np.uint8))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in expected_tensors(LlamaConfig.from_dict(config)).items():
        size = 2 * int(np.prod(shape))
        if filled and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map.update(dict.fromkeys(shapes, file_name))
        header, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, end, BLOCK_BYTES):
                file.write(block[: end - start])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))


def write_smollm2(folder: Path) -> None:
    """Save SmolLM2 as a float32 safetensors folder, which both exporters read."""
    from safetensors.numpy import save_file

    from planish.compiler.checkpoint import open_checkpoint

    checkpoint = open_checkpoint("smollm2")
    checkpoint.write_sidecars(folder)
    weights = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def measure_3b(work: Path) -> list[Run]:
    """Export the synthetic checkpoint, then let the disk alone do the same."""
    checkpoint = work / "3b"
    checkpoint.mkdir()
    write_3b(checkpoint)
    export = alone("planish, 3B shape", planish_export, checkpoint, work / "out")
    forget(checkpoint)
    disk_folder = work / "disk"
    disk_folder.mkdir()
    start = time.perf_counter()
    copy_disk(checkpoint, disk_folder, export.written_mb)
    written = folder_mb(disk_folder)
    disk = Run("the disk alone", time.perf_counter() - start, None, export.read_mb, written)
    shutil.rmtree(disk_folder)
    shutil.rmtree(checkpoint)
    return [export, disk]


def measure_smollm2(work: Path) -> list[Run]:
    """Export SmolLM2 with planish, from the embedded file and from a folder, and with torch from the folder."""
    checkpoint = work / "smollm2"
    checkpoint.mkdir()
    write_smollm2(checkpoint)
    return [
        alone("planish, SmolLM2 (embedded)", planish_export, "smollm2", work / "out"),
        alone("planish, SmolLM2 (folder)", planish_export, checkpoint, work / "out"),
        alone("torch.onnx.export(dynamo=True), SmolLM2 (folder)", torch_export, checkpoint, work / "out"),
    ]


def main(
    synthetic_3b: Annotated[bool, typer.Option(help="Export a random checkpoint of LLaMA-3.2-3B's shape.")] = False,
    against_torch: Annotated[bool, typer.Option(help="Export SmolLM2, with planish and with PyTorch.")] = False,
    folder: Annotated[Path | None, typer.Option(help="Where to make the temporary folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Measure the float export."""
    if not (synthetic_3b or against_torch):
        raise typer.BadParameter("Choose --synthetic-3b, --against-torch, or both.")
    result: dict[str, Any] = {}
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        if synthetic_3b:
            export, disk = measure_3b(Path(temporary))
            runs += [export, disk]
            result["3b"] = {"export": export, "disk": disk, "seconds_over_disk": export.seconds / disk.seconds}
        if against_torch:
            embedded, planish, torch = measure_smollm2(Path(temporary))
            runs += [embedded, planish, torch]
            result["smollm2"] = {
                "embedded": embedded,
                "planish": planish,
                "torch": torch,
                "speedup": torch.seconds / planish.seconds,
                "memory_ratio": (planish.peak_mib or 0) / (torch.peak_mib or 1),
            }
    table = Table("job", "seconds", "peak MiB", "read MB", "written MB", "written MB/s")
    for run in runs:
        peak = "" if run.peak_mib is None else f"{run.peak_mib:.0f}"
        figures = (run.read_mb, run.written_mb, run.written_mb_per_s)
        table.add_row(run.job, f"{run.seconds:.1f}", peak, *(f"{figure:.0f}" for figure in figures))
    Console(width=120).print(table)
    if as_json:
        print(json.dumps(result, default=dataclasses.asdict))


if __name__ == "__main__":
    typer.run(main)
