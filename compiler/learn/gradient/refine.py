"""Refine the transforms and clips of one block by gradient descent, never to a worse start than was given."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from planish.compiler.learn.block import Angles, Block, FloatHooks, Hooks, run_block
from planish.compiler.learn.gradient.block_loss import (
    conditioning,
    held_out_loss,
    residual_loss,
    rounded_to_nearest,
    starting_clips,
)
from planish.compiler.learn.gradient.trainable import Trainable
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.site_factors import closed_form_factors
from planish.compiler.learn.transforms.site_moments import gather_moments
from planish.compiler.progress import Progress, Silent
from planish.compiler.select.forms import forms_of_groups
from planish.passes.scheme import Scheme
from planish.passes.transforms import Site

__all__ = ["Descent", "Inputs", "Refined", "Refinement", "refine"]

Inputs = Literal["float", "seen", "mixed"]

#: Share of its start that the learning rate falls to, along a cosine.
_LAST_RATE = 1e-3
#: Norm that gradients, of a loss divided by its own size, are cut to.
_LARGEST_GRADIENT = 1.0


@dataclasses.dataclass(frozen=True)
class Refinement:
    """How a block is refined.

    Attributes:
        epochs: passes over the sequences to fit to.
        batch: sequences to a step.
        inputs: what the block reads meanwhile: the `float` stream, the stream `seen` from the blocks quantised so far,
            or both, `mixed`, counting half each. The outputs aimed at are what the float block makes of the same: a
            block that makes up for what earlier ones got wrong suits the calibration text and hardly any other.
        rate: of learning transforms and weight scales, at the start.
        clip_rate: of learning the logits of clips.
        seed: of the order of sequences, and of the rotation that is fallen back to.
    """

    epochs: int = 5
    batch: int = 2
    inputs: Inputs = "seen"
    rate: float = 1e-2
    clip_rate: float = 5e-2
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Refined:
    """What refinement made.

    Attributes:
        factors: by site, float32 and detached.
        clips: by site, of those that have a grid.
        weight_scale_multipliers: by module, float32 [groups, out]: of the scales that `quantize_weight` finds for the
            folded weight; None where those themselves were kept.
        evidence: `held_out_losses` of the start and after every epoch, `kept_epoch` (0 is the start),
            `inverse_error` and `log10_condition` of the worst factor, and `fallback`, in words, if there was one.
    """

    factors: dict[Site, Factors]
    clips: dict[Site, float]
    weight_scale_multipliers: dict[str, Tensor] | None
    evidence: dict[str, Any]


def refine(
    block: Block,
    factors: Mapping[Site, Factors],
    streams: Streams,
    outputs: Sequences,
    scheme: Scheme,
    settings: Refinement,
    *,
    clips: Mapping[Site, float] | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Return the best transforms and clips met on the way, the start among them, by the loss on held-out sequences.

    The loss is the mean over tokens of ||y' - y||^2 / ||y||^2, between the float block's output and the low-bit one's,
    weights rounded to nearest. What decides is always measured on the `seen` stream, which the compiled block will
    read. Where the loss or a gradient is not finite, or a factor is too close to singular, the block goes back to the
    best before, and where the start itself is so, to a rotation; `fallback` in the evidence says so, in words.

    Args:
        block: the float block.
        factors: to start from, of all sites.
        streams: its inputs.
        outputs: of the float block on the target stream, float32 [sequences, seq, hidden].
        scheme: to learn for.
        settings: how.
        clips: to start from; 1 where a site is not named. None are those that `starting_clips` finds.
        progress: told about every epoch.
    """
    angles = Angles.of(block.config, streams.target.shape[1], streams.target.device)
    if clips is None:
        # Where maps cannot be inverted there is nothing to search clips with, and a rotation stands in for them.
        usable = conditioning(factors).problem is None
        clips = starting_clips(block, factors, streams, outputs, scheme) if usable else {}
    with fast_products():
        task = _Task(block, streams, {"float": outputs, "seen": _Outputs(block, streams.seen, angles)}, angles, scheme)
        start = _usable_start(task, dict(factors), dict(clips), settings.seed)
        return _learn(task, start, settings, progress or Silent())


@dataclasses.dataclass(frozen=True)
class _Task:
    """What stays as it is while a block is learned; outputs are the float block's, for either stream."""

    block: Block
    streams: Streams
    outputs: Mapping[str, Sequences]
    angles: Angles
    scheme: Scheme

    def loss_of(self, factors: Mapping[Site, Factors], clips: Mapping[Site, float]) -> float:
        """Return the held-out loss with weights rounded to nearest."""
        hooks = rounded_to_nearest(self.block, factors, clips, self.scheme)
        return self.held_out(hooks)

    def held_out(self, hooks: Hooks) -> float:
        """Return the held-out loss of a block that runs with `hooks`."""
        return held_out_loss(self.block, hooks, self.streams, self.outputs["seen"], self.angles)


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """What the float block makes of sequences, computed when they are taken: all of them would fill the memory."""

    block: Block
    inputs: Sequences
    angles: Angles

    @property
    def shape(self) -> torch.Size:
        return self.inputs.shape

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def __len__(self) -> int:
        return len(self.inputs)

    @torch.no_grad()
    def __getitem__(self, part: slice, /) -> Tensor:
        return run_block(self.block.config, FloatHooks(self.block), self.inputs[part], self.angles)


class Descent:
    """AdamW without decay on a loss that is divided by its own size, its rates falling along a cosine."""

    def __init__(self, groups: Sequence[tuple[list[Tensor], float]], steps: int) -> None:
        """Take the parameters with the learning rate of each list of them, and how many steps there will be."""
        self._parameters = [each for parameters, _ in groups for each in parameters]
        named = [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]
        self._optimizer = torch.optim.AdamW(named, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2,
        )

    def step(self, loss: Tensor) -> bool:
        """Take one step downwards; return False, and take none, if the loss or a gradient is not finite."""
        self._optimizer.zero_grad()
        (loss / loss.detach().clamp_min(1e-30)).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, _LARGEST_GRADIENT)
        if not (loss.isfinite() and norm.isfinite()):
            return False
        self._optimizer.step()
        self._schedule.step()
        return True


def _usable_start(task: _Task, factors: dict[Site, Factors], clips: dict[Site, float], seed: int) -> Refined:
    """Return the start measured, or a rotation if something is wrong with it."""
    state = conditioning(factors)
    problem = state.problem
    if problem is None:
        loss = task.loss_of(factors, clips)
        if math.isfinite(loss):
            evidence: dict[str, Any] = {"held_out_losses": [loss], "kept_epoch": 0, **state.evidence()}
            return Refined(factors, clips, None, evidence)
        problem = "the loss at the start is not finite"
    moments = gather_moments(task.block, (task.streams.seen[part] for part in task.streams.batches()), task.angles)
    forms = forms_of_groups({"attn": "rotation", "ffn": "rotation"})
    factors = closed_form_factors(task.block, moments, forms, seed)
    clips = starting_clips(task.block, factors, task.streams, task.outputs["float"], task.scheme)
    evidence = {
        "held_out_losses": [task.loss_of(factors, clips)],
        "kept_epoch": 0,
        **conditioning(factors).evidence(),
        "fallback": f"{problem}; a rotation stands in for it",
    }
    return Refined(factors, clips, None, evidence)


def _learn(task: _Task, start: Refined, settings: Refinement, progress: Progress) -> Refined:
    best = start
    losses: list[float] = list(start.evidence["held_out_losses"])
    told: list[str] = [start.evidence["fallback"]] if "fallback" in start.evidence else []
    batches = list(task.streams.batches(size=settings.batch))
    trainable = Trainable(task.block, start.factors, start.clips, task.scheme)
    groups = [(trainable.transform_parameters(), settings.rate), (trainable.clip_parameters(), settings.clip_rate)]
    descent = Descent(groups, settings.epochs * len(batches))
    generator = torch.Generator().manual_seed(settings.seed)
    for epoch in range(1, settings.epochs + 1):
        order = torch.randperm(len(batches), generator=generator).tolist()
        problem = _pass_over(task, trainable, descent, [batches[index] for index in order], settings.inputs)
        if problem is None:
            with torch.no_grad():
                factors, clips = trainable.factors(), trainable.clips()
            state = conditioning(factors)
            problem = state.problem
        if problem is not None:
            kept = best.evidence["kept_epoch"]
            told.append(f"{problem} in epoch {epoch}; went back to {f'epoch {kept}' if kept else 'the start'}")
            break
        trainable.fit_weight_scales()
        with torch.no_grad():
            loss = task.held_out(trainable.hooks())
        if loss < losses[best.evidence["kept_epoch"]]:
            found: dict[str, Any] = {"kept_epoch": epoch, **state.evidence()}
            best = Refined(factors, clips, trainable.weight_scale_multipliers(), found)
        losses.append(loss)
        progress.step("refine", epoch, settings.epochs)
    evidence = {**best.evidence, "held_out_losses": losses}
    if told:
        evidence["fallback"] = "; ".join(told)
    return dataclasses.replace(best, evidence=evidence)


def _pass_over(task: _Task, trainable: Trainable, descent: Descent, batches: list[slice], inputs: Inputs) -> str | None:
    """Take one step for each of the batches; return what went wrong, if anything."""
    for part in batches:
        given, wanted = [], []
        for name, stream in (("float", task.streams.target), ("seen", task.streams.seen)):
            if inputs in (name, "mixed"):
                given.append(stream[part])
                wanted.append(task.outputs[name][part])
        try:
            with torch.enable_grad():
                found = run_block(task.block.config, trainable.hooks(), torch.cat(given), task.angles)
                moved = descent.step(residual_loss(found, torch.cat(wanted)))
        except LinAlgError:
            return "a transform became singular"
        if not moved:
            return "the loss or its gradient is not finite"
    return None
