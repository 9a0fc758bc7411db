"""The importer against runs of diffusers: recorded ones, its own published numbers, and live ones when asked for."""

import importlib.util
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj
from diffjax.convert import scheduler, start_scale
from diffjax.convert.options import DEFAULTS
from diffjax.convert.scheduler import READERS

PARITY = Path(__file__).parent.parent / "parity"
_spec = importlib.util.spec_from_file_location("parity_schedulers", PARITY / "schedulers.py")
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

# One rounding of float32 is 6e-8; a run of 25 steps of a smooth network stays below this.
TOLERANCE = 1e-5
LIVE = os.environ.get("DIFFJAX_PARITY")


def load(path):
    """`[(entry, arrays)]` of a file of runs."""
    data = np.load(path)
    names = [name.partition("/") for name in data.files if "/" in name]
    cases = json.loads(str(data["cases"]))
    return [(case, {k: data[f"{i}/{k}"] for j, _, k in names if j == str(i)}) for i, case in enumerate(cases)]


GOLDEN = load(PARITY / "golden" / "schedulers.npz")


def network(config):
    """The recorded runs' network; it returns a second output where the scheduler wants a variance."""

    def f(x, t):
        out = oracle.network(x, t[0], jnp)
        learned = config.get("variance_type") in ("learned", "learned_range")
        return (out, oracle.variance(x, t[0], jnp)) if learned else out

    return f


def replay(case, run, **options):
    """The states of our run [n, ...], from the recorded start and noise."""
    config = case["config"]
    solver, levels, head = scheduler(config, case["n"], **case["options"])
    # Steps in which the scheduler draws nothing ask for noise as well, with weight 0.
    noise = jnp.asarray(np.pad(run["noise"], ((0, 0), (0, 2), *((0, 0),) * 4)))
    denoise = dj.denoiser(network(config), head)
    take = {"noise": lambda i, j: noise[i, j], "trace": lambda info: info.x_next}
    return np.asarray(dj.sample(solver, denoise, jnp.asarray(run["x"]), levels, **take, **options)[1])


def rms(a):
    return np.sqrt(np.mean(np.asarray(a, np.float64) ** 2, axis=tuple(range(1, a.ndim))))


def error(states, run):
    """Distance to the recorded states [n], relative to their rms."""
    assert states.shape == run["states"].shape
    return rms(states - run["states"]) / (rms(run["states"]) + 1e-30)


def name(case):
    return f"{case['config']['_class_name'][:-9]}-{case['n']}"


def cases():
    """The recorded runs; those with a class, an option or a value that none before them has are in every run."""
    known = set()
    for case, run in GOLDEN:
        kind = case["config"]["_class_name"]
        told = {(kind, key, str(value)) for key, value in (case["config"] | case["options"]).items()}
        yield pytest.param(case, run, id=name(case), marks=pytest.mark.slow if told <= known else ())
        known |= told


@pytest.mark.parametrize(("case", "run"), list(cases()))
def test_every_state_is_that_of_diffusers(case, run):
    with jax.disable_jit():  # a compilation for each case would take ten times as long
        states = replay(case, run, loop="unroll")
    assert np.all(error(states, run) < TOLERANCE + 10 * run["spread"]), error(states, run)


@pytest.mark.parametrize("kind", ["DPMSolverMultistep-25", "HeunDiscrete-10", "PNDM-10", "UniPCMultistep-10"])
def test_the_compiled_loop_gives_the_same(kind):
    case, run = next(pair for pair in GOLDEN if name(pair[0]) == kind)
    assert np.all(error(replay(case, run), run) < TOLERANCE)


@pytest.mark.parametrize("kind", sorted(DEFAULTS))
def test_time_steps_and_start_are_those_of_diffusers(kind):
    cases = [(case, run) for case, run in GOLDEN if case["config"]["_class_name"] == kind]
    assert cases
    for case, run in cases:
        _, levels, _ = scheduler(case["config"], case["n"], **case["options"])
        t = run["timesteps"][[0, *(i + 1 for i in oracle.ends(kind, case["config"], len(run["timesteps"]))[:-1])]]
        np.testing.assert_allclose(levels.t[:-1], t, rtol=3e-7, atol=1e-5)
        unit = np.random.default_rng(3).normal(size=run["x"].shape).astype(np.float32)
        np.testing.assert_allclose(start_scale(case["config"], levels) * unit, run["x"], rtol=2e-6)


def test_every_option_of_every_class_is_recorded_away_from_its_default_somewhere():
    given = {key for case, _ in GOLDEN for key in case["config"]}
    # What has no effect in diffusers, or no value but one.
    silent = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "noise_sampler_seed", "solver_p"}
    known = {key for options in DEFAULTS.values() for key in options}
    assert known - given - silent <= {"trained_betas", "tau_func", "corrector_order"}
    assert set(READERS) == set(DEFAULTS)


def published(config, n=10, **options):
    """Sum and mean of |x| for the problem of diffusers' own tests: network `x t / (t + 1)`, no noise."""
    size = 4 * 3 * 8 * 8
    x = (np.arange(size, dtype=np.float32).reshape(3, 8, 8, 4) / size).transpose(3, 0, 1, 2)
    solver, levels, head = scheduler(config, n, **options)
    f = lambda x, t: x * (t[0] / (t[0] + 1))
    with jax.disable_jit():
        out = dj.sample(
            solver, dj.denoiser(f, head), jnp.asarray(x), levels, noise=lambda i, j: jnp.zeros(x.shape), loop="unroll"
        )
    return np.abs(out).sum(), np.abs(out).mean()


_LINEAR = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_MIN = {"final_sigmas_type": "sigma_min", "lower_order_final": False}


# Numbers that diffusers' repository asserts in its own tests of these classes (tests/schedulers).
@pytest.mark.parametrize(
    ("config", "options", "which", "expected"),
    [
        ({"_class_name": "DDIMScheduler"}, {}, 0, 172.0067),
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, {}, 0, 52.5302),
        ({"_class_name": "DDIMScheduler", "beta_start": 0.01, "set_alpha_to_one": True}, {}, 0, 149.8295),
        ({"_class_name": "DDIMInverseScheduler"}, {}, 0, 671.6816),
        ({"_class_name": "DPMSolverMultistepScheduler", **_MIN}, {}, 1, 0.3301),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                **_MIN,
                "prediction_type": "v_prediction",
                "use_karras_sigmas": True,
            },
            {},
            1,
            0.2096,
        ),
        ({"_class_name": "DPMSolverSinglestepScheduler", **_MIN}, {}, 1, 0.2791),
        ({"_class_name": "DEISMultistepScheduler"}, {}, 1, 0.23916),
        ({"_class_name": "UniPCMultistepScheduler", "final_sigmas_type": "sigma_min"}, {}, 1, 0.2464),
        ({"_class_name": "PNDMScheduler"}, {}, 0, 198.1318),
        ({"_class_name": "TCDScheduler"}, {"eta": 0.0}, 0, 181.204),
    ],
)
def test_published_numbers_of_diffusers_own_tests(config, options, which, expected):
    config = _LINEAR | config
    if config["_class_name"] == "TCDScheduler":
        config |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    # They are asserted there to 1e-2 (sums) and 1e-3 (means).
    assert published(config, **options)[which] == pytest.approx(expected, abs=(1e-2, 1e-3)[which])


@pytest.mark.parametrize(
    ("config", "n", "reference"),
    [
        ({"_class_name": "DDIMScheduler", "clip_sample": False}, 10, lambda: dj.euler()),
        ({"_class_name": "EulerDiscreteScheduler"}, 6, lambda: dj.euler()),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, 6, lambda: dj.euler()),
        ({"_class_name": "HeunDiscreteScheduler"}, 6, lambda: dj.heun("alpha")),
        ({"_class_name": "DPMSolverMultistepScheduler", "lower_order_final": False}, 10, lambda: dj.dpmpp_2m()),
    ],
)
@pytest.mark.filterwarnings("ignore:heun.*unstable")
def test_the_tables_are_the_solvers_of_the_library_on_the_same_grid(config, n, reference):
    solver, levels, head = scheduler(config, n)
    start = start_scale(config, levels) * np.random.default_rng(0).normal(size=oracle.SHAPE).astype(np.float32)
    denoise = dj.denoiser(network(config), head)
    run = jax.jit(lambda x: [dj.sample(s, denoise, x, levels) for s in (solver, reference())])
    ours, theirs = run(np.float32(start))
    # The table is rounded to float32 where diffusers rounds it: 1e-6 a step.
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_reads_files_and_folders(tmp_path):
    config = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.21.0", "trained_betas": None}
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(config))
    wanted = scheduler(config, 5)[1]
    for path in (file, str(file), file.parent, tmp_path):
        np.testing.assert_array_equal(scheduler(path, 5)[1].alpha, wanted.alpha)
    with pytest.raises(FileNotFoundError, match="scheduler_config.json"):
        scheduler(tmp_path / "nothing", 5)
    file.write_bytes(b'{"_class_name": "\xff')
    with pytest.raises(ValueError, match=f"^{file}: no JSON: "):
        scheduler(tmp_path, 5)


def test_files_of_widely_used_checkpoints_are_read():
    """Keys that other classes left in them (Stable Diffusion 1.5, SDXL, FLUX) do not stop the import."""
    base = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
    latent = base | {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None}
    scheduler(latent | {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "clip_sample": False}, 5)
    more = {"interpolation_type": "linear", "sample_max_value": 1.0, "timestep_spacing": "leading"}
    scheduler(latent | more | {"_class_name": "EulerDiscreteScheduler", "clip_sample": False}, 5)
    flux = {"_class_name": "FlowMatchEulerDiscreteScheduler", "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    scheduler(flux | {"use_dynamic_shifting": True, "max_image_seq_len": 4096}, 5, mu=1.15)


@pytest.mark.parametrize(
    ("config", "n", "options", "message"),
    [
        ({"_class_name": "DDIMSheduler"}, 5, {}, "did you mean 'DDIMScheduler'"),
        ({}, 5, {}, "unknown scheduler None"),
        ({"_class_name": "DDIMScheduler", "clip_sampel": True}, 5, {}, "did you mean 'clip_sample'"),
        ({"_class_name": "DDIMScheduler", "use_karras_sigmas": True}, 5, {}, "it is an option of .*EulerDiscrete"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "noise"}, 5, {}, "prediction_type='noise'.*'epsilon'"),
        ({"_class_name": "DDIMScheduler", "clip_sample": 1}, 5, {}, "clip_sample=1 .*true or false"),
        ({"_class_name": "DDIMScheduler", "beta_start": "x"}, 5, {}, "beta_start='x'.*a number"),
        ({"_class_name": "DDIMScheduler"}, 0, {}, "n: expected a whole number"),
        ({"_class_name": "DDIMScheduler"}, 5, {"etta": 1.0}, "did you mean 'eta'"),
        ({"_class_name": "DDIMScheduler"}, 5, {"eta": "much"}, "eta='much'"),
        ({"_class_name": "DDIMScheduler", "steps_offset": 300}, 2, {"eta": 0.0}, None),
        ({"_class_name": "DDIMScheduler", "steps_offset": 600}, 2, {}, "outside of the table"),
        ({"_class_name": "PNDMScheduler"}, 3, {}, "n >= 4"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, 5, {}, "not a finite number.*final_sigmas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, 5, {}, "mu="),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, 5, {}, "sigma_min"),
        ({"_class_name": "DDPMScheduler"}, 3, {"timesteps": [10, 20, 5]}, "decreasing"),
        ({"_class_name": "DDPMScheduler", "trained_betas": 5}, 3, {}, "trained_betas=5.*a list"),
        ({"_class_name": "DDPMScheduler", "num_train_timesteps": 10}, 11, {}, "more than num_train_timesteps"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}, 3, {}, "fixed_large_log"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, n, options, message):
    if message is None:
        scheduler(config, n, **options)
        return
    with pytest.raises(ValueError, match=message):
        scheduler(config, n, **options)


def test_a_solver_refuses_a_grid_of_another_length():
    solver, _, head = scheduler({"_class_name": "DDIMScheduler"}, 5)
    _, levels, _ = scheduler({"_class_name": "DDIMScheduler"}, 6)
    with pytest.raises(ValueError, match="5 steps"):
        dj.sample(solver, dj.denoiser(network({}), head), jnp.zeros(oracle.SHAPE), levels)


def test_a_learned_variance_needs_a_second_output():
    config = {"_class_name": "DDPMScheduler", "variance_type": "learned_range"}
    solver, levels, head = scheduler(config, 3)
    with pytest.raises(ValueError, match="must return"):
        dj.sample(solver, dj.denoiser(network({}), head), jnp.ones(oracle.SHAPE), levels, jax.random.key(0))


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler"])
def test_runs_can_be_differentiated(kind):
    config = {"_class_name": kind}
    solver, levels, head = scheduler(config, 5)
    x = np.full((1, 3, 2, 2), start_scale(config, levels), np.float32)
    denoise = dj.denoiser(network(config), head)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(dj.sample(solver, denoise, x, levels) ** 2)))(x)
    assert np.all(np.isfinite(gradient)) and np.any(np.asarray(gradient) != 0)


@pytest.mark.skipif(LIVE is None, reason="`make parity` records random configurations and sets DIFFJAX_PARITY")
@pytest.mark.parametrize("kind", sorted(DEFAULTS))
def test_live_random_configurations(kind):
    """Random configurations just recorded with diffusers; one on which it fails or returns NaN proves nothing."""
    worst, compared = [], 0
    for case, run in load(Path(LIVE) / "schedulers" / f"{kind}.npz"):
        if not case.get("finite"):
            continue
        if len(run["states"]) != case["n"]:
            with pytest.raises(ValueError, match="this spacing gives"):
                replay(case, run)
            continue
        with jax.disable_jit():
            found = error(replay(case, run, loop="unroll"), run)
        compared += 1
        if np.any(found > TOLERANCE + 10 * np.nan_to_num(run["spread"])):
            worst.append((float(found.max()), case["n"], case["config"], case["options"]))
    assert compared
    # Where float32 leaves diffusers no digits (docs/diffusers.md), no two machines agree.
    assert len(worst) <= 0.05 * compared, worst
