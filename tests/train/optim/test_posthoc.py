"""Averages of any length from snapshots: against quadrature, on synthetic trajectories, and on a run."""

import io
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from ml_collections import ConfigDict

from diffjax.train import loop, paths
from diffjax.train.errors import ConfigError
from diffjax.train.optim import snapshots
from diffjax.train.optim.ema import gamma_of, power
from diffjax.train.optim.posthoc import coefficients, inner_products, reconstruct
from diffjax.train.parts import resolve
from diffjax.train.state import load_run


def profile(time, gamma):
    return lambda tau: np.where(tau <= time, (gamma + 1) * (tau / time) ** gamma / time, 0.0)


def quadrature(a, b):
    """The integral of the product of two profiles, in two pieces, as it jumps at the shorter one's end."""
    f, g = profile(*a), profile(*b)
    ends = sorted({0.0, a[0], b[0]})
    pieces = zip(ends, ends[1:], strict=False)
    return sum(scipy.integrate.quad(lambda t: float(f(t) * g(t)), lo, hi, epsabs=1e-13)[0] for lo, hi in pieces)


PAIRS = [(1.0, gamma_of(0.05)), (0.25, gamma_of(0.1)), (0.7, 0.0), (3.0, gamma_of(0.2)), (0.25, gamma_of(0.05))]


def test_inner_products_are_integrals():
    times, gammas = zip(*PAIRS, strict=True)
    exact = [[quadrature(a, b) for b in PAIRS] for a in PAIRS]
    np.testing.assert_allclose(inner_products(times, gammas, times, gammas), exact, rtol=1e-8, atol=1e-10)


def stored(count, stds=(0.05, 0.1)):
    return np.repeat(np.arange(1, count + 1) / count, len(stds)), np.tile([gamma_of(s) for s in stds], count)


def test_coefficients_solve_the_normal_equations_of_quadrature():
    times, gammas = stored(4)
    every, want = list(zip(times, gammas, strict=True)), (1.0, gamma_of(0.07))
    gram = np.array([[quadrature(a, b) for b in every] for a in every])
    exact = np.linalg.solve(gram, [quadrature(a, want) for a in every])
    weights, error = coefficients(times, gammas, *want)
    np.testing.assert_allclose(weights, exact / exact.sum(), atol=1e-5)
    # The error that it states is that of the profile which the weights give.
    tau = (np.arange(200_000) + 0.5) / 200_000
    given = sum(w * profile(*snapshot)(tau) for w, snapshot in zip(weights, every, strict=True))
    off = given - profile(*want)(tau)
    assert error == pytest.approx(np.sqrt(np.mean(off**2) / quadrature(want, want)), rel=1e-3)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)


def test_a_stored_average_is_found_as_it_is():
    times, gammas = stored(20)
    weights, error = coefficients(times, gammas, 0.5, gamma_of(0.1))
    assert weights[19] == pytest.approx(1.0, abs=1e-5) and error < 1e-5


def test_more_snapshots_come_nearer():
    errors = [coefficients(*stored(count), 1.0, gamma_of(0.07))[1] for count in (5, 10, 20, 40)]
    # A piecewise fit of a smooth profile: each doubling gains at least a factor of 2, here nearly 4.
    assert all(fine < coarse / 2 for coarse, fine in zip(errors, errors[1:], strict=False)), errors


def tracked_run(steps, every, stds, trajectory):
    """A directory-less stand-in for snapshots: the averages of a trajectory, stored every `every` steps."""
    averages = {f"power(std={std})": power(std) for std in stds}
    start = trajectory(jnp.int32(0))

    @jax.jit
    def run():
        def step(copies, i):
            value = trajectory(i)
            copies = {spec: averages[spec].update(copy, value, i) for spec, copy in copies.items()}
            return copies, copies

        copies = {spec: average.init(start) for spec, average in averages.items()}
        return jax.lax.scan(step, copies, jnp.arange(1, steps + 1))[1]

    found = jax.tree.map(np.asarray, run())

    class Kept:
        directory = "kept"
        steps = staticmethod(lambda: list(range(every, steps + 1, every)))

        @staticmethod
        def restore_part(prefix, at):
            return at, {"w": found[prefix.removeprefix("ema/")][at - 1]}

    return Kept, {f"power(std={std})": std for std in stds}, found


def smooth(i):
    """Parameters that settle, oscillate and drift, in equal parts."""
    t = i / 2000
    return jnp.stack([jnp.exp(-3 * t), jnp.sin(9 * t), t, jnp.sqrt(t), 0 * t + 5.0])


@pytest.mark.parametrize("std, step", [(0.07, 2000), (0.08, 1500), (0.06, 1750), (0.12, 2000), (0.2, 2000)])
def test_averages_of_a_smooth_trajectory(std, step):
    kept, stds, _ = tracked_run(2000, 50, (0.05, 0.1), smooth)
    _, _, truth = tracked_run(2000, 50, (std,), smooth)
    at, rebuilt = reconstruct(kept, stds, std, step)
    exact = truth[f"power(std={std})"][step - 1]
    assert at == step
    # Between the stored widths the profile is 1e-3 off, outside 3e-3, and a smooth trajectory averages that out.
    np.testing.assert_allclose(rebuilt["w"], exact, rtol=1e-3 if std < 0.2 else 3e-3, atol=1e-4)


def test_averages_of_a_random_walk():
    walk = np.cumsum(np.random.default_rng(0).normal(size=(2001, 200)), axis=0).astype(np.float32)
    kept, stds, _ = tracked_run(2000, 50, (0.05, 0.1), lambda i: jnp.asarray(walk)[i])
    _, _, truth = tracked_run(2000, 50, (0.07,), lambda i: jnp.asarray(walk)[i])
    _, rebuilt = reconstruct(kept, stds, 0.07)
    exact = truth["power(std=0.07)"][-1]
    assert np.linalg.norm(rebuilt["w"] - exact) < 1e-3 * np.linalg.norm(exact - walk[-1])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that tracks three widths and stores them; the third is what the other two are asked for."""
    folder = tmp_path_factory.mktemp("run")
    config = ConfigDict(
        dict(
            data="digits()", batch_size=16, num_steps=120, checkpoint_every=50, log_every=60, ema_snapshots=12,
            model=dict(name="mlp", width=16, depth=1), optim=dict(name="adam", lr=3e-3),
            ema=("power(std=0.05)", "power(std=0.1)", "power(std=0.07)"),
        )
    )  # fmt: skip
    stream = io.StringIO()
    loop.train(config, str(folder), stream=stream)
    return folder, config, stream.getvalue()


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in paths.named_leaves(tree).values()])


def test_a_third_profile_of_a_real_run_is_rebuilt_from_two(run):
    folder, config, text = run
    kept = snapshots.open_snapshots(str(folder))
    assert kept.steps() == list(range(12, 121, 12))
    assert "ema snapshots every 12 steps: 10 of" in text
    two = {spec: std for spec, std in snapshots.tracked(config.ema).items() if std != 0.07}
    step, rebuilt = reconstruct(kept, two, 0.07)
    truth, raw = (flat(load_run(str(folder), ema=spec).params) for spec in ("power(std=0.07)", "raw"))
    off = np.linalg.norm(flat(rebuilt) - truth)
    assert step == 120 and off < 1e-2 * np.linalg.norm(truth)
    # And against what averaging changed at all, a far harder measure.
    assert off < 2e-2 * np.linalg.norm(raw - truth)


def test_a_run_is_opened_at_any_width_and_step(run):
    folder, _, _ = run
    opened = load_run(str(folder), ema="posthoc(std=0.1)", step=96)
    assert (opened.step, opened.ema) == (96, "posthoc(std=0.1)")
    stored_there = snapshots.open_snapshots(str(folder)).restore_part("ema/power(std=0.1)", 96)[1]
    np.testing.assert_allclose(flat(opened.params), flat(stored_there), atol=1e-5)
    assert load_run(str(folder), ema="posthoc(std=0.06)").step == 120


def test_a_resumed_run_takes_its_later_snapshots_anew(run, tmp_path):
    _, config, _ = run
    short = ConfigDict({**config.to_dict(), "stop_at": 24, "checkpoint_every": 24})
    loop.train(short, str(tmp_path), stream=io.StringIO())
    kept = snapshots.open_snapshots(str(tmp_path))
    kept.save(36, {"ema": {"power(std=0.05)": {"of": np.ones(1, np.float32)}}})
    kept.close()
    loop.train(ConfigDict({**short.to_dict(), "stop_at": 40}), str(tmp_path), stream=io.StringIO())
    again = snapshots.open_snapshots(str(tmp_path))
    assert again.steps() == [12, 24, 36, 40]
    whole = snapshots.open_snapshots(str(run[0]))
    for step in (12, 24, 36):
        ours, theirs = (kept.restore_part("ema/power(std=0.05)", step)[1] for kept in (again, whole))
        np.testing.assert_array_equal(flat(ours), flat(theirs))


def test_a_damaged_snapshot_is_reported_and_left_out(run, tmp_path, caplog):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(run[0], folder)
    for file in (folder / "ema_snapshots" / "48" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size))
    with caplog.at_level(logging.WARNING):
        opened = load_run(str(folder), ema="posthoc(std=0.08)")
    whole = load_run(str(run[0]), ema="posthoc(std=0.08)")
    assert "going on without that snapshot" in caplog.text and "48" in caplog.text
    assert np.linalg.norm(flat(opened.params) - flat(whole.params)) < 1e-2 * np.linalg.norm(flat(whole.params))


@pytest.mark.parametrize(
    "ema, step, message",
    [
        ("posthoc()", None, r"as in 'posthoc\(std=0.07\)'"),
        ("posthoc(std=0.5)", None, "0 < std <= 0.2887"),
        ("posthoc(std=0.005)", None, "% off; ask for a width between the stored ones"),
        ("posthoc(std=0.1)", 100, "10 steps from 12 to 120; the nearest is 96"),
        ("posthoc(std=0.1)", "best", "give the number"),
        ("posthc(std=0.1)", None, "and 'posthoc"),
    ],
)
def test_wrong_wishes_say_what_is_possible(run, ema, step, message):
    with pytest.raises(ConfigError, match=message):
        load_run(str(run[0]), ema=ema, step=step)


def test_snapshots_need_a_power_average():
    with pytest.raises(ConfigError, match="track two"):
        resolve(ConfigDict(dict(data="digits()", ema=("decay(0.99)",), ema_snapshots=10)))
