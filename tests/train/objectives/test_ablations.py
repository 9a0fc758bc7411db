"""Every objective by its flags alone: trained a few steps, resumed, opened and sampled from."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax import core
from diffjax.pipelines.sampler import keys_of, make_sampler
from diffjax.train import config as configs
from diffjax.train.loop import train
from diffjax.train.monitor.writers import METRICS_FILE
from diffjax.train.state import load_run

BASE = dict(
    batch_size=8, num_steps=4, log_every=2, checkpoint_every=2, ema=("power(std=0.1)",),
    model=dict(name="mlp", width=16, depth=1), optim=dict(lr=0.01),
    sample=dict(solver="ddim()", steps=3, spacing="uniform()"),
)  # fmt: skip

# As after `diffjax train --config=...`: nothing but overrides.
RUNS = {
    "beside": [
        "schedule=flow()", "head=x0()", "time=mode()", "loss.space=v()", "loss.pairing=ot(group=4)",
        "loss.uncertainty=8", "loss.self_condition=0.5", "sample.guidance=2.0",
    ],
    "iddpm": [
        "schedule=squared_cosine(num_steps=20)", "head=eps()", "time=discrete(num_steps=20)",
        "sample.spacing=leading()", "loss.variance=learned_range(steps=20, bins=17)", "model.time_scale=1.0",
        "sample.solver=ancestral_ddpm(variance='learned_range')",
    ],
    "vdm": ["schedule=learned(width=8)", "head=v()", "time=stratified()", "weight=elbo()"],
}  # fmt: skip


def config_of(flags):
    config = ConfigDict(BASE)
    for flag in flags:
        configs.override(config, *flag.split("=", 1))
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_ablation_is_a_flag(name, tmp_path):
    config = config_of(RUNS[name])
    train(config, str(tmp_path), stream=io.StringIO())
    run = load_run(str(tmp_path))
    assert run.step == 4
    logged = (tmp_path / METRICS_FILE).read_text()
    for term in {"beside": ["uncertainty"], "iddpm": ["vlb"]}.get(name, []):
        assert f'"{term}"' in logged
    assert ("objective" in run.params) == (name in ("beside", "vdm"))
    draw = make_sampler(run, **{k: run.config.sample[k] for k in ("solver", "steps", "spacing", "guidance")})
    keys, labels = keys_of([3, 4]), jnp.array([0, 1])
    x = draw(run.params, keys, labels)
    assert x.shape == (2, 8, 8, 1) and np.all(np.isfinite(x)) and np.std(x) > 0
    if name == "beside":
        check_that_estimates_are_used(run, x, keys, labels)
    if name == "vdm":
        check_that_the_schedule_is_the_trained_one(run)


def check_that_estimates_are_used(run, x, keys, labels):
    deaf = lambda *args, estimate=None, **given: run.model.apply(*args, **given)
    without = make_sampler(run._replace(model=run.model._replace(apply=deaf)), steps=3, spacing="uniform()",
                           solver="ddim()", guidance=2.0)  # fmt: skip
    assert not np.array_equal(without(run.params, keys, labels), x)


def check_that_the_schedule_is_the_trained_one(run):
    t = np.linspace(0, 1, 9)
    start = core.Learned(width=8)
    assert np.abs(run.schedule(t).logsnr - start(t).logsnr).max() > 1e-3
    np.testing.assert_array_equal(run.schedule(t).logsnr, start.bind(run.params["objective"]["schedule"])(t).logsnr)
    first = start.init(jax.random.key(0))
    assert set(run.params["objective"]["schedule"]) == set(first)
