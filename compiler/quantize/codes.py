"""Quantise every linear of a checkpoint once, and keep the packed codes on disk, one file per decoder block.

A file is written whole or not at all, so a run that was killed resumes behind the last finished block.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.quantize.arithmetic import QuantizedWeight, quantize_weight
from planish.passes.codes import PackedWeight
from planish.passes.quantize_linears import LM_HEAD
from planish.passes.scheme import LinearFormat, Scheme
from planish.plugins.packing import pack, unpack

__all__ = ["CodesOnDisk", "module_groups", "quantize_checkpoint"]

#: (name of the finished part, parts done, parts in all) -> None
Progress = Callable[[str, int, int], None]


class CodesOnDisk:
    """The packed codes of a checkpoint under a scheme, read one module at a time."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, scheme: Scheme) -> None:
        self._folder = folder
        self._checkpoint = checkpoint
        self._scheme = scheme

    def format(self, module: str) -> LinearFormat:
        """Return the format of `module`."""
        return self._scheme.lm_head if module == LM_HEAD else self._scheme.linear

    def out_features(self, module: str) -> int:
        """Return the number of output channels of `module`."""
        return self._checkpoint.shape(self._weight_name(module))[0]

    def in_features(self, module: str) -> int:
        """Return the number of input channels of `module`."""
        return self._checkpoint.shape(self._weight_name(module))[1]

    def read(self, module: str) -> PackedWeight:
        """Return the packed weight of `module`."""
        with safe_open(self._file(module), framework="numpy") as file:
            return PackedWeight(file.get_tensor(f"{module}.codes"), file.get_tensor(f"{module}.scale"))

    def quantized(self, module: str) -> QuantizedWeight:
        """Return the weight of `module` as the oracle reads it."""
        stored, form, k = self.read(module), self.format(module), self.in_features(module)
        codes = torch.from_numpy(unpack(stored.packed, form.weight_bits, k))
        scale = torch.from_numpy(stored.scale.astype(np.float32))
        return QuantizedWeight(codes, scale, form.weight_bits, form.group or k)

    def write(self, part: str, modules: list[str]) -> None:
        """Round `modules` to nearest and write them into the file of `part`, unless that file is there already."""
        if self._path(part).exists():
            return
        quantized = {}
        for module in modules:
            weight = self._checkpoint.tensor(self._weight_name(module)).astype(np.float32)
            quantized[module] = quantize_weight(torch.from_numpy(weight), self.format(module))
        self.keep(part, quantized)

    def keep(self, part: str, quantized: Mapping[str, QuantizedWeight]) -> None:
        """Write the codes of the modules of `part`, whole or not at all."""
        tensors = {}
        for module, each in quantized.items():
            scale_type = np.float32 if self.format(module).group is None else np.float16
            tensors[f"{module}.codes"] = pack(each.codes.cpu().numpy(), each.bits)
            tensors[f"{module}.scale"] = np.ascontiguousarray(each.scale.cpu().numpy().astype(scale_type))
        path = self._path(part)
        unfinished = path.with_suffix(".part")
        save_file(tensors, unfinished)
        unfinished.rename(path)

    def share(self, part: str, other: "CodesOnDisk") -> None:
        """Take over the file of `part` from `other`, on the same disk, without a copy."""
        if not self._path(part).exists():
            os.link(other._path(part), self._path(part))

    def drop(self) -> None:
        """Delete all codes."""
        for path in self._folder.glob("*.safetensors"):
            path.unlink()

    def _path(self, part: str) -> Path:
        return self._folder / f"{part}.safetensors"

    def _file(self, module: str) -> Path:
        return self._path(_part_of(module))

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
    checkpoint: Checkpoint, scheme: Scheme, folder: Path, progress: Progress | None = None
) -> CodesOnDisk:
    """Quantise what `scheme` asks for into `folder`, skipping the parts that are there, and return the codes."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = CodesOnDisk(folder, checkpoint, scheme)
    groups = module_groups(checkpoint, scheme)
    for done, (part, modules) in enumerate(groups.items(), 1):
        codes.write(part, modules)
        if progress:
            progress(part, done, len(groups))
    return codes
