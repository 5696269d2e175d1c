"""Verify a compiled model: run it in ONNX Runtime, prefill and decode, and hold it against the PyTorch oracle."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

from planish.compiler.checkpoint import Checkpoint
from planish.compiler.errors import AccuracyError, CheckpointError
from planish.compiler.quantize.arithmetic import channels_of
from planish.compiler.quantize.codes import CodesOnDisk
from planish.compiler.runtime.session import Session
from planish.compiler.verify.oracle import Oracle
from planish.passes.high_impact import SUFFIXES, Segment
from planish.passes.scheme import FLOAT_BITS, Scheme
from planish.passes.transforms import Transforms
from planish.plugins.packing import unpack

__all__ = ["Verification", "verify"]

#: Tokens of the sample that are decoded one by one, behind the prefill of the rest.
_DECODED = 4
#: A layer whose output differs by more than this share of its norm, at any token, has drifted.
_LAYER_TOLERANCE = 1e-3
#: Largest difference of a logit, as a share of the range of the logits.
_LOGITS_TOLERANCE = 1e-3
#: How far past the middle between two codes a value may be rounded, in steps: float noise before the rounding.
_TIE = 5e-3
#: Relative difference of two neighbouring float16 numbers.
_HALF_STEP = 2.0**-10
#: Merged product -> the site that feeds it.
_SITES = {
    "self_attn.qkv_proj": "attn_in",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_up_proj": "ffn_in",
    "mlp.down_proj": "ffn_out",
}

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Verification:
    """How a model compares with the oracle.

    Attributes:
        tokens: tokens compared, the last few of them decoded through the cache.
        logits_error: largest difference of a logit over the range of the logits, roundings followed.
        layer_error: largest relative difference (norm over norm) of a layer's output at one token, likewise.
        roundings: activation and cache codes compared.
        followed: those of them that fell between two codes and were rounded the other way by the oracle.
        unfollowed_error: logits_error of an oracle that keeps to its own roundings. It says how chaotic the model is
            under this scheme, not how well it was compiled.
        perplexity: of the model on these tokens.
        oracle_perplexity: of the oracle, roundings followed.
        unfollowed_perplexity: of the oracle that keeps to its own roundings.
    """

    tokens: int
    logits_error: float
    layer_error: float
    roundings: int
    followed: int
    unfollowed_error: float
    perplexity: float
    oracle_perplexity: float
    unfollowed_perplexity: float


def verify(
    checkpoint: Checkpoint,
    scheme: Scheme,
    codes: CodesOnDisk,
    model: Path,
    token_ids: list[int],
    transforms: Transforms | None = None,
) -> Verification:
    """Compare `model` with the oracle of the same scheme, and of the same transforms, on `token_ids`.

    Raises:
        AccuracyError: naming the site or layer that drifts first.
        CheckpointError: if what a layer puts out has no finite norm in float32, so that nothing can be compared.
    """
    run = _Run(model, checkpoint.config.num_hidden_layers, np.asarray([token_ids]))
    follow = _Following(run, scheme)
    ids = torch.tensor([token_ids])
    with torch.inference_mode():
        oracle = Oracle(checkpoint, scheme, codes.quantized, follow, transforms)
        batch, x, layer_error = oracle.batch(ids), oracle.embed(ids), 0.0
        for i in range(checkpoint.config.num_hidden_layers):
            x = oracle.layer(i, x, batch)
            _check_magnitude(i, x.numpy())
            error = _relative(run.outputs[f"model.layers.{i}"], x.numpy())
            layer_error = max(layer_error, error)
            if not error <= _LAYER_TOLERANCE:
                raise AccuracyError(
                    f"Layer {i} drifts first: its output differs from the oracle's by {error:.2g} of its norm "
                    f"(bound {_LAYER_TOLERANCE:g}). The model in {model.parent} is not what was asked for; "
                    "please report it with the recipe."
                )
        logits = oracle.head(x).numpy()
        unfollowed = Oracle(checkpoint, scheme, codes.quantized, None, transforms).logits(ids).numpy()
    logits_error = _of_range(run.outputs["logits"], logits)
    if not logits_error <= _LOGITS_TOLERANCE:
        raise AccuracyError(
            f"lm_head drifts first: the logits differ from the oracle's by {logits_error:.2g} of their range "
            f"(bound {_LOGITS_TOLERANCE:g}), while every layer agrees."
        )
    return Verification(
        len(token_ids),
        logits_error,
        layer_error,
        follow.roundings,
        follow.followed,
        _of_range(run.outputs["logits"], unfollowed),
        *(_perplexity(each, ids) for each in (run.outputs["logits"], logits, unfollowed)),
    )


class _Run:
    """One run of the model, with everything the oracle is compared with: codes, caches, layer outputs, logits."""

    def __init__(self, model: Path, layers: int, token_ids: npt.NDArray[np.int64]) -> None:
        proto = onnx.load(model, load_external_data=False)
        made = {name for node in proto.graph.node for name in node.output}
        names = [f"model.layers.{i}" for i in range(layers)]
        self.sites: dict[str, str] = {}
        for i in range(layers):
            for module, site in _SITES.items():
                for linear in (f"model.layers.{i}.{module}", f"model.layers.{i}.{module}.matmul"):
                    for suffix in SUFFIXES:
                        if (name := f"{linear}{suffix}.input") in made:
                            self.sites[f"model.layers.{i}.{site}{suffix}"] = name
        if "lm_head.input" in made:
            self.sites["lm_head"] = "lm_head.input"
        names += self.sites.values()
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        traced = model.with_name("verify.onnx")  # beside the model, whose external data it shares
        try:
            onnx.save(proto, traced)
            self.outputs = self._collect(Session(traced), names, token_ids)
        finally:
            traced.unlink(missing_ok=True)

    @staticmethod
    def _collect(session: Session, names: list[str], token_ids: npt.NDArray[np.int64]) -> dict[str, Array]:
        prefill = max(2, token_ids.shape[1] - _DECODED)
        pieces: dict[str, list[Array]] = {name: [] for name in ("logits", *names)}
        steps = [token_ids[:, :prefill], *np.split(token_ids[:, prefill:], token_ids.shape[1] - prefill, axis=1)]
        cache = None
        for step in steps if token_ids.shape[1] > prefill else steps[:1]:
            logits, cache, extra = session.run_traced(step, cache, names)
            pieces["logits"].append(logits)
            for name, value in zip(names, extra, strict=True):
                pieces[name].append(value)
        assert cache is not None
        outputs = {name: np.concatenate(parts, axis=1) for name, parts in pieces.items()}
        cached = zip(session.cache_inputs, cache.tensors, strict=True)
        return outputs | {name.replace("past_key_values", "present"): value.numpy() for name, value in cached}

    def cached(self, layer: int, part: int, bits: int, head_dim: int) -> tuple[Array, Array]:
        """Return codes and stored scale and zero, [..., head_dim] and [..., 2], of keys (0) or values (1)."""
        role = ("key", "value")[part]
        codes = unpack(self.outputs[f"present.{layer}.{role}"], bits, head_dim)
        if f"present.{layer}.{role}_scale" in self.outputs:
            return codes, self.outputs[f"present.{layer}.{role}_scale"]
        scales = self.outputs[f"present.{layer}.scale"]
        batch, _, _, tokens = scales.shape
        by_kind = scales.reshape(batch, 2, 2, -1, tokens)  # scale and zero, keys and values, heads
        return codes, np.ascontiguousarray(by_kind[:, :, part].transpose(0, 2, 3, 1))


class _Following:
    """Follows the roundings of a run, after checking that each is one of the two nearest codes of a near tie."""

    def __init__(self, run: _Run, scheme: Scheme) -> None:
        self._run = run
        self._scheme = scheme
        self.roundings = 0
        self.followed = 0

    def activation(self, site: str, segment: Segment, scaled: Tensor, codes: Tensor) -> Tensor:
        """Return the codes of the run in a segment of the channels at `site`."""
        site, zero = segment.of(site), 1 << segment.format.activation_bits - 1
        theirs = torch.from_numpy(self._run.outputs[self._run.sites[site]])
        if theirs.shape != codes.shape:  # SpreadRestSegmentPass leaves them among the others
            theirs = channels_of(theirs, segment)
        self._check(site, scaled.clamp(-zero, zero - 1) + zero, codes, theirs)
        return theirs

    def cached(self, name: str, x: Tensor, codes: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes and scales of the run's cache."""
        layer, role = name.removeprefix("model.layers.").split(".")
        bits = self._scheme.key_bits if role == "key" else self._scheme.value_bits
        assert bits != FLOAT_BITS
        parts = self._run.cached(int(layer), ("key", "value").index(role), bits, x.shape[-1])
        their_codes, their_stored = (torch.from_numpy(part) for part in parts)
        bound = stored.float().abs() * _HALF_STEP + 1e-7
        # The zero of a clipped grid may be near 0 where the keys and values are not, and has their noise.
        bound[..., 1] += _TIE * stored[..., 0].float()
        off = (their_stored.float() - stored.float()).abs() > bound
        if off.any():
            raise AccuracyError(f"{name} drifts first: {int(off.sum())} cached scales differ from the oracle's.")
        scale, zero = their_stored.float().chunk(2, -1)
        self._check(name, ((x - zero) / scale).clamp(0, 2**bits - 1), codes, their_codes)
        return their_codes, their_stored

    def _check(self, name: str, exact: Tensor, codes: Tensor, theirs: Tensor) -> None:
        wrong = int(((exact - theirs.float()).abs() > 0.5 + _TIE).sum())
        if wrong:
            raise AccuracyError(
                f"{name} drifts first: {wrong} of {codes.numel()} codes are not what the oracle rounds to. "
                "The compiled model is not what was asked for; please report it with the recipe."
            )
        self.roundings += codes.numel()
        self.followed += int((codes != theirs).sum())


def _check_magnitude(layer: int, x: Array) -> None:
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(x, axis=-1)
    if not np.isfinite(norms).all():
        raise CheckpointError(
            f"What layer {layer} puts out is too large for float32, or not finite. The checkpoint is damaged or its "
            "training diverged: download it again or take an earlier one."
        )


def _relative(value: Array, reference: Array) -> float:
    """Return the largest relative difference of a row, norm over norm."""
    difference = np.linalg.norm(value - reference, axis=-1)
    return float((difference / np.maximum(np.linalg.norm(reference, axis=-1), 1e-20)).max())


def _perplexity(logits: Array, ids: Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits[0, :-1]).double(), ids[0, 1:])
    return math.exp(min(loss.item(), 700.0))


def _of_range(value: Array, reference: Array) -> float:
    return float(np.abs(value - reference).max() / (reference.max() - reference.min()))
