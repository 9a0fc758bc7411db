"""Compiled samplers against the exact Gaussian: noise per seed, padded grids, guidance where asked, counted costs."""

import math
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax.core import EDM, SPACINGS, V, ddpm, expand
from diffjax.core.types import Level, Model
from diffjax.data.latents import LatentPixels
from diffjax.data.sources import Dataset, Pixels
from diffjax.pipelines import sampler
from diffjax.pipelines.sampler import Settings

STD = 0.3
SHAPE = (2, 2, 1)


class FakeData(NamedTuple):
    shape: tuple
    num_classes: int


class FakeRun(NamedTuple):
    dataset: FakeData
    schedule: object
    head: object
    model: object
    config: object = ConfigDict(dict(label_dropout=0.1))


def mean_of(y):
    """Class c has the mean (c - 1) / 4 in every pixel, the null class (all three pooled) the mean 0."""
    return jnp.where(y == 3, 0.0, (y - 1) / 4)


def exact_network(x, t, y):
    """The v of the exact posterior mean of N(mean_of(y), STD^2); EDM's time is log(sigma) / 4, alpha is 1."""
    sigma = expand(jnp.exp(4 * t), x)
    mean = 0.0 if y is None else expand(mean_of(y), x)
    x0 = mean + STD**2 / (STD**2 + sigma**2) * (x - mean)
    return (x - x0) / sigma - sigma * x0


@pytest.fixture
def run():
    model = Model(lambda key: {}, lambda params, x, t, y=None: exact_network(x, t, y), {})
    return FakeRun(FakeData(SHAPE, 3), EDM(), V, model)


def test_images_are_clipped_and_latents_are_not(run):
    found = []
    for pixels in (Pixels(255), LatentPixels("", 0.0, 1.0, 3.0)):
        data = Dataset(None, None, SHAPE, 0, pixels)
        model = sampler.guided_denoiser(run._replace(dataset=data), lambda x, t, y: jnp.zeros_like(x), None, Settings())
        found.append(model(jnp.full((1, *SHAPE), 5.0), Level(0.0, 1.0, 0.5)).x0.max())
    assert found == [1.0, 4.0]


def test_samples_have_the_mean_and_std_of_their_class(run):
    draw = sampler.make_sampler(run, steps=40)
    labels = jnp.repeat(jnp.arange(3), 1000)
    x0 = draw({}, sampler.keys_of(np.arange(3000)), labels)
    assert x0.shape == (3000, *SHAPE) and x0.dtype == jnp.float32
    for c in range(3):
        values = np.asarray(x0[c * 1000 : (c + 1) * 1000]).ravel()
        # 4000 values: standard errors 0.0047 of the mean and 0.0034 of the std; x0 is clipped to [-1, 1] at 2.5 std.
        assert abs(values.mean() - (c - 1) / 4) < 0.02 and abs(values.std() - STD) < 0.02


def test_a_seed_gives_the_same_noise_alone_and_in_a_batch(run):
    draw = sampler.make_sampler(run, solver="ddim(eta=1.0)", steps=5, trace=lambda info: info.x)
    seeds, labels = np.array([7, 4000000000, 9, 1, 3]), np.array([0, 1, 2, 0, 1])
    x0, states = draw({}, sampler.keys_of(seeds), jnp.asarray(labels))
    for i in (1, 4):
        alone, path = draw({}, sampler.keys_of(seeds[i : i + 1]), jnp.asarray(labels[i : i + 1]))
        np.testing.assert_array_equal(path[0, 0], states[0, i])
        # Other batch sizes may round differently, by a few units of float32 at sigma = 40.
        np.testing.assert_allclose(alone[0], x0[i], atol=1e-5)


def test_the_solver_does_not_reuse_the_noise_of_the_start(run):
    """One step of the SDE to a middle level from the exact mean: what it adds must not correlate with the start."""
    grid = Level(*(np.array(a) for a in ([0.0, -0.2], [1.0, 1.0], [1.0, math.exp(-0.8)])))
    draw = sampler.compile_sampler(run, Settings(solver="ddim(eta=1.0)"), trace=lambda i: (i.x, i.prediction.x0))
    x, (start, x0) = draw({}, sampler.keys_of(np.arange(2000)), jnp.ones(2000, jnp.int32), grid, 1.0)
    start, residual = np.ravel(start[0]), np.ravel(x)
    kept = np.polyfit(np.ravel(start), residual, 1)
    added = residual - np.polyval(kept, start)
    # DDPM's posterior between s = 1 and s' keeps s'^2 / s^2 of eps and draws the rest: std s' sqrt(1 - s'^2).
    expected = math.exp(-0.8) * math.sqrt(1 - math.exp(-1.6))
    assert abs(added.std() - expected) < 4 * expected / math.sqrt(2 * 8000)


@pytest.mark.parametrize("solver", ["heun()", "dpmpp_2m()"])
def test_a_padded_grid_gives_the_same_samples(run, solver):
    settings = Settings(solver=solver, steps=6)
    draw = sampler.compile_sampler(run, settings)
    keys, labels = sampler.keys_of(np.arange(8)), jnp.arange(8) % 3
    plain = draw({}, keys, labels, sampler.grid(run, settings), 1.0)
    padded = draw({}, keys, labels, sampler.grid(run, settings, length=17), 1.0)
    # The same operations in two programs: float32 rounding of states of up to 40.
    np.testing.assert_allclose(padded, plain, atol=2e-5)


def test_padding_shares_one_compilation(run):
    settings = Settings(solver="dpmpp_2m()")
    draw = sampler.compile_sampler(run, settings, guided=True)
    keys, labels = sampler.keys_of(np.arange(4)), jnp.zeros(4, jnp.int32)
    for steps, scale in ((3, 0.0), (5, 2.0), (9, 4.0)):
        draw({}, keys, labels, sampler.grid(run, settings._replace(steps=steps), length=9), scale)
    assert draw._cache_size() == 1


@pytest.mark.parametrize(
    ("solver", "steps", "calls"), [("dpmpp_2m()", 7, 7), ("heun()", 18, 35)]
)
def test_cost_without_guidance_is_the_papers_count(run, solver, steps, calls):
    assert sampler.cost(run, Settings(solver=solver, steps=steps)) == (steps, calls, calls)


def test_cost_with_an_interval_counts_each_guided_level_twice(run):
    settings = Settings(steps=20, guidance=1.15, interval=(0.1, 3.0))
    s = sampler.grid(run, settings).s[:-1]
    inside = int(((s > 0.1) & (s <= 3.0)).sum())
    assert 0 < inside < 20
    assert sampler.cost(run, settings, length=33) == (20, 20, 20 + inside)
    count = sampler.compile_counter(run, settings._replace(interval=(0.0, math.inf)))
    for steps in (20, 7):
        assert count(sampler.grid(run, settings._replace(steps=steps), length=20)) == (steps, steps, 2 * steps)


def test_guidance_moves_the_mean_as_the_gaussian_says(run):
    """Both x0 are affine in x with one slope, so scale w samples the Gaussian of mean `w mean(c)` exactly."""
    keys, labels = sampler.keys_of(np.arange(1000)), jnp.full(1000, 2)
    settings = Settings(steps=40)
    draw, levels = sampler.compile_sampler(run, settings, guided=True), sampler.grid(run, settings)
    for scale in (0.0, 0.5, 1.0, 2.0):
        x0 = draw({}, keys, labels, levels, scale)
        # 4000 values: standard error 0.005; clipping at 1 moves the mean of N(0.5, 0.3^2) by -0.006.
        assert abs(float(x0.mean()) - scale * 0.25) < 0.025


def test_scale_one_is_the_plain_model_and_an_interval_without_levels_too(run):
    keys, labels = sampler.keys_of(np.arange(4)), jnp.arange(4) % 3
    plain = sampler.make_sampler(run, steps=5)({}, keys, labels)
    outside = sampler.make_sampler(run, steps=5, guidance=3.0, interval=(50.0, 60.0))({}, keys, labels)
    np.testing.assert_allclose(outside, plain, atol=1e-6)


def test_a_model_without_classes_never_sees_a_label(run):
    unlabelled = run._replace(dataset=FakeData(SHAPE, 0))
    seen = []
    model = Model(run.model.init, lambda p, x, t, y=None: (seen.append(y), exact_network(x, t, y))[1], {})
    draw = sampler.make_sampler(unlabelled._replace(model=model), steps=3)
    assert draw({}, sampler.keys_of([0]), jnp.zeros(1, jnp.int32)).shape == (1, *SHAPE)
    assert set(seen) == {None}
    assert sampler.cost(unlabelled, Settings(steps=3)) == (3, 3, 3)


def test_guidance_is_refused_where_it_was_not_learnt(run):
    with pytest.raises(ValueError, match="guidance=2: the model has no classes.*guidance=1"):
        sampler.make_sampler(run._replace(dataset=FakeData(SHAPE, 0)), guidance=2.0)
    never = run._replace(config=ConfigDict(dict(label_dropout=0.0)))
    with pytest.raises(ValueError, match="guidance=0: .*label_dropout=0.*null class"):
        sampler.make_sampler(never, guidance=0.0)
    sampler.make_sampler(never, steps=2)


@pytest.mark.parametrize("name", sorted(SPACINGS))
def test_every_spacing_samples(run, name):
    """DDPM's table suits every spacing; the network is the exact v at the level of its time."""
    table = ddpm()

    def network(params, x, t, y=None):
        level = table(t)
        alpha, sigma = expand(level.alpha, x), expand(level.sigma, x)
        mean = expand(mean_of(y), x)
        x0 = mean + STD**2 * alpha / (STD**2 * alpha**2 + sigma**2) * (x - alpha * mean)
        return alpha * (x - alpha * x0) / sigma - sigma * x0

    on_table = run._replace(schedule=table, model=Model(run.model.init, network, {}))
    draw = sampler.make_sampler(on_table, spacing=f"{name}()", steps=200)
    x0 = np.asarray(draw({}, sampler.keys_of(np.arange(1000)), jnp.full(1000, 2))).ravel()
    # 4000 values of N(0.25, 0.3^2): standard errors 0.005 and 0.003; leading starts below the last step of the table.
    assert abs(x0.mean() - 0.25) < 0.025 and abs(x0.std() - STD) < 0.02


def rising(schedule, n):
    return schedule(np.linspace(0.1, 1.0, n + 1))


def three(schedule, n):
    return schedule(np.array([1.0, 0.5, 0.2, 0.1]))


def times(schedule, n):
    return np.linspace(1.0, 0.1, n + 1)


def test_a_users_grid_is_checked(run, monkeypatch):
    module = types.ModuleType("my_grids")
    module.rising, module.three, module.times = rising, three, times
    monkeypatch.setitem(sys.modules, "my_grids", module)
    grid = lambda name, steps: sampler.grid(run, Settings(spacing=f"my_grids:{name}", steps=steps))
    assert len(grid("three", 3).t) == 4
    with pytest.raises(ValueError, match="must not grow along the grid"):
        grid("rising", 5)
    with pytest.raises(ValueError, match="returned 4 levels for steps=5; expected 6: set steps=3"):
        grid("three", 5)
    with pytest.raises(ValueError, match="returned a ndarray; expected a Level"):
        grid("times", 5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_are_not_finite_are_refused(value):
    draw = lambda keys, labels: jnp.where(labels == 6, value, 0.0)[:, None]
    with pytest.raises(FloatingPointError, match="1 of 3 samples, the first of them number 6, are not finite"):
        sampler.in_batches(draw, np.arange(9), np.arange(9), batch_size=3)
    with pytest.raises(ValueError, match="batch_size=0"):
        sampler.in_batches(draw, [0], [0], batch_size=0)


def test_batches_of_one_size_join_to_all_samples():
    sizes = []

    def draw(keys, labels):
        sizes.append(len(keys))
        return {"label": labels, "bits": jax.vmap(lambda k: jax.random.bits(k))(keys)}

    seeds = np.arange(10, 21)
    out = sampler.in_batches(draw, seeds, seeds % 3, batch_size=4)
    assert sizes == [4, 4, 4]
    np.testing.assert_array_equal(out["label"], seeds % 3)
    np.testing.assert_array_equal(out["bits"], [jax.random.bits(jax.random.key(s)) for s in range(10, 21)])


def test_settings_take_overrides_and_refuse_nonsense(run):
    chosen = sampler.settings_of({"solver": "heun()", "steps": 9, "guidance": 2}, steps=None, guidance=1.5)
    assert chosen == Settings("heun()", 9, "karras(s_max=40.0)", 1.5, (0.0, math.inf))
    with pytest.raises(ValueError, match="finite scale"):
        sampler.settings_of(Settings(), guidance=math.nan)
    with pytest.raises(ValueError, match="0 <= lo < hi"):
        sampler.settings_of(Settings(), interval=(3.0, 0.1))
    for wrong in ((0.5,), (0.1, 1.0, 2.0), 0.5):
        with pytest.raises(ValueError, match="expected two levels"):
            sampler.settings_of(Settings(), interval=wrong)
    with pytest.raises(ValueError, match="did you mean 'dpmpp_2m'"):
        sampler.make_sampler(run, solver="dpmpp2m()")
    with pytest.raises(ValueError, match=r"2\*\*32"):
        sampler.keys_of([-1])
