"""What a compile will take and make, from the shapes of a model alone: bytes on disk, memory, and time.

Sizes are counted as the passes and targets store things, so they are right to a few per cent; memory and time are
rough.
"""

import dataclasses

from planish.compiler.calibrate.settings import SELF
from planish.compiler.checkpoint.config import LlamaConfig
from planish.compiler.learn.transforms.candidates import Form
from planish.compiler.learn.transforms.hadamard import split_width
from planish.compiler.pipeline.recipe import Recipe, Target
from planish.compiler.pipeline.stored_weights import FOR_ENGINES, FOR_ORT, PACKED, HighShares, blocks_bytes, model_bytes
from planish.compiler.select.forms import form_of
from planish.compiler.select.high_channels import SEQUENCES, HighPolicy
from planish.compiler.select.policy import SelectionPolicy, linear_flops
from planish.passes.scheme import Scheme
from planish.passes.transforms import Kind, Site

__all__ = ["Estimate", "Work", "estimate", "unasked_polish"]

#: Bytes of a graph without its weights: of any, of a decoder block in floating point, and what blocks have more where
#: activations are quantised, where the cache is, and where transforms run.
_PORTABLE_GRAPH, _ORT_GRAPH = (12_000, 6_000, 2_000, 1_000, 2_600), (10_000, 6_000, 7_000, 20_000, 7_000)
#: Bytes of plan and report, of any and per decoder block: rounded to nearest, and flattened.
_ROUNDED_RECORDS, _FLAT_RECORDS = (34_000, 4_600), (315_000, 24_000)
#: How many times the bytes of its ONNX file an engine takes, with kernels for three generations of GPUs.
_ENGINE = 1.1
#: Work in passes of the calibration text through the linears, measured on SmolLM2 with 16 x 512 tokens.
_PASSES_TO_FLATTEN, _PASSES_TO_REFINE, _PASSES_TO_POLISH, _PASSES_TO_WRITE = 14.5, 10.0, 5.4, 4.0
#: The same to choose transforms, by policy; the others take none.
_PASSES_TO_CHOOSE = {"measured": 20.0, "auto": 20.0, "search": 110.0}
#: The same to fit transforms that high-impact channels are chosen behind; and in passes of the sequences that these are
#: chosen on, to find how much depends on each channel, and what numbers of them cost.
_PASSES_TO_FIT, _PASSES_TO_RANK, _PASSES_TO_SOLVE = 5.0, 9.2, 68.0
#: Seconds of any compile, and per weight that is rounded, and that is flattened: likewise.
_SECONDS, _SECONDS_ROUNDED, _SECONDS_FLAT = 10.0, 2.5e-7, 2e-7
#: Epochs of polishing, and the most weights of linears for which it is done unasked: 4 GB of float32.
_POLISH_EPOCHS, _MOST_TO_POLISH = 4, 10**9
#: Bytes of the interpreter with what it imports.
_BASE = 600_000_000


@dataclasses.dataclass(frozen=True)
class Work:
    """How much a compile has to do.

    Attributes:
        policy: how transforms are chosen.
        nsamples: calibration sequences.
        seqlen: tokens in each.
        refine: epochs of refining each block.
        polish: epochs of polishing.
        writes_text: whether the model writes its calibration text itself.
        targets: what is lowered to.
        high: how high-impact channels are chosen; None is not at all.
    """

    policy: SelectionPolicy
    nsamples: int
    seqlen: int
    refine: int
    polish: int
    writes_text: bool
    targets: tuple[Target, ...]
    high: HighPolicy | None = None

    @classmethod
    def of(cls, recipe: Recipe, config: LlamaConfig) -> "Work":
        """Return the work of a recipe on a model.

        Raises:
            CalibrationError: if the recipe's calibration cannot be.
            SelectionError: if its policy, or its high-impact channels, cannot be.
        """
        calibration = recipe.calibration(config.max_context)
        polish = unasked_polish(config) if recipe.polish is None else recipe.polish
        return cls(
            recipe.parsed_policy(),
            calibration.nsamples,
            calibration.seqlen,
            recipe.refine,
            polish,
            calibration.dataset == SELF,
            recipe.targets,
            recipe.parsed_high_policy(),
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a compile takes and makes.

    Attributes:
        sizes: bytes in the bundle: `portable`, each target, `transforms` (plan.safetensors) and `records` (plan and
            report); the files of the tokenizer are not in it.
        bundle: bytes of them together.
        disk: bytes that the compile needs at its end, before the work folder is removed.
        memory: bytes that are resident at most, about.
        flops: floating-point operations of learning, about; 0 where nothing is learned.
        weights: of the linears, each of which is read, rounded, written and verified besides.
    """

    sizes: dict[str, int]
    bundle: int
    disk: int
    memory: int
    flops: float
    weights: int

    def seconds(self, speed: float) -> float:
        """Return about how long the compile takes on a machine of `speed` FLOPs per second."""
        return self.flops / speed + _SECONDS + self.weights * (_SECONDS_ROUNDED + (_SECONDS_FLAT if self.flops else 0))


def estimate(config: LlamaConfig, scheme: Scheme, work: Work) -> Estimate:
    """Return what a compile of a model with this config takes.

    Which forms `measured` and `auto` choose is not known before; they are taken for affine maps, which is what their
    budget allows. Nor is how many high-impact channels each site gets: they are taken for the same share everywhere,
    as much as the budget allows.

    Args:
        config: of the model.
        scheme: with the formats that overrides ask for.
        work: what there is to do.

    Raises:
        SelectionError: if the budget of high-impact channels is below what low bits take.
    """
    high = None if work.high is None else HighShares.of(config, scheme.linear, work.high)
    layers = config.num_hidden_layers
    stored, online = _transform_entries(config, scheme, work.policy)
    flat = work.policy.name != "none"
    sizes = {
        "portable": model_bytes(config, scheme, PACKED, high)
        + 4 * online
        + _graph(_PORTABLE_GRAPH, layers, scheme, flat)
    }
    for target in work.targets:
        if target == "ort":
            sizes[target] = (
                model_bytes(config, scheme, FOR_ORT, high) + 4 * online + _graph(_ORT_GRAPH, layers, scheme, flat)
            )
        else:
            sizes[target] = int((1 + _ENGINE) * (model_bytes(config, scheme, FOR_ENGINES, high) + 2 * online))
    if stored:
        sizes["transforms"] = 4 * stored
    records, of_layer = _FLAT_RECORDS if flat else _ROUNDED_RECORDS
    sizes["records"] = records + of_layer * layers
    bundle = sum(sizes.values())
    return Estimate(
        sizes,
        bundle,
        bundle + _working(config, scheme, work, stored, high),
        _memory(config, work, stored),
        _flops(config, work),
        linear_flops(config) // 2,
    )


def unasked_polish(config: LlamaConfig) -> int:
    """Return for how many epochs a model is polished where the recipe does not say: none if it is too large."""
    return _POLISH_EPOCHS if linear_flops(config) // 2 <= _MOST_TO_POLISH else 0


def _graph(sizes: tuple[int, ...], layers: int, scheme: Scheme, flat: bool) -> int:
    whole, block, *more = sizes
    integers = not (scheme.linear.is_float or scheme.linear.weight_only)
    has = (integers, scheme.quantizes_cache, flat)
    return whole + layers * (block + sum(extra for extra, there in zip(more, has, strict=True) if there))


def _transform_entries(config: LlamaConfig, scheme: Scheme, policy: SelectionPolicy) -> tuple[int, int]:
    """Return how many numbers the transforms of all blocks have, and how many of them run online."""
    if policy.name == "none":
        return 0, 0
    kind: Kind = policy.kind or "affine"
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    mixing = heads * heads if heads > 1 else 0
    # Keys are mapped for each KV head, queries for each of theirs, where the cache is rounded; the value map folds.
    stored, online = mixing + kv_heads * d * d, mixing
    if scheme.quantizes_cache:
        stored, online = stored + kv_heads * d * d, online + (kv_heads + heads) * d * d
    widths: dict[Site, int] = {
        "attn_in": config.hidden_size,
        "ffn_in": config.hidden_size,
        "ffn_out": config.intermediate_size,
    }
    for site, width in widths.items():
        scale, factors = _factor_entries(form_of(site, kind), width)
        stored, online = stored + scale + factors, online + factors
    return stored * config.num_hidden_layers, online * config.num_hidden_layers


def _factor_entries(form: Form, width: int) -> tuple[int, int]:
    """Return how many numbers the channel scale of a form has, and its factors; see `FORMS`."""
    if not form.startswith("blocks"):
        rows, columns = split_width(width)
        return width, columns * columns + (rows * rows if rows > 1 else 0)
    size = max(each for each in range(1, int(form.removeprefix("blocks")) + 1) if width % each == 0)
    blocks = width // size
    return 0, width * size + (blocks * blocks if blocks > 1 else 0)


def _working(config: LlamaConfig, scheme: Scheme, work: Work, stored: int, high: HighShares | None) -> int:
    """Return the bytes of what lies beside the bundle until the end: codes, hidden states, transforms by block."""
    if scheme.linear.is_float:
        return 0
    codes = blocks_bytes(config, scheme, PACKED, high)
    if work.policy.name == "none":
        return codes
    # Two streams into a block and two out of it; codes, and those that polishing starts from; its state is four times
    # what it learns.
    streams = 4 * 4 * work.nsamples * work.seqlen * config.hidden_size
    return streams + (2 * codes + 4 * 5 * stored if work.polish else codes + 4 * stored)


def _memory(config: LlamaConfig, work: Work, stored: int) -> int:
    """Return about the most bytes that are resident: in the stage that takes most, as measured on SmolLM2."""
    table, logits = 4 * config.vocab_size * config.hidden_size, 4 * work.seqlen * config.vocab_size
    # The weight of lm_head and its rounding error, in float64 too.
    planned = 7 * table
    if work.policy.name == "none":
        return _BASE + planned
    linears, widest = linear_flops(config) // 2, max(config.hidden_size, config.intermediate_size)
    # A block as it was, folded, and rounded, one of them in float64 meanwhile; moments and Hessians of its widest site.
    block = 4 * 5 * linears // config.num_hidden_layers + 8 * 5 * widest * widest
    compared = 2 * table + 8 * logits
    # The model folded and rounded, what learns with its two moments and its best, and the logits of a gradient.
    polished = 14 * linears + 2 * table + 6 * logits + 4 * 4 * stored if work.polish else 0
    return _BASE + max(block, compared, polished, planned)


def _flops(config: LlamaConfig, work: Work) -> float:
    if work.policy.name == "none":
        return 0.0
    passes = _PASSES_TO_FLATTEN + _PASSES_TO_REFINE * work.refine + _PASSES_TO_POLISH * work.polish
    passes += _PASSES_TO_CHOOSE.get(work.policy.name, 0.0) + (_PASSES_TO_WRITE if work.writes_text else 0)
    sequences = passes * work.nsamples
    if work.high is not None:
        ranked = _PASSES_TO_RANK + (_PASSES_TO_SOLVE if work.high.name == "solved" else 0)
        sequences += _PASSES_TO_FIT * work.nsamples + ranked * min(work.nsamples, SEQUENCES)
    return sequences * linear_flops(config) * float(work.seqlen)
