"""Each piece of an objective inside the training step, against closed forms."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from diffjax import core, sampling
from diffjax.core.types import Prediction
from diffjax.train import step as steps
from diffjax.train.errors import ConfigError
from diffjax.train.objectives import build_objective
from diffjax.train.objectives.pairing import ot
from diffjax.train.objectives.schedule import levels_of, squared_for_levels
from diffjax.train.objectives.uncertainty import uncertainty, weighed
from diffjax.train.objectives.variance import LearnedRange, bound
from diffjax.train.parts import prepare, resolve
from diffjax.train.state import init_state

VALUE, BATCH = 0.5, 64

USER = """
import jax.numpy as jnp
import numpy as np
from diffjax.core import Model
from diffjax.data import ArraySource, Dataset

def data():
    source = ArraySource(np.full((600, 4, 4, 1), 0.5, np.float32), np.arange(600, dtype=np.int32) % 3)
    return Dataset(source, source, (4, 4, 1), 3, lambda x: x)

def fixed(t):
    return lambda key, n: jnp.full(n, t)

def zero(*, shape, num_classes):
    return Model(lambda key: {}, lambda p, x, t, y, key=None: jnp.zeros_like(x), {})

def echo(*, shape, num_classes, extra_in=0):
    # b plus the image that it is given beside x.
    apply = lambda p, x, t, y, key=None: p["b"] + (x[..., 1:] if extra_in else jnp.zeros_like(x))
    return Model(lambda key: {"b": jnp.ones(())}, apply, {})
"""
FLOW = dict(schedule="flow()", time="uniform()", sample=dict(spacing="uniform()"))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """`make(**changes) -> (config, parts)` with gradient descent on constant images."""
    (tmp_path / "user_of_objectives.py").write_text(textwrap.dedent(USER))
    monkeypatch.syspath_prepend(tmp_path)

    def make(**changes):
        base = dict(
            data="user_of_objectives:data()", model="user_of_objectives:zero", batch_size=BATCH, ema=(),
            optim=dict(name="sgd", lr=0.5, b1=0.0, clip=0.0), label_dropout=0.0,
        )  # fmt: skip
        return prepare(ConfigDict(base | changes))

    return make


def batch():
    return {"image": np.full((BATCH, 4, 4, 1), VALUE, np.float32), "label": np.zeros(BATCH, np.int32)}


def one_step(config, parts):
    step = steps.make_train_step(parts, config)
    return jax.jit(lambda key, data: step(init_state(parts, key), data))(jax.random.key(0), batch())


def test_an_x0_network_is_measured_in_the_velocity(make):
    # Zero for x0 leaves x / sigma for eps: the velocity is wrong by x0 (alpha / sigma + 1) = x0 / sigma.
    config, parts = make(**FLOW | dict(head="x0()", time="user_of_objectives:fixed(0.25)"), loss=dict(space="flow()"))
    assert float(one_step(config, parts)[1].loss) == pytest.approx((VALUE / 0.25) ** 2, rel=1e-5)


def test_learned_uncertainty_is_the_log_of_the_expected_loss(make):
    # As above, and with nothing to learn but u: the loss at sigma is x0^2 / sigma^2, its log log(x0^2) - 2 log sigma.
    times = dict(head="x0()", time="uniform(lo=0.1)")
    optim = dict(name="adam", lr=0.05, b2=0.95, schedule="cosine()")
    config, parts = make(**FLOW | times, loss=dict(space="flow()", uncertainty=16), optim=optim, num_steps=600)
    state = jax.jit(lambda key: init_state(parts, key))(jax.random.key(0))
    assert set(state.params) == {"objective"} and not np.any(state.params["objective"]["uncertainty"]["weight"])
    train_step = steps.make_train_step(parts, config)
    _, first = jax.jit(train_step)(state, batch())
    run = jax.jit(lambda s, b: jax.lax.fori_loop(0, 599, lambda _, s: train_step(s, b)[0], s))
    state = run(state, batch())
    _, last = jax.jit(train_step)(state, batch())
    level = parts.schedule(np.linspace(0.12, 0.98, 40))
    u = jax.jit(parts.objective.uncertainty.apply)(state.params["objective"]["uncertainty"], level)
    # Sixteen features and gradients of 64 samples: within 5 % of the loss, of which the levels span a factor of 70.
    np.testing.assert_allclose(u, np.log(VALUE**2) - 2 * np.log(level.sigma), atol=0.05)
    # What is logged as the loss does not know of u; the term that is minimised starts as the loss.
    assert float(first.terms["uncertainty"]) == pytest.approx(float(first.loss), rel=1e-6)
    assert float(last.terms["uncertainty"]) < float(last.loss) - 1
    window = jax.jit(lambda last: steps.add(steps.empty_window(3, parts.objective.terms), last))(last)
    assert steps.scalars(jax.device_get(window))["uncertainty"] == pytest.approx(float(last.terms["uncertainty"]))


def test_uncertainty_is_finite_at_both_ends_and_lowest_at_the_log():
    own = uncertainty(8)
    params = jax.tree.map(np.ones_like, own.init(jax.random.key(0)))
    ends = core.Level(np.float32([0.0, 1.0]), np.float32([1.0, 0.0]), np.float32([0.0, 1.0]))
    assert np.all(np.isfinite(jax.jit(own.apply)(params, ends)))
    losses = np.float32([0.1, 7.0])
    slope = jax.jit(jax.grad(lambda u: jnp.sum(weighed(losses, u))))(np.log(losses))
    np.testing.assert_allclose(slope, 0, atol=1e-6)


@pytest.mark.parametrize("rate, loss, slope", [(1.0, (2 - VALUE) ** 2, 2 * (2 - VALUE)), (1e-9, 0.25, 1.0)])
def test_self_conditioning_gives_the_network_its_own_estimate_without_its_gradient(make, rate, loss, slope):
    # echo returns b, and given b beside x returns b + b; only one of the two has a gradient.
    network = dict(model="user_of_objectives:echo", loss=dict(self_condition=rate))
    config, parts = make(**FLOW | dict(head="x0()"), **network)
    _, metrics = one_step(config, parts)
    assert float(metrics.loss) == pytest.approx(loss, rel=1e-6)
    assert float(metrics.grad_norm) == pytest.approx(slope, rel=1e-6)


def test_pairing_keeps_the_marginals_and_shortens_the_way():
    x0, eps = np.asarray(jax.random.normal(jax.random.key(0), (2, 48, 2, 1, 1)))
    length = lambda a: np.mean(np.sum((x0 - a) ** 2, axis=(1, 2, 3)))
    whole, grouped = (np.asarray(jax.jit(pair)(x0, eps)) for pair in (ot(), ot(group=12)))
    for paired, rows in ((whole, 48), (grouped, 12)):
        for a, b in zip(paired.reshape(-1, rows, 2), eps.reshape(-1, rows, 2), strict=True):
            np.testing.assert_array_equal(*(c[np.lexsort(c.T)] for c in (a, b)))  # a permutation
    # Both are N(0, 1) in two dimensions: as independent pairs 4; the exact transport of the batch is far below.
    assert length(whole) < length(grouped) < 0.5 * length(eps)
    with pytest.raises(ValueError, match="group=10 does not divide the batch of 48"):
        ot(group=10)(x0, eps)


def test_pairing_is_the_same_on_eight_devices():
    code = """
    import jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    from diffjax.train.objectives.pairing import ot
    from diffjax.train.parallel.mesh import make_mesh
    from diffjax.train.parallel.sharding import batch_sharding
    x0, eps = jax.random.normal(jax.random.key(0), (2, 64, 3))
    split = batch_sharding(make_mesh())
    alone = jax.jit(ot())(x0, eps)
    many = jax.jit(ot(), in_shardings=(split, split), out_shardings=split)(*jax.device_put((x0, eps), split))
    assert len(many.sharding.device_set) == 8
    np.testing.assert_array_equal(many, alone)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_the_bound_with_the_upper_variance_is_that_of_ddpm(x64):
    # sampling.elbo is written without a variance to learn; v = 1 is its "beta" at every step, the last one included.
    table, data = core.squared_cosine(20), core.Gaussian(0.0, 0.25)
    x0 = np.round(8 * np.clip(0.5 * np.float64(jax.random.normal(jax.random.key(0), (5, 6))), -1, 1)) / 8
    noise = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(1), i), x0.shape, float)
    levels = table(np.arange(19, -1, -1.0))
    decoder = sampling.discretized_decoder(levels=17)
    elbo = lambda x0: sampling.elbo(data.denoise, x0, levels, noise=noise, variance="beta", decoder=decoder)
    expected = jax.jit(elbo)(x0)
    t = np.repeat(np.arange(20.0), 5)
    every, level = np.tile(x0, (20, 1)), table(t)

    @jax.jit
    def terms(every):
        x = core.add_noise(every, jnp.concatenate([noise(19 - i) for i in range(20)]), level)
        prediction = data.denoise(x, core.Level(*(a[:, None] for a in level)))._replace(aux=jnp.ones_like(x))
        return bound(LearnedRange(steps=20, bins=17), table, prediction, every, t)

    nats = np.mean(terms(every).reshape(20, 5), axis=0) * np.log(2) * 6
    np.testing.assert_allclose(nats, np.asarray(expected.total) - expected.prior, rtol=1e-3)


def test_only_the_variance_learns_from_the_bound(x64):
    schedule, t = core.Cosine(), jnp.array([0.001, 0.3, 1.0])
    x0 = jnp.full((3, 2), 0.4)
    total = lambda p: jnp.sum(bound(LearnedRange(steps=50), schedule, p, x0, t))
    slope = jax.jit(jax.grad(total))(Prediction(0.9 * x0, x0, jnp.zeros((3, 2))))
    assert not np.any(slope.x0) and np.all(np.isfinite(slope.aux)) and np.all(slope.aux != 0)


def vlb_of_gaussian(schedule, s, n=20_000):
    """The losses at n midpoints in time of the best network for N(0, s^2), in expectation over x."""
    level, density = levels_of(schedule, (jnp.arange(n) + 0.5) / n)
    snr = jnp.exp(level.logsnr)
    return density * snr * s**2 / (1 + snr * s**2), level


def bent(width=16):
    schedule = core.Learned(-10.0, 10.0, width=width)
    params = schedule.init(jax.random.key(0))
    shape = jax.random.normal(jax.random.key(1), (width,))
    return schedule.bind(params | {"height": params["height"] + 3 * shape, "steep": params["steep"] + shape})


@pytest.mark.parametrize("schedule", [core.LinearLogSNR(-10, 10), bent()])
def test_the_bound_of_gaussian_data_does_not_depend_on_the_path(schedule, x64):
    # The eps error of the best network is snr s^2 / (1 + snr s^2); half its integral over log-SNR is a logarithm.
    s = 0.7
    losses, _ = jax.jit(lambda: vlb_of_gaussian(schedule, s))()
    closed = 0.5 * (np.log1p(np.exp(10) * s**2) - np.log1p(np.exp(-10) * s**2))
    assert float(jnp.mean(losses)) == pytest.approx(closed, rel=1e-4)  # float32 parameters


def test_the_schedule_gets_the_gradient_of_the_squares_and_the_network_that_of_the_losses():
    params, levels = {"a": jnp.array([1.0, -2.0])}, {"l": jnp.array([0.3, 0.7, 1.1])}
    measure = lambda p, q: (jnp.sum(jnp.sin(q["l"][:, None] * p["a"]) ** 2, axis=1) * q["l"], ())
    both = lambda p, q: jnp.mean(squared_for_levels(measure)(p, q)[0])
    losses, squares = (lambda p, q, power=n: jnp.mean(measure(p, q)[0] ** power) for n in (1, 2))
    gradients = jax.jit(lambda *at: (jax.grad(both, (0, 1))(*at), (jax.grad(losses)(*at), jax.grad(squares, 1)(*at))))
    both, apart = gradients(params, levels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), both, apart)


def test_training_the_schedule_lowers_the_variance_of_the_bound_and_keeps_its_mean():
    s, optimizer = 0.7, optax.adam(3e-2)
    schedule = core.Learned(-10.0, 10.0, width=16)
    params = schedule.init(jax.random.key(0))

    def expected(_, path):
        level, density = path
        snr = jnp.exp(level.logsnr)
        return density * snr * s**2 / (1 + snr * s**2), ()

    def loss(params, key):
        path = levels_of(schedule.bind(params), core.TIMES["stratified"]()(key, 256))
        return jnp.mean(squared_for_levels(expected)((), path)[0])

    def body(i, carry):
        updates, state = optimizer.update(jax.grad(loss)(carry[0], jax.random.key(i)), carry[1])
        return optax.apply_updates(carry[0], updates), state

    trained, _ = jax.jit(lambda p: jax.lax.fori_loop(0, 400, body, (p, optimizer.init(p))))(params)
    bound_of = jax.jit(lambda p: vlb_of_gaussian(schedule.bind(p), s)[0])
    before, after = bound_of(params), bound_of(trained)
    assert float(jnp.mean(after)) == pytest.approx(float(jnp.mean(before)), rel=1e-3)
    assert float(jnp.var(after)) < 0.1 * float(jnp.var(before))


TINY = dict(batch_size=8, num_steps=10, model=dict(name="mlp", width=16, depth=1))
TABLE = dict(
    schedule="ddpm(num_steps=50)", head="eps()", time="discrete(num_steps=50)", sample=dict(spacing="leading()")
)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(loss=dict(spaec="v()")), ["config.loss.spaec", "did you mean 'space'"]),
        (dict(loss=dict(space="vv()")), ["config.loss.space", "known: edm, eps"]),
        (dict(loss=dict(pairing="to()")), ["config.loss.pairing", "did you mean 'ot'"]),
        (dict(loss=dict(self_condition=1.5)), ["config.loss.self_condition is 1.5", "[0, 1]"]),
        (dict(loss=dict(uncertainty=-1)), ["config.loss.uncertainty is -1", "Fourier features"]),
        (dict(loss=dict(variance="learned_range()")), ["config.loss.variance", "squared_cosine()", "not edm"]),
        (TABLE | dict(loss=dict(variance="learned_range()")), ["config.loss.variance", "50 entries", "steps=1000"]),
        (
            dict(loss=dict(space="v()"), weight="simple()"),
            ["config.loss.space is 'v()'", "config.weight is 'simple()'"],
        ),
        (FLOW | dict(schedule="learned()", head="v()"), ["config.schedule is 'learned()'", "config.weight='elbo()'"]),
        (dict(loss=dict(pairing="ot(group=3)")), ["config.loss.pairing", "group=3", "batch of 8"]),
        (
            dict(loss=dict(self_condition=0.5), model="user_of_objectives:zero"),
            ["config.model", "extra_in", "config.loss.self_condition"],
        ),
    ],
)
def test_refused_with_the_key_and_the_way_out(changes, words, make):
    with pytest.raises(ConfigError) as caught:
        resolve(ConfigDict(TINY | changes))
    for word in words:
        assert word in str(caught.value)


def test_the_default_is_no_objective_at_all():
    config, parts = prepare(ConfigDict(TINY))
    objective = build_objective(config, parts.schedule)
    assert objective.terms == () and objective.init is None and not any(objective)
    assert objective.extend(parts.model) is parts.model
    assert "objective" not in jax.eval_shape(parts.model.init, jax.random.key(0))
