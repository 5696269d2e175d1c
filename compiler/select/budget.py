"""One candidate per site, of least error together, within a budget: the multiple-choice knapsack, solved exactly.

Sites add up: the error of a choice is the sum of the errors of its candidates. Where two sites do not, because the one
in front changes what the other costs, give their pairs as the candidates of one site.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from planish.compiler.errors import SelectionError

__all__ = ["Candidate", "choose", "unbeaten"]

_Costs = npt.NDArray[np.int64]
_Errors = npt.NDArray[np.float64]
#: Slack of a bound, for what the rounding of float64 sums may have taken from it, relative to the largest errors.
_SLACK = 1e-12


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What may stand at a site.

    Attributes:
        cost: in any unit, such as FLOPs per token; 0 or more.
        error: what it adds to the error of the model; one that is not finite is never chosen.
    """

    cost: int
    error: float


@dataclasses.dataclass(frozen=True)
class _Frontier:
    """Options that no other beats in cost and error at once: costs go up, errors strictly down.

    Attributes:
        costs: int64 [n].
        errors: float64 [n].
        origins: index of each option among those it was picked from, int64 [n].
    """

    costs: _Costs
    errors: _Errors
    origins: npt.NDArray[np.int64]

    @classmethod
    def of(cls, costs: _Costs, errors: _Errors) -> "_Frontier":
        kept = unbeaten(costs, errors)
        return cls(costs[kept], errors[kept], kept)


def unbeaten(costs: _Costs, errors: _Errors) -> npt.NDArray[np.int64]:
    """Return which options no other beats in cost and error at once, by ascending cost; of equal ones the first.

    Args:
        costs: int64 [n].
        errors: float64 [n].
    """
    order = np.lexsort((errors, costs))
    sorted_errors = errors[order]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_errors)[:-1]])
    return order[sorted_errors < best_before]


def choose(candidates: Sequence[Sequence[Candidate]], budget: int) -> tuple[int, ...]:
    """Return the index of the chosen candidate of each site: least sum of errors, sum of costs within `budget`.

    Of choices of equal error it is the cheapest. Dynamic programming over the sites holds every sum of costs that
    nothing beats; what the linear relaxation of the sites ahead shows to be no better than a known choice is dropped,
    which takes nothing from exactness.

    Raises:
        SelectionError: if a site has no candidate with a finite error, or the cheapest choice exceeds the budget.
        ValueError: if a cost is negative.
    """
    sites = [_site(index, site) for index, site in enumerate(candidates)]
    least = sum(int(site.costs[0]) for site in sites)
    if least > budget:
        raise SelectionError(
            f"The budget of {budget} is below {least}, the cost of the cheapest choice. Give a larger budget."
        )
    # Costs above the cheapest, in units of what divides them all.
    unit = math.gcd(*(int(cost - site.costs[0]) for site in sites for cost in site.costs)) or 1
    sites = [_Frontier((site.costs - site.costs[0]) // unit, site.errors, site.origins) for site in sites]
    room = (budget - least) // unit
    bounds = [_Relaxation(sites[index:]) for index in range(len(sites) + 1)]
    limit = bounds[0].whole_steps(room) + _SLACK * sum(float(np.abs(site.errors).max()) for site in sites)

    state = _Frontier(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64))
    stages = []
    for site, ahead in zip(sites, bounds[1:], strict=True):
        costs = (state.costs[:, None] + site.costs).ravel()
        errors = (state.errors[:, None] + site.errors).ravel()
        possible = np.flatnonzero(costs <= room)
        possible = possible[errors[possible] + ahead(room - costs[possible]) <= limit]
        state = _Frontier.of(costs[possible], errors[possible])
        stages.append(possible[state.origins])

    chosen, at = [], len(state.costs) - 1
    for site, origins in zip(reversed(sites), reversed(stages), strict=True):
        at, option = divmod(int(origins[at]), len(site.costs))
        chosen.append(int(site.origins[option]))
    return tuple(reversed(chosen))


def _site(index: int, candidates: Sequence[Candidate]) -> _Frontier:
    if any(candidate.cost < 0 for candidate in candidates):
        raise ValueError(f"site {index} has a candidate of negative cost")
    errors = np.array([candidate.error for candidate in candidates], np.float64)
    finite = np.flatnonzero(np.isfinite(errors))
    if not finite.size:
        raise SelectionError(
            f"Nothing can be chosen at site {index} of {len(candidates)} candidates: none has a finite error. "
            "Check the calibration text, or leave the scheme more bits."
        )
    costs = np.array([candidate.cost for candidate in candidates], np.int64)
    frontier = _Frontier.of(costs[finite], errors[finite])
    return dataclasses.replace(frontier, origins=finite[frontier.origins])


class _Relaxation:
    """The least error of some sites where candidates may be mixed: piecewise linear and convex in the room for costs.

    Each site contributes the steps along the lower convex hull of its frontier, and the steepest are taken first.
    """

    def __init__(self, sites: Sequence[_Frontier]) -> None:
        self._base = float(sum(site.errors[0] for site in sites))
        steps = [(*step, index) for index, site in enumerate(sites) for step in _hull_steps(site)]
        self._steps = sorted(steps, key=lambda step: step[1] / step[0])
        self._costs = np.cumsum([0, *(cost for cost, _, _ in self._steps)])
        self._errors = np.cumsum([self._base, *(error for _, error, _ in self._steps)])

    def __call__(self, room: _Costs) -> _Errors:
        """Return the bound for each `room`."""
        bound: _Errors = np.interp(room, self._costs, self._errors)
        return bound

    def whole_steps(self, room: int) -> float:
        """Return the error of a choice that can be made: whole steps, and none behind one that does not fit."""
        error, left = self._base, room
        stopped = set()
        for cost, change, site in self._steps:
            if cost <= left and site not in stopped:
                left -= cost
                error += change
            else:
                stopped.add(site)
        return error


def _hull_steps(site: _Frontier) -> list[tuple[int, float]]:
    """Return (cost, change of error) from corner to corner of the lower convex hull, steepest first."""
    corners: list[tuple[int, float]] = []
    for cost, error in zip(site.costs.tolist(), site.errors.tolist(), strict=True):
        while len(corners) > 1:
            (c0, e0), (c1, e1) = corners[-2:]
            if (e1 - e0) * (cost - c1) < (error - e1) * (c1 - c0):
                break
            corners.pop()
        corners.append((cost, error))
    return [(c1 - c0, e1 - e0) for (c0, e0), (c1, e1) in itertools.pairwise(corners)]
