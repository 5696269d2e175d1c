"""Search by gradient descent which kind of transform a group of linears should have: rotation or affine.

Per block and group there are logits theta, and pi = softmax(theta / tau). Both branches, fully on the grids, compute
the group's output, and pi mixes the two outputs: a mixture of the matrices would be neither. The loss is that of
`residual_loss` over its own size, plus lambda times the entropy of every pi; lambda is 0 for the first third of the
steps and then grows linearly, tau falls linearly. The kind of the larger logit is chosen. This is a reconstruction of
the search of arXiv 2511.17809, of which neither schedule nor normalisation is published.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from planish.compiler.learn.block import SITE_MODULES, Angles, Block, Hooks, run_block
from planish.compiler.learn.gradient.block_loss import held_out_loss, residual_loss, starting_clips
from planish.compiler.learn.gradient.refine import Descent
from planish.compiler.learn.gradient.trainable import Trainable
from planish.compiler.learn.precision import fast_products
from planish.compiler.learn.streams import Sequences, Streams
from planish.compiler.learn.transforms.factors import Factors
from planish.compiler.learn.transforms.site_factors import closed_form_factors
from planish.compiler.learn.transforms.site_moments import RESIDUAL_SITES, gather_moments
from planish.compiler.select.forms import SITE_GROUPS, forms_of_groups
from planish.compiler.select.kurtosis import GROUPS, Group
from planish.passes.scheme import Scheme
from planish.passes.transforms import Kind, Site

__all__ = ["Branch", "Search", "Searched", "search_block", "search_kinds"]

#: Linears whose outputs are those of a group.
_LAST_MODULES: dict[str, Group] = {
    SITE_MODULES[site][0]: group for group, sites in SITE_GROUPS.items() for site in RESIDUAL_SITES if site in sites
}
#: Share of the steps before the entropy counts.
_FREE_SHARE = 1 / 3
#: Kinds searched among; the first is chosen where nothing tells them apart, or nothing could be learned.
_KINDS: tuple[Kind, ...] = ("rotation", "affine")


@dataclasses.dataclass(frozen=True)
class Search:
    """How kinds are searched for.

    Attributes:
        epochs: passes over the sequences to fit to.
        batch: sequences to a step.
        rate: of learning transforms and weight scales, at the start.
        clip_rate: of learning the logits of clips.
        choice_rate: of learning theta.
        entropy: lambda at the end.
        temperatures: tau at the start and at the end.
        seed: of the order of sequences and of the rotations.
    """

    epochs: int = 5
    batch: int = 2
    rate: float = 5e-3
    clip_rate: float = 5e-2
    choice_rate: float = 1e-2
    entropy: float = 0.1
    temperatures: tuple[float, float] = (1.0, 0.3)
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Branch:
    """Where a kind starts: transforms and clips of all sites."""

    factors: Mapping[Site, Factors]
    clips: Mapping[Site, float]


@dataclasses.dataclass(frozen=True)
class Searched:
    """What was found.

    Attributes:
        kinds: by group.
        evidence: by group: `pi of <kind>` at the end, and `loss of <kind>` on the held-out sequences, with the other
            group as chosen.
        fallback: in words, if learning broke off and a rotation was chosen for that; else None.
    """

    kinds: dict[Group, Kind]
    evidence: dict[Group, dict[str, float]]
    fallback: str | None = None


def search_block(block: Block, streams: Streams, outputs: Sequences, scheme: Scheme, settings: Search) -> Searched:
    """Search from the closed forms of both kinds; see `search_kinds`."""
    angles = Angles.of(block.config, streams.seen.shape[1], streams.seen.device)
    moments = gather_moments(block, (streams.seen[part] for part in streams.batches()), angles)
    branches: dict[Kind, Branch] = {}
    for kind in _KINDS:
        forms = forms_of_groups(dict.fromkeys(GROUPS, kind))
        factors = closed_form_factors(block, moments, forms, settings.seed)
        branches[kind] = Branch(factors, starting_clips(block, factors, streams, outputs, scheme))
    return search_kinds(block, branches, streams, outputs, scheme, settings)


def search_kinds(
    block: Block,
    branches: Mapping[Kind, Branch],
    streams: Streams,
    outputs: Sequences,
    scheme: Scheme,
    settings: Search,
) -> Searched:
    """Return the kind of each group, having learned both kinds and the choice between them together.

    What was learned of the transforms is dropped: the kinds chosen are to be refined by themselves.

    Args:
        block: the float block.
        branches: where rotation and affine start.
        streams: the block's inputs; the `seen` stream is read.
        outputs: of the float block on the target stream, float32 [sequences, seq, hidden].
        scheme: to search for.
        settings: how.
    """
    angles = Angles.of(block.config, streams.seen.shape[1], streams.seen.device)
    learned = [Trainable(block, branches[kind].factors, branches[kind].clips, scheme) for kind in _KINDS]
    thetas = {group: torch.zeros(len(_KINDS), device=outputs.device, requires_grad=True) for group in GROUPS}
    batches = list(streams.batches(size=settings.batch))
    steps = settings.epochs * len(batches)
    descent = Descent(
        [
            ([each for one in learned for each in one.transform_parameters()], settings.rate),
            ([each for one in learned for each in one.clip_parameters()], settings.clip_rate),
            (list(thetas.values()), settings.choice_rate),
        ],
        steps,
    )
    generator = torch.Generator().manual_seed(settings.seed)
    fallback = None
    with fast_products():
        for step in range(steps):
            if step % len(batches) == 0:
                order = torch.randperm(len(batches), generator=generator).tolist()
            part = batches[order[step % len(batches)]]
            try:
                with torch.enable_grad():
                    shares = _shares(thetas, settings, step / steps)
                    hooks = _MixedHooks([each.hooks() for each in learned], shares)
                    lost = residual_loss(run_block(block.config, hooks, streams.seen[part], angles), outputs[part])
                    entropy = sum(-(pi * pi.clamp_min(1e-30).log()).sum() for pi in shares.values())
                    weight = settings.entropy * max(0.0, step / steps - _FREE_SHARE) / (1 - _FREE_SHARE)
                    moved = descent.step(lost / lost.detach().clamp_min(1e-30) + weight * entropy)
            except LinAlgError:
                moved = False
            if not moved:
                fallback = f"the loss or a transform was not finite at step {step + 1} of {steps}; a rotation was taken"
                return Searched(dict.fromkeys(GROUPS, _KINDS[0]), {}, fallback)
        return _decided(block, learned, thetas, streams, outputs, angles, settings)


def _shares(thetas: Mapping[Group, Tensor], settings: Search, done: float) -> dict[Group, Tensor]:
    first, last = settings.temperatures
    return {group: (theta / (first + (last - first) * done)).softmax(0) for group, theta in thetas.items()}


@torch.no_grad()
def _decided(
    block: Block,
    learned: Sequence[Trainable],
    thetas: Mapping[Group, Tensor],
    streams: Streams,
    outputs: Sequences,
    angles: Angles,
    settings: Search,
) -> Searched:
    for each in learned:
        each.fit_weight_scales()
    hooks = [each.hooks() for each in learned]
    chosen = {group: int(theta.argmax()) for group, theta in thetas.items()}
    shares = _shares(thetas, settings, 1.0)
    evidence: dict[Group, dict[str, float]] = {}
    for group in GROUPS:
        evidence[group] = {f"pi of {kind}": float(pi) for kind, pi in zip(_KINDS, shares[group], strict=True)}
        for index, kind in enumerate(_KINDS):
            taken = torch.eye(len(_KINDS), device=outputs.device)
            mixed = _MixedHooks(hooks, {each: taken[index if each == group else chosen[each]] for each in GROUPS})
            evidence[group][f"loss of {kind}"] = held_out_loss(block, mixed, streams, outputs, angles)
    return Searched({group: _KINDS[index] for group, index in chosen.items()}, evidence)


class _MixedHooks:
    """Runs branches side by side, stacked along the batch within a group, and mixes the outputs of every group."""

    def __init__(self, branches: Sequence[Hooks], shares: Mapping[Group, Tensor]) -> None:
        self._branches, self._shares = branches, shares
        self._norm: str | None = None

    def gain(self, norm: str) -> Tensor:
        # Every branch has a gain of its own: it is put in at the site behind, where the branches part.
        self._norm = norm
        return torch.ones(())

    def site(self, site: Site, x: Tensor) -> Tensor:
        if self._norm is None:
            parts = self._parts(x)
        else:
            parts = [branch.gain(self._norm) * x for branch in self._branches]
            self._norm = None
        return torch.cat([branch.site(site, part) for branch, part in zip(self._branches, parts, strict=True)])

    def linear(self, module: str, x: Tensor) -> Tensor:
        found = [branch.linear(module, part) for branch, part in zip(self._branches, self._parts(x), strict=True)]
        if module not in _LAST_MODULES:
            return torch.cat(found)
        pi = self._shares[_LAST_MODULES[module]]
        return torch.stack([share * each for share, each in zip(pi, found, strict=True)]).sum(0)

    def heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = zip(self._branches, *(self._parts(each) for each in (query, key, value)), strict=True)
        mapped: list[Any] = [branch.heads(*each) for branch, *each in parts]
        queries, keys, values = (torch.cat(each) for each in zip(*mapped, strict=True))
        return queries, keys, values

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        return x.chunk(len(self._branches))
