"""Fitted samplers: closer to the exact flow than what they began with, on noise they never saw; files that say so."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

MIXTURE = dj.Mixture([2.0, 1.0, 1.0], [[0.8, 0.2], [-0.6, 0.6], [-0.1, -0.8]], [np.diag([0.04, 0.01])] * 3)
VP, FLOW = dj.ddpm(), dj.Flow()
KEY = jax.random.key(0)
fit = partial(dj.fit_steps, MIXTURE.denoise, iterations=160)
# Small programs, where the quality of the fit is not the question.
SMALL = {
    "order": 1,
    "stats": dj.Gaussian(MIXTURE.weights @ MIXTURE.means, 0.4),
    "teacher": (dj.dpmpp_2m(), dj.karras(VP, 24)),
}


def error(solver, levels, x, exact):
    """Median distance to the exact ends."""
    ends = jax.jit(lambda x: dj.sample(solver, MIXTURE.denoise, x, levels))(x)
    return float(jnp.median(jnp.linalg.norm(ends - exact, axis=-1)))


def exact_flow(x, levels):
    """The exact ends to about 1e-5; from alpha = 0 by way of s = 1000, where the mixture is a Gaussian to 1e-6."""
    start, end = levels.at(0), dj.Level(np.array(0.0), np.array(1.0), np.array(1e-5))
    if start.alpha == 0:
        start = FLOW.at_logsnr(-2 * np.log(1e3))
        x = start.alpha * (MIXTURE.weights @ MIXTURE.means) + start.sigma * x
    return MIXTURE.flow(x, start, end, rtol=1e-6)


@pytest.fixture(scope="module")
def vp_steps():
    return fit(4, VP, (KEY, (64, 2)))


@pytest.fixture(scope="module")
def flow_steps():
    return fit(4, FLOW, (KEY, (64, 2)), jump=False, order=2)


@pytest.mark.slow
@pytest.mark.parametrize("name, schedule", [("vp_steps", VP), ("flow_steps", FLOW)])
def test_a_fit_is_several_times_closer_than_the_recommendation(name, schedule, request):
    steps = request.getfixturevalue(name)
    stats = dj.Gaussian(steps.stats.mean, steps.stats.spectrum) if steps.jump else None
    x = dj.prior(jax.random.key(99), (200, 2), steps.levels)  # no fit has seen these
    exact = exact_flow(x, steps.levels)
    recommended = error(*dj.recommend(schedule, 4, stats=stats), x, exact)
    fitted = error(steps.solver, steps.levels, x, exact)
    assert fitted < recommended / 4, (fitted, recommended)
    assert steps.after < steps.before / 3


def test_it_makes_as_many_calls_as_asked_and_the_noise_falls(vp_steps, flow_steps):
    for steps, schedule in ((vp_steps, VP), (flow_steps, FLOW)):
        calls = []

        def counted(x, level, calls=calls):
            jax.debug.callback(lambda: calls.append(1))
            return MIXTURE.denoise(x, level)

        dj.sample(steps.solver, counted, dj.prior(jax.random.key(1), (3, 2), steps.levels), steps.levels)
        jax.effects_barrier()
        assert len(calls) == steps.nfe == 4
        assert np.all(np.diff(np.arctan2(steps.levels.sigma, steps.levels.alpha)) < 0)
        first = schedule(np.float64(schedule.t_max))
        np.testing.assert_allclose([f[0] for f in steps.levels], first)
        assert steps.levels.sigma[-1] == 0
    assert vp_steps.jump and len(vp_steps.levels.t) == 6
    assert not flow_steps.jump and len(flow_steps.levels.t) == 5


def test_the_mean_and_variance_are_read_off_the_denoiser(vp_steps):
    mean = MIXTURE.weights @ MIXTURE.means
    variance = np.mean(MIXTURE.weights @ (MIXTURE.means - mean) ** 2 + [0.04, 0.01])
    np.testing.assert_allclose(vp_steps.stats.mean, mean, atol=0.02)
    # Of 64 ends: the standard error of a variance is at most sqrt(2 / 64) of it, and the modes' is less.
    np.testing.assert_allclose(vp_steps.stats.spectrum, variance, rtol=4 * np.sqrt(2 / 64))


@pytest.mark.slow
def test_knots_alone_get_better_and_the_same_starts_give_the_same_steps():
    seen = []
    run = partial(fit, 2, VP, (KEY, (16, 2)), coefficients=False, **SMALL)
    a, b = run(iterations=40, progress=lambda r: seen.append(len(r)) or r), run(iterations=40)
    assert seen == [2]
    assert a.after < a.before
    jax.tree.map(np.testing.assert_array_equal, (a.levels, a.table), (b.levels, b.table))


@pytest.mark.slow
def test_conditions_go_with_their_starts():
    shift = jnp.where(jnp.arange(32)[:, None] % 2 == 0, 1.0, -1.0)

    def denoise(x, level, cond):
        out = MIXTURE.denoise(x - level.alpha * cond, level)
        return dj.Prediction(out.x0 + cond, out.eps)

    steps = dj.fit_steps(denoise, 1, VP, (KEY, (32, 2)), cond=shift, iterations=60, batch=12, **SMALL)
    assert steps.after < steps.before


def test_a_file_gives_the_same_samples(vp_steps, tmp_path):
    dj.save_steps(tmp_path / "steps.npz", vp_steps)
    loaded = dj.load_steps(tmp_path / "steps.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["steps.npz"]
    assert (loaded.nfe, loaded.after, loaded.jump) == (4, vp_steps.after, True)
    x = dj.prior(jax.random.key(1), (3, 2), vp_steps.levels)
    draw = lambda steps, levels: dj.sample(steps.solver, MIXTURE.denoise, x, levels)
    ends = draw(vp_steps, vp_steps.levels)
    np.testing.assert_array_equal(draw(loaded, loaded.levels), ends)
    # A grid that repeats its last level, as benchmarks pad it, samples alike; another grid is refused.
    longer = dj.Level(*(np.pad(field, (0, 3), mode="edge") for field in loaded.levels))
    np.testing.assert_allclose(draw(loaded, longer), ends, atol=1e-6)
    with pytest.raises(ValueError, match="the coefficients belong to steps.levels"):
        draw(loaded, dj.karras(VP, 5))
    with pytest.raises(ValueError, match="fitted for a grid of 5 steps"):
        draw(loaded, dj.karras(VP, 3))


def test_a_gaussian_whose_covariance_is_given_is_exact_and_so_is_its_file(tmp_path):
    truth = dj.Gaussian.fit(np.random.default_rng(0).normal(size=(40, 2, 3)), "full", rank=2)
    teacher = dj.dpmpp_2m(), dj.karras(VP, 24)
    steps = dj.fit_steps(truth.denoise, 1, VP, (KEY, (8, 2, 3)), stats=truth, iterations=1, order=1, teacher=teacher)
    dj.save_steps(tmp_path / "steps", steps)
    x = dj.prior(jax.random.key(1), (3, 2, 3), steps.levels)
    exact = truth.flow(x, steps.levels.at(0), steps.levels.at(-1))
    for each in (steps, dj.load_steps(tmp_path / "steps")):
        # float32 at s = 157 resolves x / alpha to 1e-5.
        np.testing.assert_allclose(dj.sample(each.solver, truth.denoise, x, each.levels), exact, atol=5e-5)


def test_bad_files_say_what_is_wrong(vp_steps, tmp_path):
    path = tmp_path / "steps.npz"
    with pytest.raises(FileNotFoundError, match="no steps at"):
        dj.load_steps(path)
    dj.save_steps(path, vp_steps)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"text", whole[:300] + b"\xff" * 40 + whole[340:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged or not a file of save_steps"):
            dj.load_steps(path)
    np.savez(path, a=np.ones(3))
    with pytest.raises(ValueError, match="not one of save_steps"):
        dj.load_steps(path)
    np.savez(path, meta=np.asarray('{"format": "diffjax-steps", "version": 99}'))
    with pytest.raises(ValueError, match="format version 99"):
        dj.load_steps(path)
    np.savez(path, meta=np.asarray('{"format": "diffjax-steps", "version": 1}'))
    with pytest.raises(ValueError, match="lacks"):
        dj.load_steps(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"nfe": 0}, "nfe: expected a whole number"),
        ({"nfe": 2.5}, "nfe: expected a whole number"),
        ({"x": jnp.ones((3, 2))}, "x: expected starts .* N >= 8"),
        ({"iterations": 0}, "iterations >= 1"),
        ({"held_out": 1.0}, "held_out: expected a share"),
        ({"batch": 0}, "batch: expected a number >= 1"),
        ({"order": 0}, "order: expected a whole number"),
        ({"cond": jnp.ones(3)}, "cond: expected one row per start, 16"),
    ],
)
def test_arguments_out_of_range(change, message):
    arguments = {"nfe": 4, "schedule": VP, "x": jnp.ones((16, 2))} | change
    with pytest.raises(ValueError, match=message):
        dj.fit_steps(MIXTURE.denoise, **arguments)


def test_losses_that_are_not_finite_are_reported():
    def steep(x, level):
        """Finite, with gradients that are not."""
        out = MIXTURE.denoise(x, level)
        return dj.Prediction(out.x0 + jnp.sqrt(jnp.maximum(0.0, -jnp.abs(x))), out.eps)

    with pytest.raises(FloatingPointError, match="the loss is nan at iteration 1;"):
        dj.fit_steps(steep, 1, VP, (KEY, (8, 2)), iterations=20, **SMALL)
    broken = lambda x, level: dj.Prediction(x * jnp.nan, x)
    with pytest.raises(FloatingPointError, match="an end of the teacher is not finite"):
        dj.fit_steps(broken, 2, VP, (KEY, (8, 2)), **SMALL)
    with pytest.raises(ValueError, match="teacher: its grid must start at the schedule's t_max"):
        fit(4, VP, (KEY, (8, 2)), teacher=(dj.adams(), dj.karras(VP, 60, s_max=3.0)))
