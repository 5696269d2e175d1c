"""Quantise every linear of a checkpoint once, and keep the packed codes on disk, one file per decoder block.

A file is written whole or not at all, so a run that was killed resumes behind the last finished block. Where input
channels of a module are high-impact ones, the file holds a weight for each segment, under the name of `Segment.of`.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.quantize.arithmetic import QuantizedWeight, channels_of, quantize_weight
from planish.passes.codes import PackedWeight
from planish.passes.formats import LM_HEAD, format_of
from planish.passes.high_impact import HighImpactOf, Segment, module_of, no_high_impact, segments
from planish.passes.scheme import LinearFormat, Scheme
from planish.plugins.packing import pack, unpack

__all__ = ["CodesOnDisk", "module_groups", "quantize_checkpoint"]

#: (name of the finished part, parts done, parts in all) -> None
Progress = Callable[[str, int, int], None]


class CodesOnDisk:
    """The packed codes of a checkpoint under a scheme, read one module, or segment of a module, at a time.

    Args:
        folder: of the files.
        checkpoint: whose weights they are.
        scheme: gives the formats.
        high: module -> the high-impact channels of its input.
    """

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, scheme: Scheme, high: HighImpactOf = no_high_impact
    ) -> None:
        self._folder = folder
        self._checkpoint = checkpoint
        self._scheme = scheme
        self._high = high

    def segments(self, module: str) -> tuple[Segment, ...]:
        """Return the segments of the input channels of `module`: one, or the high-impact ones and the rest."""
        return segments(format_of(self._scheme, module), self._high(module))

    def format(self, name: str) -> LinearFormat:
        """Return the format of a module or segment."""
        return self._segment(name).format

    def out_features(self, name: str) -> int:
        """Return the number of output channels of a module or segment."""
        return self._checkpoint.shape(self._weight_name(module_of(name)))[0]

    def in_features(self, name: str) -> int:
        """Return the number of input channels of a module or segment."""
        return self._segment(name).size(self._checkpoint.shape(self._weight_name(module_of(name)))[1])

    def read(self, name: str) -> PackedWeight:
        """Return the packed weight of a module or segment."""
        with safe_open(self._file(name), framework="numpy") as file:
            return PackedWeight(file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scale"))

    def quantized(self, name: str) -> QuantizedWeight:
        """Return the weight of a module or segment as the oracle reads it."""
        stored, form, k = self.read(name), self.format(name), self.in_features(name)
        codes = torch.from_numpy(unpack(stored.packed, form.weight_bits, k))
        scale = torch.from_numpy(stored.scale.astype(np.float32))
        return QuantizedWeight(codes, scale, form.weight_bits, form.group or k)

    def rounded(self, module: str) -> dict[str, QuantizedWeight]:
        """Return name of the segment -> its codes, of the weight of `module` rounded to nearest."""
        weight = torch.from_numpy(self._checkpoint.tensor(self._weight_name(module)).astype(np.float32))
        return {
            segment.of(module): quantize_weight(channels_of(weight, segment), segment.format)
            for segment in self.segments(module)
        }

    def has(self, part: str) -> bool:
        """Say whether the file of `part` is there."""
        return self._path(part).exists()

    def write(self, part: str, modules: list[str]) -> None:
        """Round `modules` to nearest and write them into the file of `part`, unless that file is there already."""
        if self.has(part):
            return
        quantized: dict[str, QuantizedWeight] = {}
        for module in modules:
            quantized |= self.rounded(module)
        self.keep(part, quantized)

    def keep(self, part: str, quantized: Mapping[str, QuantizedWeight]) -> None:
        """Write the codes of the modules of `part`, by name of the segment, whole or not at all."""
        tensors = {}
        for name, each in quantized.items():
            scale_type = np.float32 if self.format(name).group is None else np.float16
            tensors[f"{name}.codes"] = pack(each.codes.cpu().numpy(), each.bits)
            tensors[f"{name}.scale"] = np.ascontiguousarray(each.scale.cpu().numpy().astype(scale_type))
        path = self._path(part)
        unfinished = path.with_suffix(".part")
        save_file(tensors, unfinished)
        unfinished.rename(path)

    def keep_scaled(self, rounded: "CodesOnDisk", factors: Mapping[str, Tensor]) -> None:
        """Write codes as `rounded` has them, with scales of rows times `factors`, [out] by module or segment."""
        for part, names in itertools.groupby(sorted(factors), _part_of):
            scaled = {}
            for name in names:
                weight = rounded.quantized(name)
                scaled[name] = dataclasses.replace(weight, scale=weight.scale * factors[name])
            self.keep(part, scaled)

    def share(self, part: str, other: "CodesOnDisk") -> None:
        """Take over the file of `part` from `other`, on the same disk, without a copy."""
        if not self.has(part):
            os.link(other._path(part), self._path(part))

    def drop(self) -> None:
        """Delete all codes."""
        for path in self._folder.glob("*.safetensors"):
            path.unlink()

    def _path(self, part: str) -> Path:
        return self._folder / f"{part}.safetensors"

    def _file(self, name: str) -> Path:
        return self._path(_part_of(name))

    def _segment(self, name: str) -> Segment:
        module = module_of(name)
        return {segment.of(module): segment for segment in self.segments(module)}[name]

    def _weight_name(self, module: str) -> str:
        if module == LM_HEAD and self._checkpoint.config.tie_word_embeddings:
            return "model.embed_tokens.weight"
        return f"{module}.weight"


def _part_of(module: str) -> str:
    return ".".join(module.split(".")[:3])


def module_groups(checkpoint: Checkpoint, scheme: Scheme) -> dict[str, list[str]]:
    """Return part name -> the modules quantised in it: one part per decoder block, and lm_head."""
    groups: dict[str, list[str]] = {}
    modules = [name.removesuffix(".weight") for name in checkpoint.names() if name.endswith("_proj.weight")]
    for module in modules if not scheme.linear.is_float else []:
        groups.setdefault(_part_of(module), []).append(module)
    if not scheme.lm_head.is_float:
        groups[LM_HEAD] = [LM_HEAD]
    return groups


def quantize_checkpoint(
    checkpoint: Checkpoint,
    scheme: Scheme,
    folder: Path,
    progress: Progress | None = None,
    high: HighImpactOf = no_high_impact,
) -> CodesOnDisk:
    """Quantise what `scheme` asks for into `folder`, skipping the parts that are there, and return the codes.

    With high-impact channels, `high`, their segments are rounded for themselves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    codes = CodesOnDisk(folder, checkpoint, scheme, high)
    groups = module_groups(checkpoint, scheme)
    for done, (part, modules) in enumerate(groups.items(), 1):
        codes.write(part, modules)
        if progress:
            progress(part, done, len(groups))
    return codes
