"""The training step against closed forms: a network that returns a constant has a known loss and a known gradient."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax.train import step as steps
from diffjax.train.parts import prepare
from diffjax.train.state import init_state

BATCH, SHAPE, CLASSES = 512, (4, 4, 1), 3
VALUE = 0.5  # every pixel of every image

USER = """
import jax.numpy as jnp
import numpy as np
from diffjax.core import Model
from diffjax.data import ArraySource, Dataset

def data():
    source = ArraySource(np.full((600, 4, 4, 1), 0.5, np.float32), np.arange(600, dtype=np.int32) % 3)
    return Dataset(source, source, (4, 4, 1), 3, lambda x: x)

def bias(*, shape, num_classes):
    apply = lambda p, x, t, y, key=None: jnp.broadcast_to(p["b"], x.shape)
    return Model(lambda key: {"b": jnp.zeros(())}, apply, {})

def fixed(t):
    return lambda key, n: jnp.full(n, t)
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """`make(**changes) -> (config, parts)` of a network that returns its one parameter everywhere."""
    (tmp_path / "user_of_test_step.py").write_text(textwrap.dedent(USER))
    monkeypatch.syspath_prepend(tmp_path)

    def make(**changes):
        base = dict(
            data="user_of_test_step:data()", model="user_of_test_step:bias", batch_size=BATCH, ema=(),
            optim=dict(name="sgd", lr=0.5, b1=0.0, clip=0.0), label_dropout=0.0,
        )  # fmt: skip
        return prepare(ConfigDict(base | changes))

    return make


FLOW = dict(schedule="flow()", head="flow", time="uniform()", sample=dict(spacing="uniform()"))


def batch(image=None):
    image = np.full((BATCH, *SHAPE), VALUE, np.float32) if image is None else image
    return {"image": image, "label": np.arange(BATCH, dtype=np.int32) % CLASSES}


def one_step(config, parts):
    state = init_state(parts, jax.random.key(config.seed))
    return jax.jit(steps.make_train_step(parts, config))(state, batch())


@pytest.mark.parametrize(
    "settings, expected",
    [
        # A network that returns 0 has the mean square of its target as loss, for unit noise and x0 = VALUE.
        (FLOW, 1 + VALUE**2),
        (FLOW | dict(head="x0"), VALUE**2),
        (dict(schedule="cosine()", head="v", time="uniform()", sample=dict(spacing="uniform()")), (1 + VALUE**2) / 2),
        (dict(schedule="vp()", head="eps", time="uniform(lo=1e-3)"), 1.0),
        (dict(schedule="ve()", head="score", time="user_of_test_step:fixed(1.0)"), None),
        (dict(schedule="ddpm()", head="eps", time="discrete()", sample=dict(spacing="leading()")), 1.0),
        (dict(schedule="edm()", head=f"edm(sigma_data={VALUE})"), 1.0),
        (dict(schedule="cosine()", head="eps", time="uniform(lo=0.1, hi=0.9)", weight="min_snr(gamma=1e9)"), 1.0),
    ],
)
def test_loss_of_a_zero_network_is_the_mean_square_of_the_target(make, settings, expected):
    config, parts = make(**settings)
    _, metrics = one_step(config, parts)
    if expected is None:
        expected = 1 / float(parts.schedule(1.0).sigma) ** 2
    # The mean of N = 8192 squares of unit normals has standard error sqrt(2 / N) = 0.016; uniform times add less.
    assert float(metrics.loss) == pytest.approx(expected, rel=5 * 0.02)


def test_one_step_of_gradient_descent_lands_on_the_mean_target(make):
    config, parts = make(**FLOW)
    state, metrics = one_step(config, parts)
    # loss = mean (b - u)^2, so from b = 0 with lr = 1/2: b = mean u = mean eps - VALUE; se(mean eps) = 1 / sqrt(8192).
    assert float(state.params["b"]) == pytest.approx(-VALUE, abs=5 / np.sqrt(8192))
    # And the gradient there was 2 (b - mean u) = -2 mean u.
    assert float(metrics.grad_norm) == pytest.approx(2 * abs(float(state.params["b"])), rel=1e-5)
    # It began at zero, so the update is where it is now.
    assert float(metrics.update_norm) == pytest.approx(abs(float(state.params["b"])), rel=1e-6)
    assert int(state.step) == 1 and int(metrics.bad_step) == steps.NEVER


def test_randomness_is_a_function_of_seed_and_step_alone(make):
    def losses(**seed):
        config, parts = make(**FLOW, **seed)
        state, step = init_state(parts, jax.random.key(config.seed)), jax.jit(steps.make_train_step(parts, config))
        return [float(step(state._replace(step=jnp.int32(at)), batch())[1].loss) for at in (7, 8)]

    first, again, other = losses(), losses(), losses(seed=1)
    assert first == again
    assert len({*first, other[0]}) == 3


def test_losses_fall_into_the_bin_of_their_log_snr(make):
    # EDM at sigma = exp(-1/2): log-SNR = 1, in the fifth bin, [0, 2).
    config, parts = make(schedule="edm()", head="edm(sigma_data=0.5)", time="user_of_test_step:fixed(0.60653066)")
    _, metrics = one_step(config, parts)
    np.testing.assert_array_equal(metrics.bin_count, [0, 0, 0, 0, BATCH, 0, 0, 0])
    assert float(metrics.bin_loss[4]) == pytest.approx(BATCH * float(metrics.loss), rel=1e-5)
    values = steps.scalars(jax.device_get(metrics))
    assert values["loss_logsnr[0,2]"] == pytest.approx(values["loss"], rel=1e-5)
    assert [k for k in values if k.startswith("loss_logsnr")] == ["loss_logsnr[0,2]"]


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_labels_become_the_null_class_at_the_given_rate(make, rate):
    n = 20_000
    labels = np.arange(n, dtype=np.int32) % 3
    dropped = np.asarray(jax.jit(lambda key, y: steps.drop_labels(key, y, rate, 3))(jax.random.key(0), labels))
    kept = dropped != 3
    np.testing.assert_array_equal(dropped[kept], labels[kept])
    # Binomial standard error, five of them; exactly none and all at the ends.
    assert abs(np.mean(~kept) - rate) <= 5 * np.sqrt(rate * (1 - rate) / n)


def test_the_window_keeps_the_first_bad_step_and_its_batch(make):
    config, parts = make(**FLOW)
    good, bad = batch(), batch()
    bad["image"] = bad["image"].copy()
    bad["image"][:128, 0, 0, 0] = np.nan
    bad["image"][0, 1, 1, 0] = 7.0
    bad["label"] = np.zeros(BATCH, np.int32)
    window = steps.empty_window(CLASSES)
    state = init_state(parts, jax.random.key(0))
    step_fn = jax.jit(steps.with_window(steps.make_train_step(parts, config)))
    for data in (good, good, bad, good, good):
        state, window = step_fn(state, window, data)
    assert int(window.steps) == 5 and int(window.bad_step) == 2
    stats = window.batch
    assert float(stats.finite) == pytest.approx(1 - 128 / (BATCH * 16))
    assert float(stats.max) == 7.0 and float(stats.min) == VALUE
    np.testing.assert_array_equal(stats.labels, [BATCH, 0, 0, 0])
    assert np.isnan(stats.loss)


def test_the_window_sums_what_the_steps_return(make):
    config, parts = make(**FLOW)
    train_step = jax.jit(steps.make_train_step(parts, config))
    state, window, seen = init_state(parts, jax.random.key(0)), steps.empty_window(CLASSES), []
    for _ in range(3):
        state, metrics = train_step(state, batch())
        window = steps.add(window, metrics)
        seen.append(metrics)
    values = steps.scalars(jax.device_get(window))
    assert values["loss"] == pytest.approx(np.mean([float(m.loss) for m in seen]), rel=1e-6)
    assert values["grad_norm"] == pytest.approx(np.mean([float(m.grad_norm) for m in seen]), rel=1e-6)
    assert values["update_norm"] == pytest.approx(np.mean([float(m.update_norm) for m in seen]), rel=1e-6)
    assert values["param_norm"] == pytest.approx(abs(float(state.params["b"])), rel=1e-6)
    assert float(jnp.sum(window.bin_count)) == 3 * BATCH


def test_averages_follow_their_rule(make):
    config, parts = make(**FLOW, ema=("decay(0.75, warmup=False)", "power(std=0.1)"))
    state = init_state(parts, jax.random.key(0))
    start = float(state.params["b"])
    state, _ = jax.jit(steps.make_train_step(parts, config))(state, batch())
    now = float(state.params["b"])
    assert float(state.ema["decay(0.75, warmup=False)"]["b"]) == pytest.approx(0.75 * start + 0.25 * now, rel=1e-6)
    # The power-function average gives the initial parameters no weight (arXiv:2312.02696, Eq. 1 at t_1).
    assert float(state.ema["power(std=0.1)"]["b"]) == now
