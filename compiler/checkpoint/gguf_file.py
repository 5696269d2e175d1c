"""A GGUF file, dequantised one tensor at a time and brought into the layout of transformers."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from planish.compiler.checkpoint.base import Checkpoint
from planish.compiler.checkpoint.files import fingerprint_files, remedy_for, write_json, write_text
from planish.compiler.checkpoint.gguf_config import hf_config
from planish.compiler.checkpoint.gguf_tokenizer import build_tokenizer, tokenizer_config
from planish.compiler.checkpoint.tensors import check_tensors
from planish.compiler.errors import CheckpointError, UnsupportedModelError
from planish.compiler.optional import require

__all__ = ["GgufCheckpoint"]

#: GGUF name of a tensor inside a block -> name in transformers.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

#: Holds the frequency factors of the rope, which `hf_config` turns into parameters.
_ROPE_FACTORS = "rope_freqs.weight"


class GgufCheckpoint(Checkpoint):
    """A GGUF file of llama architecture. Every tensor reads as float32, whatever it is stored in."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        """Read the file's metadata and check its tensors.

        Raises:
            CheckpointError: if the file is missing, damaged or incomplete.
            UnsupportedModelError: if the model is not one planish compiles.
            MissingExtraError: if the package gguf is not installed.
        """
        self._path = path
        reader = _open_reader(path)
        self._metadata = {key: field.contents() for key, field in reader.fields.items()}
        self._stored = {_hf_name(tensor.name): _Stored(tensor) for tensor in reader.tensors}
        factors = self._stored.pop(_ROPE_FACTORS, None)
        raw_config = hf_config(
            self._metadata,
            {name: stored.shape for name, stored in self._stored.items()},
            None if factors is None else factors.read(path).reshape(-1),
        )
        super().__init__(name or path.stem, raw_config)
        check_tensors(str(path), self.config, {name: stored.shape for name, stored in self._stored.items()})

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return float32."""
        self.shape(name)
        return np.dtype(np.float32)

    def _read(self, name: str) -> npt.NDArray[Any]:
        self.shape(name)
        weights = self._stored[name].read(self._path)
        if ".q_proj." in name:
            return _to_half_split(weights, self.config.num_attention_heads)
        if ".k_proj." in name:
            return _to_half_split(weights, self.config.num_key_value_heads)
        return weights

    def fingerprint(self) -> str:
        """Return a sha256 over the file, which holds everything; see `fingerprint_files` for what it sees."""
        return fingerprint_files([self._path], {self._path: [stored.offset for stored in self._stored.values()]})

    @cached_property
    def _tokenizer_json(self) -> str:
        """The content of tokenizer.json."""
        return build_tokenizer(self._path, self._metadata)

    def check_tokenizer(self) -> None:
        """Check that a tokenizer can be made from the file's metadata."""
        _ = self._tokenizer_json

    def write_sidecars(self, folder: Path) -> None:
        """Write the configuration, tokenizer and chat template that the metadata describes."""
        tokenizer = self._tokenizer_json
        folder.mkdir(parents=True, exist_ok=True)
        settings = tokenizer_config(self._metadata)
        special = {key: value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str)}
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(folder / "config.json", self.raw_config)
        write_json(folder / "generation_config.json", {key: self.raw_config[key] for key in ids})
        write_json(folder / "tokenizer_config.json", settings)
        write_json(folder / "special_tokens_map.json", special)
        write_text(folder / "tokenizer.json", tokenizer)
        if "chat_template" in settings:
            write_text(folder / "chat_template.jinja", settings["chat_template"])


class _Stored:
    """One tensor of the file: where it lies and how it is quantised."""

    def __init__(self, tensor: Any) -> None:
        self.kind = tensor.tensor_type
        self.shape = tuple(int(n) for n in reversed(tensor.shape))
        self.offset, self._size = int(tensor.data_offset), int(tensor.n_bytes)

    def read(self, path: Path) -> npt.NDArray[np.float32]:
        """Read and dequantise the tensor."""
        data = np.fromfile(path, np.uint8, self._size, offset=self.offset)
        if data.size != self._size:
            raise CheckpointError(f"{path} became shorter while it was read. Start again when it is complete.")
        plain = {"F32": np.float32, "F16": np.float16}.get(self.kind.name)
        if plain is not None:
            return data.view(plain).astype(np.float32, copy=False).reshape(self.shape)
        try:
            weights = require("gguf").quants.dequantize(data.reshape(*self.shape[:-1], -1), self.kind)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{path} is quantised as {self.kind.name}, which the gguf package cannot read. Give planish "
                "a GGUF file in F16, or the original checkpoint."
            ) from error
        result: npt.NDArray[np.float32] = weights.reshape(self.shape)
        return result


def _open_reader(path: Path) -> Any:
    """Read the file's header with the gguf package."""
    gguf = require("gguf")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Check the path.")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # a file cut anywhere fails in as many ways
        raise CheckpointError(f"{path} is truncated or not a GGUF file ({error}). {remedy_for(path)}") from error
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise UnsupportedModelError(
            f"{path} is one of {parts.contents()} parts. Join them with llama-gguf-split --merge."
        )
    if reader.endianess is not gguf.GGUFEndian.LITTLE:
        raise UnsupportedModelError(f"{path} is big-endian. Convert it with gguf-convert-endian.")
    end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
    if path.stat().st_size < end:
        raise CheckpointError(f"{path} is truncated: {path.stat().st_size} bytes instead of {end}. Download it again.")
    return reader


def _hf_name(name: str) -> str:
    """Return transformers' name for a GGUF tensor; names without a counterpart are kept."""
    head, _, kind = name.rpartition(".")
    if head.startswith("blk.") and head.count(".") >= 2:
        _, layer, part = head.split(".", 2)
        return f"model.layers.{layer}.{_BLOCK[part]}.{kind}" if part in _BLOCK else name
    return f"{_OUTSIDE[head]}.{kind}" if head in _OUTSIDE else name


def _to_half_split(weights: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Reorder the rows of a query or key projection (or its bias) within each head.

    GGUF files rotate neighbouring channels (0,1), (2,3), ...; transformers rotates channel i with
    i + head_dim / 2. So the even channels of a head come first, then the odd ones.
    """
    pairs = weights.reshape(heads, -1, 2, *weights.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weights.shape)
