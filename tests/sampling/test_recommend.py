"""The recommended sampler: its cost, and its error against the exact flow beside the usual choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

PROCESSES = {"vp": dj.ddpm(), "cosine": dj.squared_cosine(), "edm": dj.EDM(), "flow": dj.Flow(), "ve": dj.VE()}
STD = np.geomspace(0.02, 1, 16)
GAUSS16 = dj.Gaussian(np.linspace(-0.5, 0.5, 16), np.diag(STD**2))
SCALAR = dj.Gaussian(GAUSS16.mean, np.mean(STD**2))


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("stats", [None, SCALAR])
@pytest.mark.parametrize("schedule", PROCESSES)
def test_it_costs_what_was_asked(schedule, stats, guidance):
    made = PROCESSES[schedule]
    for nfe in (1, 2, 5, 8, 10, 15, 20, 50):
        solver, levels = dj.recommend(made, nfe, stats=stats, guidance=guidance)
        assert solver.nfe(len(levels.t) - 1) == nfe
        dj.check_grid(levels)
        assert levels.sigma[-1] == 0
        # Every grid but the shortest starts where the schedule does.
        if nfe > 1:
            np.testing.assert_allclose(levels.sigma[0], made(np.array(made.t_max)).sigma, rtol=1e-6)


def error(solver, levels, truth, count=64):
    """Median distance to the exact end point over the data's std; from a finite level, whose flow is known."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(count, len(truth.mean))))
    x = x * np.hypot(levels.alpha[0], levels.sigma[0])
    out = jax.jit(lambda x: dj.sample(solver, truth.denoise, x, levels))(x)
    gap = jnp.linalg.norm(out - truth.flow(x, levels.at(0), levels.at(-1)), axis=1) / 4
    return float(jnp.median(gap) / np.sqrt(np.mean(STD**2)))


@pytest.mark.often("vp", "flow")
@pytest.mark.parametrize("schedule", PROCESSES)
def test_it_is_better_than_the_usual_choice(schedule, x64):
    # gauss16 has stds from 0.02 to 1. DPM-Solver++ 2M on Karras knots is the default of most pipelines; the figures of
    # other peers on this target are in docs/benchmark.md.
    made = PROCESSES[schedule]
    for nfe in (10, 20):
        usual = error(dj.dpmpp_2m(), dj.karras(made, nfe, s_max=min(80.0, dj.s_range(made)[1])), GAUSS16)
        plain = error(*dj.recommend(made, nfe), GAUSS16)
        informed = error(*dj.recommend(made, nfe, stats=SCALAR), GAUSS16)
        assert plain < usual / 2 and informed < usual / 4, (nfe, usual, plain, informed)


def test_it_follows_the_scale_of_the_data(x64):
    # The same data ten times larger, with its statistics: the same relative error, on an EDM range ten times larger.
    large = dj.Gaussian(10 * GAUSS16.mean, 100 * np.asarray(GAUSS16.cov))
    stats = dj.Gaussian(large.mean, 100 * np.mean(STD**2))
    a = error(*dj.recommend(dj.EDM(), 12, stats=SCALAR), GAUSS16)
    b = error(*dj.recommend(dj.EDM(sigma_min=0.02, sigma_max=800.0), 12, stats=stats), large) / 10
    # Not exactly: the starts of `error` have the std hypot(1, s_max), of which 1 does not scale.
    np.testing.assert_allclose(a, b, rtol=1e-3)


def test_guided_flows_do_not_diverge(x64):
    # Guidance at scale 5 towards one of two modes, exact denoisers: 10 calls against a fine solution.
    both = dj.Mixture([1.0, 1.0], [[1.0, 0.0], [-1.0, 0.2]], [0.05 * np.eye(2), 0.02 * np.eye(2)])
    one = dj.Gaussian(np.array([1.0, 0.0]), 0.05 * np.eye(2))

    def guided(x, level):
        cond, uncond = one.denoise(x, level), both.denoise(x, level)
        return dj.Prediction(*(u + 5.0 * (c - u) for c, u in zip(cond[:2], uncond[:2], strict=True)))

    x = 80 * jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)))
    run = lambda solver, levels: jax.jit(lambda x: dj.sample(solver, guided, x, levels))(x)
    fine = run(dj.dpmpp_2m(), dj.karras(dj.EDM(), 1000))
    gap = lambda out: float(jnp.sqrt(jnp.mean((out - fine) ** 2)))
    ours = gap(run(*dj.recommend(dj.EDM(), 10, guidance=5.0)))
    assert ours < gap(run(dj.dpmpp_2m(), dj.karras(dj.EDM(), 10))) and ours < 0.1


def test_messages():
    for bad in (0, 2.5, -1):
        with pytest.raises(ValueError, match="whole number of network calls"):
            dj.recommend(dj.EDM(), bad)
    for schedule, stats, match in (
        (dj.VP, None, "expected a schedule such as"),
        (dj.VP(), np.ones((5, 2)), "expected a Gaussian with a positive variance, .* got ndarray"),
        (dj.VP(), dj.Gaussian(0.0, 0.0), "got a Gaussian without variance"),
        (dj.VE(), dj.Gaussian(0.0, 1e-6), "nothing to sample"),
    ):
        with pytest.raises(ValueError, match=match):
            dj.recommend(schedule, 8, stats=stats)
