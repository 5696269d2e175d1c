"""Flatten a checkpoint block after block, on disk: a killed run goes on behind the last finished block."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.checkpoint.files import write_json
from planish.compiler.errors import CalibrationError
from planish.compiler.learn.block import Angles, Block, FloatHooks, read_block, run_block
from planish.compiler.learn.flatten_block import Flattened, flatten_block
from planish.compiler.learn.gradient.refine import Refinement
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.rounding.site_fit import HighCount, Steps
from planish.compiler.learn.stream_files import StreamFiles
from planish.compiler.learn.streams import Sequences
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.quantize.codes import CodesOnDisk
from planish.compiler.select.plan_file import load_transforms, save_transforms, site_widths
from planish.passes.high_impact import HighImpact
from planish.passes.scheme import Scheme
from planish.passes.transforms import SITES, LayerTransforms, Site, Transforms

__all__ = [
    "FEWEST_SEQUENCES",
    "embedding",
    "finite_outputs",
    "flatten_checkpoint",
    "held_out_sequences",
    "naming_block",
    "read_evidence",
    "read_profile",
    "run_finite",
]

_EVIDENCE, _PROFILES = "evidence.json", "profiles.safetensors"
#: Calibration sequences, at least.
FEWEST_SEQUENCES = 4


def held_out_sequences(sequences: int) -> int:
    """Return how many of the calibration sequences nothing is fitted to: an eighth, and one at least.

    Raises:
        CalibrationError: if there are too few sequences to fit to some and measure on others.
    """
    if sequences < FEWEST_SEQUENCES:
        raise CalibrationError(
            f"{sequences} calibration sequences are too few to fit to some and measure on others. "
            f"Ask for {FEWEST_SEQUENCES} or more (--nsamples)."
        )
    return max(1, sequences // 8)


@torch.no_grad()
def flatten_checkpoint(
    checkpoint: Checkpoint,
    scheme: Scheme,
    forms: Sequence[dict[Site, Form]],
    token_ids: npt.NDArray[np.int64],
    folder: Path,
    codes: CodesOnDisk,
    *,
    seed: int = 0,
    steps: Steps | None = None,
    refinement: Refinement | None = None,
    high: Sequence[Mapping[Site, HighImpact | HighCount]] | None = None,
    device: torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Transforms:
    """Flatten every block, write its codes to `codes`, and return the transforms.

    Args:
        checkpoint: the float model.
        scheme: with low-bit linears.
        forms: of the transform at every site, by block.
        token_ids: calibration sequences, int64 [sequences, seq].
        folder: to work in.
        codes: where codes go.
        seed: of the rotations' signs.
        steps: see `Steps`; None is all of them.
        refinement: how the closed-form transforms are refined; None is not at all.
        high: by block, the high-impact channels of sites, or how many there are, which `codes` must know of.
        device: where a block and a batch are while they are worked on; None is the CPU.
        progress: (blocks done, blocks in all).

    Raises:
        CalibrationError: if there are too few sequences, or a block's activations are not finite.
    """
    config, count = checkpoint.config, checkpoint.config.num_hidden_layers
    files = StreamFiles(folder, held_out_sequences(len(token_ids)), device)
    if files.newest() is None:
        _begin(files, checkpoint, token_ids)
    angles = Angles.of(config, token_ids.shape[1], device)
    with fast_products():
        for layer in range(files.newest() or 0, count):
            block, streams = read_block(checkpoint, layer).to(device), files.open(layer)
            outputs = finite_outputs(block, files, angles, layer)
            with naming_block(layer):
                flattened = flatten_block(
                    block,
                    streams,
                    outputs,
                    scheme.block(layer),
                    forms[layer],
                    seed + layer,
                    steps,
                    refinement,
                    None if high is None else high[layer],
                )
                _check(flattened)
            _keep(folder / f"layer-{layer}", layer, block, flattened, codes)

            def seen(x: Tensor, flattened: Flattened = flattened) -> Tensor:
                return run_block(config, flattened.hooks, x, angles)

            files.advance(layer, seen)
            # What the next block is worked on with finds no room taken by this one.
            del block, flattened, seen
            if progress:
                progress(layer + 1, count)
    one = config.with_num_layers(1)
    return Transforms(tuple(load_transforms(folder / f"layer-{i}", one).layers[0] for i in range(count)))


def embedding(checkpoint: Checkpoint) -> Callable[[npt.NDArray[np.int64]], Tensor]:
    """Return what gives the embeddings of tokens, float32 [..., hidden]; it holds the table as it is stored."""
    table = checkpoint.tensor("model.embed_tokens.weight")
    return lambda ids: torch.from_numpy(table[ids].astype(np.float32))


def _begin(files: StreamFiles, checkpoint: Checkpoint, token_ids: npt.NDArray[np.int64]) -> None:
    embed = embedding(checkpoint)
    # As they are stored in the compiled model.
    files.begin(token_ids, lambda ids: embed(ids).half().float())


def finite_outputs(block: Block, files: StreamFiles, angles: Angles, layer: int) -> Sequences:
    """Return what the float block makes of the float stream, [sequences, seq, hidden], written to `files`.

    Raises:
        CalibrationError: if that is not finite.
    """
    return files.write_outputs(layer, lambda x: run_finite(block, x, angles, layer))


def run_finite(block: Block, x: Tensor, angles: Angles, layer: int) -> Tensor:
    """Return the output of the float block for `x` [batch, seq, hidden].

    Raises:
        CalibrationError: if that is not finite.
    """
    outputs = run_block(block.config, FloatHooks(block), x, angles)
    if not outputs.isfinite().all():
        raise CalibrationError(
            f"Decoder block {layer} makes NaN or infinity of the calibration text. Check the checkpoint, or calibrate "
            "on other text."
        )
    return outputs


@contextlib.contextmanager
def naming_block(layer: int) -> Iterator[None]:
    """Turn what arithmetic with NaN or infinity ends in into a CalibrationError that names the block."""
    try:
        yield
    except (CalibrationError, LinAlgError, ValueError) as error:
        raise CalibrationError(
            f"Decoder block {layer} cannot be flattened: {str(error).rstrip('.')}. Check the checkpoint, or calibrate "
            "on other text."
        ) from error


def _check(flattened: Flattened) -> None:
    for site, evidence in flattened.evidence.items():
        if not math.isfinite(evidence["error"]):
            raise CalibrationError(f"rounding at {site} gives NaN or infinity")


def read_evidence(folder: Path, layers: int) -> list[dict[str, Any]]:
    """Return what was measured at every block, as `flatten_block` gives it."""
    return [json.loads((folder / f"layer-{i}" / _EVIDENCE).read_text(encoding="utf-8")) for i in range(layers)]


def read_profile(folder: Path, layer: int, site: Site) -> npt.NDArray[np.float32]:
    """Return the channels of a site before and after flattening, float32 [2, 4, channels]; see `BeforeAfter`."""
    with safe_open(folder / f"layer-{layer}" / _PROFILES, framework="numpy") as file:
        profile: npt.NDArray[np.float32] = file.get_tensor(site)
    return profile


def _keep(folder: Path, layer: int, block: Block, flattened: Flattened, codes: CodesOnDisk) -> None:
    part = f"model.layers.{layer}"
    codes.keep(part, {f"{part}.{module}": each for module, each in flattened.codes.items()})
    folder.mkdir(exist_ok=True)
    widths = site_widths(block.config)
    stored = {site: flattened.factors[site].stored(widths[site]) for site in SITES}
    save_transforms(Transforms((LayerTransforms(**stored, clips=flattened.clips, high=flattened.high),)), folder)
    save_file({str(site): each for site, each in flattened.compared.profiles.items()}, folder / _PROFILES)
    refinement = {} if flattened.refinement is None else {"refinement": flattened.refinement}
    sites = {site: {**flattened.evidence.get(site, {}), **flattened.compared.evidence[site]} for site in SITES}
    write_json(folder / _EVIDENCE, sites | refinement)
