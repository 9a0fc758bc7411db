"""A run goes on with other devices: on 8, then 4, then 1, then 8, its loss is that of the run that never moved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
# Each start is its own process, because the number of devices is fixed when JAX starts.
RUN = """
import io, json, sys
from ml_collections import ConfigDict
import jax
workdir, devices, stop, mesh, sharding = sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:6]
jax.config.update("jax_num_cpu_devices", devices)
from diffjax.train import loop
config = dict(
    data="digits()", model=dict(name="mlp", width=16, depth=1), batch_size=16, num_steps=40, log_every=1,
    checkpoint_every=10, stop_at=stop, mesh=mesh, sharding=sharding, optim=dict(name="sgd", lr=1e-2, b1=0.9),
    ema=("decay(0.9)",), keep=4,
)
result = loop.train(ConfigDict(config), workdir, stream=io.StringIO())
assert result.step == stop and jax.device_count() == devices
"""


def start(workdir, devices, stop, mesh, sharding):
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    arguments = [str(workdir), str(devices), str(stop), mesh, sharding]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    return np.array([row["loss"] for row in rows])


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unmoved")
    start(workdir, 1, 40, "", "data")
    return losses(workdir)


@pytest.mark.faults
def test_8_to_4_to_1_to_8_devices(tmp_path, unmoved):
    # Another number of devices and another mesh each time; the state is spread over it, and whole on one.
    moves = [(8, 10, "data=2,fsdp=4", "fsdp"), (4, 20, "fsdp=4", "fsdp"), (1, 30, "", "data"), (8, 40, "", "data")]
    for devices, stop, mesh, sharding in moves:
        start(tmp_path, devices, stop, mesh, sharding)
    # float32 sums in another order; momentum descent neither damps nor amplifies that in 40 steps.
    np.testing.assert_allclose(losses(tmp_path), unmoved, rtol=1e-4)
    history = [json.loads(line) for line in (tmp_path / "config_history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history] == [10, 20, 30]
    assert "mesh: 'data=2,fsdp=4' -> 'fsdp=4'" in history[0]["changes"]
