"""The exact choice within a budget, against trying everything."""

import itertools
import math

import numpy as np
import pytest

from planish.compiler.errors import SelectionError
from planish.compiler.select.budget import Candidate, choose

Sites = list[list[Candidate]]


def random_sites(seed: int, sites: int, most: int, costs: int) -> Sites:
    rng = np.random.default_rng(seed)
    return [
        [
            Candidate(6 * int(rng.integers(0, costs)), float(rng.integers(0, 12)) / 4)
            for _ in range(rng.integers(1, most))
        ]
        for _ in range(sites)
    ]


def cost(sites: Sites, chosen: tuple[int, ...]) -> int:
    return sum(site[index].cost for site, index in zip(sites, chosen, strict=True))


def error(sites: Sites, chosen: tuple[int, ...]) -> float:
    return sum(site[index].error for site, index in zip(sites, chosen, strict=True))


def brute_force(sites: Sites, budget: int) -> tuple[float, int]:
    """Return the least error within the budget, and the least cost that has it."""
    every = itertools.product(*(range(len(site)) for site in sites))
    return min((error(sites, one), cost(sites, one)) for one in every if cost(sites, one) <= budget)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_what_trying_everything_finds(seed: int) -> None:
    # Costs and errors of few different values: many choices tie.
    sites = random_sites(seed, sites=5, most=6, costs=9 if seed % 2 else 400)
    cheapest = sum(min(c.cost for c in site) for site in sites)
    dearest = sum(max(c.cost for c in site) for site in sites)
    for budget in np.linspace(cheapest, dearest, 9).astype(int).tolist():
        chosen = choose(sites, budget)
        assert (error(sites, chosen), cost(sites, chosen)) == brute_force(sites, budget)


def test_more_budget_is_never_worse_and_never_exceeded() -> None:
    sites = random_sites(99, sites=20, most=7, costs=1000)
    cheapest = sum(min(c.cost for c in site) for site in sites)
    last = math.inf
    for budget in range(cheapest, cheapest + 60_000, 1777):
        chosen = choose(sites, budget)
        assert cost(sites, chosen) <= budget
        assert error(sites, chosen) <= last
        last = error(sites, chosen)


def test_the_least_budget_gives_the_cheapest() -> None:
    sites = random_sites(3, sites=12, most=6, costs=50)
    cheapest = [min((c.cost, c.error) for c in site) for site in sites]
    chosen = choose(sites, sum(cost for cost, _ in cheapest))
    assert [(site[i].cost, site[i].error) for site, i in zip(sites, chosen, strict=True)] == cheapest


def test_a_large_budget_gives_the_best() -> None:
    sites = random_sites(4, sites=12, most=6, costs=50)
    assert error(sites, choose(sites, 10**15)) == sum(min(c.error for c in site) for site in sites)


def test_what_the_steepest_steps_miss() -> None:
    # By error per cost the first site goes first, and then nothing fits; exact is the second one alone.
    sites = [[Candidate(0, 10), Candidate(6, 3)], [Candidate(0, 10), Candidate(10, 0)]]
    assert choose(sites, 10) == (0, 1)
    assert choose(sites, 9) == (1, 0)


def test_what_is_off_the_convex_hull_may_be_chosen() -> None:
    sites = [[Candidate(0, 10), Candidate(5, 6), Candidate(10, 0)]]
    assert [choose(sites, budget) for budget in (4, 5, 9, 10)] == [(0,), (1,), (1,), (2,)]


def test_a_small_step_behind_one_that_does_not_fit() -> None:
    assert choose([[Candidate(0, 9.0), Candidate(10, 1.0), Candidate(11, 0.5)]], 1) == (0,)


def test_errors_of_very_different_size() -> None:
    sites = [[Candidate(0, 1e9), Candidate(3, 1.0)], [Candidate(0, 2e-9), Candidate(1, 1e-9)], [Candidate(1, 0.0)]]
    assert choose(sites, 4) == (1, 0, 0)
    assert choose(sites, 5) == (1, 1, 0)


def test_what_diverged_is_never_chosen() -> None:
    sites = [[Candidate(0, math.nan), Candidate(2, 1.0), Candidate(1, math.inf)], [Candidate(0, -math.inf)]]
    assert choose(sites[:1], 2) == (1,)
    with pytest.raises(SelectionError, match="site 1 of 1 candidates"):
        choose(sites, 10)


def test_a_budget_that_nothing_fits_into() -> None:
    with pytest.raises(SelectionError, match="budget of 7 is below 8") as caught:
        choose([[Candidate(3, 1)], [Candidate(5, 1), Candidate(6, 0)]], 7)
    assert caught.value.exit_code == 25


def test_a_negative_cost() -> None:
    with pytest.raises(ValueError, match=r"site 0 .* negative"):
        choose([[Candidate(-1, 0)]], 7)


def test_no_sites() -> None:
    assert choose([], 0) == ()


def test_the_sites_of_a_whole_model() -> None:
    # 120 sites of 6 forms, at costs that no number divides: 6^120 choices and about as many sums of costs, which would
    # never end if what cannot be best were kept.
    rng = np.random.default_rng(0)
    sites = [
        [
            Candidate(int(c), float(e))
            for c, e in zip([0, *rng.integers(10**6, 10**9, 5)], np.sort(rng.lognormal(0, 2, 6))[::-1], strict=True)
        ]
        for _ in range(120)
    ]
    dearest = sum(max(c.cost for c in site) for site in sites)
    chosen = choose(sites, dearest // 10)
    assert 0.99 * (dearest // 10) < cost(sites, chosen) <= dearest // 10
