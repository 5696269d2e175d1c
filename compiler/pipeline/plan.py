"""plan.json: what every linear and the cache got, with the error it costs, and what stayed in floating point."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.quantize.arithmetic import channels_of, dequantize_weight
from planish.compiler.quantize.codes import CodesOnDisk, module_groups
from planish.passes.formats import LM_HEAD
from planish.passes.scheme import Scheme

__all__ = ["make_plan"]

#: Rows that are squared at a time.
_ROWS = 4096


def make_plan(
    checkpoint: Checkpoint,
    scheme: Scheme,
    codes: CodesOnDisk,
    left_float: Sequence[str],
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Return the content of plan.json.

    Per quantised linear: its format, its stored bits per weight with scales counted, the SQNR of its weight in dB,
    10 log10(sum W^2 / sum (W - Wq)^2), null where nothing was lost, and its high-impact input channels where it has
    any.

    Args:
        checkpoint: as it was when the weights were rounded.
        scheme: of the model.
        codes: of every module as it was rounded.
        left_float: modules in floating point.
        progress: (modules done, modules in all).
    """
    modules = [module for group in module_groups(checkpoint, scheme).values() for module in group]
    linears = []
    for done, module in enumerate(modules, 1):
        linears.append(_linear(checkpoint, scheme, codes, module))
        progress(done, len(modules))
    config = checkpoint.config
    return {
        "scheme": str(scheme),
        "lm_head": str(scheme.lm_head),
        "linears": linears,
        "left_float": [{"module": module, "reason": _reason(module)} for module in left_float],
        "cache": {
            "key_bits": scheme.key_bits,
            "value_bits": scheme.value_bits,
            "bytes_per_token": scheme.kv_bytes_per_token(
                config.num_hidden_layers, config.num_key_value_heads, config.head_dim
            ),
        },
    }


def _linear(checkpoint: Checkpoint, scheme: Scheme, codes: CodesOnDisk, module: str) -> dict[str, Any]:
    tied = module == LM_HEAD and checkpoint.config.tie_word_embeddings
    weight = torch.from_numpy(
        checkpoint.tensor("model.embed_tokens.weight" if tied else f"{module}.weight").astype("float32")
    )
    *high, rest = codes.segments(module)
    form, lost, stored = rest.format, 0.0, 0
    for segment in (*high, rest):
        name = segment.of(module)
        off = channels_of(weight, segment) - dequantize_weight(codes.quantized(name))
        lost += _energy(off)
        packed = codes.read(name)
        stored += packed.packed.nbytes + packed.scale.nbytes
    held = _energy(weight)
    entry = {
        "module": module,
        "format": str(form),
        "weight_bits": form.weight_bits,
        "activation_bits": form.activation_bits,
        "group": form.group,
        "shape": list(weight.shape),
        "average_bits": round(8 * stored / weight.numel(), 4),
        "weight_sqnr_db": round(10 * math.log10(held / lost), 2) if lost and held else None,
    }
    for each in high:
        entry["high"] = {"bits": each.format.weight_bits, "count": each.size(weight.shape[1])}
    return entry


def _energy(matrix: Tensor) -> float:
    """Return the sum of squares, in float64 but without a float64 copy of the whole, which is as large as lm_head."""
    return math.fsum(float(rows.double().square().sum()) for rows in torch.split(matrix, _ROWS))


def _reason(module: str) -> str:
    return "the lm_head format is float" if module == LM_HEAD else "the scheme leaves linears in floating point"
