"""A model to be measured: a bundle run by ONNX Runtime or TensorRT, or a checkpoint that transformers runs."""

import dataclasses
import hashlib
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

from planish.compiler.bundle.bundle import Bundle
from planish.compiler.bundle.layout import MANIFEST_FILE, RECIPE_FILE
from planish.compiler.bundle.manifest import FileRecord
from planish.compiler.checkpoint import Checkpoint, open_checkpoint
from planish.compiler.checkpoint.sidecars import end_tokens
from planish.compiler.errors import CheckpointError, ComparisonError, UnsupportedModelError
from planish.compiler.measure.texts import Text
from planish.compiler.runtime.language_model import LanguageModel
from planish.compiler.runtime.processor import cpu_flags
from planish.compiler.runtime.provider import Provider
from planish.compiler.runtime.runnable import ENGINES
from planish.compiler.runtime.tokenizer import Tokenizer

__all__ = [
    "Subject",
    "check_same_tokens",
    "check_same_vocabulary",
    "float_subject",
    "is_bundle",
    "open_subject",
]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is measured, and what measuring needs of it.

    Attributes:
        name: what it is called.
        origin: what it was opened from.
        model: runs it.
        tokenizer: of the model.
        max_context: the longest context, in tokens.
        bos: the token that stands in front of a text without context: BOS, or EOS where there is none.
        eos: tokens that end a text.
        fingerprint: differs when what the model computes may differ.
    """

    name: str
    origin: Bundle | Checkpoint
    model: LanguageModel
    tokenizer: Tokenizer
    max_context: int
    bos: int
    eos: tuple[int, ...]
    fingerprint: str


def open_subject(
    source: str | Path,
    *,
    target: str | None = None,
    threads: int | None = None,
    provider: Provider | str = Provider.CPU,
) -> Subject:
    """Open a bundle, or read a checkpoint into memory as float32.

    Args:
        source: the folder of a bundle, or what `open_checkpoint` takes.
        target: of a bundle, what to run; see `Bundle.load`.
        threads: of the model; None is one per core.
        provider: of a bundle, where ONNX Runtime runs it; see `Bundle.load`.

    Raises:
        UnsupportedModelError: if a target or a provider is asked for and the source is no bundle.
        PlanishError: as `Bundle.open`, `Bundle.load` and `open_checkpoint` do.
    """
    if is_bundle(source):
        return _of_bundle(Bundle.open(source), target, threads, Provider(provider))
    if target is not None or provider != Provider.CPU:
        raise UnsupportedModelError(
            f"{source} is no bundle: a checkpoint has no targets and is run in float32 on the CPU. Leave out --target "
            "and --provider."
        )
    return _of_checkpoint(open_checkpoint(source), threads)


def is_bundle(source: str | Path) -> bool:
    """Say whether `source` is a bundle, or an ONNX file, which only belongs to one, rather than a checkpoint."""
    path = Path(source)
    return (path / MANIFEST_FILE).is_file() or path.suffix == ".onnx"


def float_subject(bundle: Bundle, threads: int | None = None) -> Subject:
    """Open the float model that `bundle` was compiled from, where its recipe says it lies.

    Raises:
        ComparisonError: if there is no recipe, its checkpoint cannot be opened, or has been changed since.
    """
    from planish.compiler.checkpoint.first_layers import open_first_layers
    from planish.compiler.pipeline.recipe import Recipe

    if not (bundle.path / RECIPE_FILE).is_file():
        raise ComparisonError(f"{bundle.path} has no {RECIPE_FILE} that names its float model. Name it by --against.")
    recipe = Recipe.read(bundle.path / RECIPE_FILE)
    try:
        checkpoint = open_first_layers(recipe.model, recipe.num_layers)
    except CheckpointError as error:
        raise ComparisonError(
            f"The float model of {bundle.path} cannot be opened: {error} Or name it by --against."
        ) from error
    if checkpoint.fingerprint() != bundle.manifest.checkpoint:
        raise ComparisonError(
            f"{bundle.path} was compiled from another {recipe.model} than the one that is there now. "
            "Name its float model by --against."
        )
    return _of_checkpoint(checkpoint, threads)


def check_same_tokens(subjects: list[Subject], text: Text) -> None:
    """Check that the tokens of `text` are the same, and mean the same, to all models.

    Raises:
        ComparisonError: naming two models whose tokenizers differ.
    """
    first, *others = subjects
    vocabulary, ids = first.tokenizer.vocabulary(), first.tokenizer.encode(text.content)
    for other in others:
        found = other.tokenizer.encode(text.content)
        if found != ids or other.tokenizer.vocabulary() != vocabulary:
            raise ComparisonError(
                f"{first.name} and {other.name} have different tokenizers ({len(ids)} and {len(found)} tokens in "
                f"{text.name}), so what they measure per token does not compare. Compare models of one tokenizer."
            )


def check_same_vocabulary(subjects: list[Subject]) -> None:
    """Check that all models give as many logits: one tokenizer may be padded to several sizes of embedding.

    Raises:
        ComparisonError: naming two models that do not, between which there is no divergence.
    """
    first, *others = subjects
    size = first.origin.config.vocab_size
    for other in others:
        if other.origin.config.vocab_size != size:
            raise ComparisonError(
                f"{first.name} and {other.name} have {size} and {other.origin.config.vocab_size} logits (vocab_size in "
                "config.json), so there is no divergence between them. Compare models of one vocab_size, or leave "
                "the divergence out."
            )


def _of_bundle(bundle: Bundle, target: str | None, threads: int | None, provider: Provider) -> Subject:
    model, executed = bundle.load(target, threads, provider), bundle.model_path(target).relative_to(bundle.path)
    # Another runtime, or another processor, rounds sums in another order; an engine's GPU is part of `runs_on`.
    runs_on = model.runs_on if target in ENGINES else f"{model.runs_on} {_processor()}"
    return Subject(
        name=str(bundle.path),
        origin=bundle,
        model=model,
        tokenizer=bundle.tokenizer,
        max_context=bundle.max_context(model),
        bos=_bos(bundle.tokenizer, bundle.config.bos_token_id, bundle.eos_token_ids),
        eos=bundle.eos_token_ids,
        fingerprint=f"{FileRecord.of(bundle.path / MANIFEST_FILE).sha256} {executed} {runs_on}",
    )


def _of_checkpoint(checkpoint: Checkpoint, threads: int | None) -> Subject:
    from planish.compiler.measure.reference import Reference

    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        checkpoint.write_sidecars(Path(folder))
        tokenizer = Tokenizer(Path(folder))
        eos = end_tokens(Path(folder), checkpoint.config)
        bos = _bos(tokenizer, checkpoint.config.bos_token_id, eos)
    model = Reference(checkpoint, threads)
    runs_on = f"transformers {version('transformers')} {model.runs_on} {_processor()}"
    return Subject(
        name=checkpoint.name,
        origin=checkpoint,
        model=model,
        tokenizer=tokenizer,
        max_context=checkpoint.config.max_context,
        bos=bos,
        eos=eos,
        fingerprint=f"{checkpoint.fingerprint()} float32 {runs_on}",
    )


def _processor() -> str:
    """Return a hash (hex) of the processor's kind and feature flags, by which runtimes choose their kernels."""
    named = " ".join((platform.machine(), platform.processor(), *cpu_flags()))
    return hashlib.sha256(named.encode()).hexdigest()[:16]


def _bos(tokenizer: Tokenizer, of_config: int | None, eos: tuple[int, ...]) -> int:
    """Return BOS by the tokenizer's settings, else EOS by them (as lm-evaluation-harness does), else by config.json."""
    for token in (tokenizer.special_token("bos_token"), tokenizer.special_token("eos_token"), of_config, *eos):
        if token is not None:
            return token
    return 0
