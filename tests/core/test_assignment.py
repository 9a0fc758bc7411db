"""Exact assignment against scipy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from diffjax import core


def best(cost):
    rows, columns = linear_sum_assignment(cost)
    return cost[rows, columns].sum()


@pytest.mark.parametrize("kind", ["uniform", "negative", "squared distance", "few values"])
def test_the_sum_is_the_least_there_is(kind):
    rng = np.random.default_rng(0)
    solve = jax.jit(jax.vmap(core.assign))
    n, problems = 24, 40
    if kind == "squared distance":
        a, b = rng.normal(size=(2, problems, n, 5))
        cost = ((a[:, :, None] - b[:, None]) ** 2).sum(-1)
    elif kind == "few values":
        cost = rng.integers(0, 4, (problems, n, n)).astype(float)  # ties everywhere
    else:
        cost = rng.uniform(size=(problems, n, n)) - (50 if kind == "negative" else 0)
    found = np.asarray(solve(cost))
    for one, permutation in zip(cost, found, strict=True):
        assert sorted(permutation) == list(range(n))
        # Another permutation may win by less than the rounding of n float32 sums.
        scale = np.abs(one).max() * n
        assert one[np.arange(n), permutation].sum() <= best(one) + 1e-6 * scale


def test_one_row_and_an_identity():
    assert np.asarray(core.assign(jnp.zeros((1, 1)))).tolist() == [0]
    assert np.asarray(core.assign(1 - jnp.eye(7))).tolist() == list(range(7))
    with pytest.raises(ValueError, match=r"square matrix of costs \[n, n\], got shape \(2, 3\)"):
        core.assign(jnp.zeros((2, 3)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_the_search_ends_on_whatever_it_is_given(value):
    # One bad image makes a row of these; a training that hangs on it could not report it.
    cost = np.random.default_rng(0).uniform(size=(6, 6)).astype(np.float32)
    cost[2] = value
    permutation = np.asarray(core.assign(cost))
    assert sorted(permutation) == list(range(6))
    if np.isnan(value):
        cost[2] = 0
        assert cost[np.arange(6), permutation].sum() == pytest.approx(best(cost), rel=1e-6)
