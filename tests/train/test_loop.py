"""The training loop: resuming is exact to the bit, and nothing bad is ever saved or overwritten."""

import io
import json
import os
import signal
import textwrap

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax import files
from diffjax.train import loop
from diffjax.train.checkpoint import Checkpoints, open_checkpoints
from diffjax.train.errors import ConfigError, NonFiniteError, WorkdirError
from diffjax.train.parts import prepare
from diffjax.train.state import abstract_state, load_run
from diffjax.train.survival.workdir import locked, read_config

USER = """
import os
import jax.numpy as jnp
import numpy as np
from diffjax.core import Flow, Model
from diffjax.data import ArraySource, Dataset
from diffjax.sampling import euler

def data(value=None):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (64, 2, 2, 1)) if value is None else np.full((64, 2, 2, 1), value)
    source = ArraySource(images.astype(np.float32), np.arange(64, dtype=np.int32) % 2)
    return Dataset(source, source, (2, 2, 1), 2, lambda x: x)

def schedule():
    return Flow(shift=2.0)

def weight(power):
    return lambda level: level.alpha**power

def bias(*, shape, num_classes):
    apply = lambda p, x, t, y, key=None: jnp.broadcast_to(p["b"], x.shape)
    return Model(lambda key: {"b": jnp.zeros(())}, apply, {})

def nan_at(batch):
    # The batch number comes from outside: the loop reads one batch per step, in order.
    seen = [0]
    def fn(data, rng):
        seen[0] += 1
        image = data["image"].copy()
        if seen[0] == batch:
            image[:, 0, 0] = np.nan
        return {**data, "image": image}
    return fn

def signal_at(batch, number):
    seen = [0]
    def fn(data, rng):
        seen[0] += 1
        if seen[0] == batch:
            os.kill(os.getpid(), number)
        return data
    return fn
"""
MODULE = "user_of_test_loop"


@pytest.fixture(autouse=True)
def user_code(tmp_path, monkeypatch):
    folder = tmp_path / "their_code"
    folder.mkdir()
    (folder / f"{MODULE}.py").write_text(textwrap.dedent(USER))
    monkeypatch.syspath_prepend(folder)


def tiny(**changes):
    base = dict(
        data=f"{MODULE}:data()",
        model=f"{MODULE}:bias",
        batch_size=16,
        num_steps=40,
        log_every=10,
        checkpoint_every=20,
        optim=dict(name="adamw", lr=1e-2, schedule="flat_linear()", warmup=2, weight_decay=0.01, clip=1.0),
        ema=("power(std=0.1)", "decay(0.9)"),
    )
    return ConfigDict(base | changes)


def train(workdir, **changes):
    return loop.train(tiny(**changes), str(workdir), stream=io.StringIO())


def saved(workdir, step, **changes):
    _, parts = prepare(tiny(**changes))
    checkpoints = open_checkpoints(workdir / "checkpoints", keep=2)
    _, state = checkpoints.restore(abstract_state(parts), step=step)
    return state, checkpoints.info(step)["iterator"]


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


def timeless(workdir):
    timing = ("steps_per_s", "step_ms", "images_per_s", "data_wait", "tflops_per_s", "memory_gib")
    rows = files.read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in timing} for row in rows]


NETWORK = dict(model=dict(name="mlp", width=8, depth=1, dropout=0.2), augment=("shift(pixels=1)", "affine()"))


def test_20_and_20_steps_are_40_steps_byte_for_byte(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(whole, **NETWORK) == loop.Result(40, None)
    assert train(halves, **NETWORK, stop_at=20) == loop.Result(20, None)
    assert train(halves, **NETWORK) == loop.Result(40, None)
    (state, data), (other, other_data) = saved(whole, 40, **NETWORK), saved(halves, 40, **NETWORK)
    same_bits(state, other)
    assert data == other_data and len(jax.tree.leaves(state)) > 40
    assert timeless(whole) == timeless(halves)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bits(tmp_path, number):
    # `data_wait` aside, step 13 is no multiple of anything: the save is due to the signal.
    before = signal.getsignal(number)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(whole, num_steps=30, augment=f"{MODULE}:signal_at(99, 0)")
    config = dict(num_steps=30, augment=f"{MODULE}:signal_at(13, {int(number)})")
    stream = io.StringIO()
    assert loop.train(tiny(**config), str(cut), stream=stream) == loop.Result(13, number)
    assert signal.getsignal(number) == before
    assert f"{number.name}: saved step 13 of 30" in stream.getvalue()
    rewrite(cut, augment=[f"{MODULE}:signal_at(99, 0)"])
    assert train(cut, num_steps=30, augment=f"{MODULE}:signal_at(99, 0)") == loop.Result(30, None)
    same_bits(saved(whole, 30)[0], saved(cut, 30)[0])


def test_checkpoints_end_windows_and_score_the_rows_since_the_one_before(tmp_path):
    uneven = dict(log_every=10, checkpoint_every=15, num_steps=45, keep=3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, **uneven)
    train(parts, **uneven, stop_at=30)
    train(parts, **uneven)
    rows = files.read_rows(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 15, 20, 30, 40, 45]
    assert timeless(parts) == timeless(whole)
    steps = [0, *(row["step"] for row in rows)]
    total = np.cumsum([0, *(row["loss"] * (b - a) for row, a, b in zip(rows, steps, steps[1:], strict=False))])
    total = dict(zip(steps, total, strict=True))
    for workdir in (whole, parts):
        checkpoints = open_checkpoints(workdir / "checkpoints", keep=3)
        for step in (15, 30, 45):
            # The sums on the device are float32: 1e-5 relative.
            mean = (total[step] - total[step - 15]) / 15
            assert checkpoints.info(step)["metrics"]["loss"] == pytest.approx(mean, rel=1e-5), step


def test_rows_are_on_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    seen = []

    class Stop(Exception):
        pass

    def save(self, step, *rest):
        seen.extend(row["step"] for row in files.read_rows(tmp_path / "metrics.jsonl"))
        raise Stop

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(Stop):
        train(tmp_path, log_every=4, checkpoint_every=10)
    assert seen == [4, 8, 10]


def rewrite(workdir, **changes):
    path = workdir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_metrics_have_a_row_per_window(tmp_path):
    train(tmp_path, num_steps=25, data=f"{MODULE}:data(value=0.5)")
    rows = files.read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 25]
    for row in rows:
        assert {"loss", "grad_norm", "param_norm", "lr", "steps_per_s", "data_wait"} <= set(row)
        assert row["loss"] > 0 and row["steps_per_s"] > 0 and 0 <= row["data_wait"] <= 1
    # Warm-up over 2 steps, flat to 40 % of the other 23, then a line to 2 %; update 25 is the last of those 23.
    assert rows[0]["lr"] == pytest.approx(1e-2)
    assert rows[-1]["lr"] == pytest.approx(1e-2 * (1 - 0.98 * (22 / 23 - 0.4) / 0.6), rel=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 16


def test_training_finds_the_mean_target(tmp_path):
    # All pixels are 0.5, the network is one number b under the flow loss: the minimum of E (b - eps + 0.5)^2 is -0.5.
    flow = dict(schedule="flow()", head="flow", time="uniform()", sample=dict(spacing="uniform()", solver="euler()"))
    optim = dict(name="sgd", lr=0.05, b1=0.0)
    settings = dict(model=f"{MODULE}:bias", data=f"{MODULE}:data(value=0.5)", optim=optim, ema="power(std=0.2)")
    train(tmp_path, num_steps=150, batch_size=64, **flow, **settings)
    # SGD around the minimum has variance lr * var(grad) / 4, var(grad) = 4 / 256: 0.014 ** 2; averaged, less.
    assert float(load_run(str(tmp_path)).params["b"]) == pytest.approx(-0.5, abs=5 * 0.014)


def test_a_bad_batch_stops_the_run_and_is_never_saved(tmp_path):
    bad = dict(augment=f"{MODULE}:nan_at(33)", checkpoint_every=10, log_every=20)
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, **bad)
    text = str(caught.value)
    for words in ("step 33 is not finite", "75 % finite", "loss nan", "parameter norm nan"):
        assert words in text
    assert "last good checkpoint: step 30" in text and "config.optim.lr" in text
    counts = [int(part.partition(":")[2]) for part in text.split("labels ")[1].split(";")[0].split()]
    assert sum(counts) == 16
    assert open_checkpoints(tmp_path / "checkpoints").steps()[-1] == 30
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved(tmp_path, 30)[0]))


def test_a_diverging_run_stops_before_its_first_bad_save(tmp_path):
    optim = dict(name="sgd", lr=1e30, clip=0.0, b1=0.0)
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, optim=optim, checkpoint_every=1)
    bad = int(str(caught.value).split()[1])
    steps = open_checkpoints(tmp_path / "checkpoints").steps()
    assert steps == list(range(max(1, bad - 2), bad))
    for step in steps:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved(tmp_path, step, optim=optim)[0]))


def test_a_run_that_is_bad_from_the_start_leaves_no_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match="step 1 is not finite.* no checkpoint yet"):
        train(tmp_path, augment=f"{MODULE}:nan_at(1)", checkpoint_every=1)
    assert open_checkpoints(tmp_path / "checkpoints").steps() == []


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with locked(str(tmp_path)):
        with pytest.raises(WorkdirError, match=f"in use: process {os.getpid()}"):
            train(tmp_path)
    assert train(tmp_path, num_steps=2).step == 2


def test_another_config_is_refused_with_the_difference(tmp_path):
    train(tmp_path, num_steps=4)
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, num_steps=4, batch_size=8, label_dropout=0.5)
    assert "batch_size: 16 -> 8" in str(caught.value) and "label_dropout: 0.1 -> 0.5" in str(caught.value)
    assert train(tmp_path, num_steps=6, log_every=1) == loop.Result(6, None)


def test_a_finished_run_has_nothing_to_do(tmp_path):
    train(tmp_path, num_steps=4)
    stream = io.StringIO()
    assert loop.train(tiny(num_steps=4), str(tmp_path), stream=stream) == loop.Result(4, None)
    assert "is at step 4, and" in stream.getvalue()
    # Asked for less than is done, with other settings for sampling: the record of the run stays what it was.
    before = (tmp_path / "config.json").read_bytes()
    changed = tiny(num_steps=2)
    changed.sample = {"steps": 3}
    assert loop.train(changed, str(tmp_path), stream=stream) == loop.Result(4, None)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="is a file; give a folder"):
        loop.train(tiny(num_steps=2), str(tmp_path / "file"))


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(ConfigError, match="config.json is damaged"):
        read_config(str(tmp_path))


def test_the_users_own_code_trains(tmp_path):
    mine = dict(
        schedule=f"{MODULE}:schedule()",
        head="v",
        time="logit_normal()",
        weight=f"{MODULE}:weight(power=2)",
        model=f"{MODULE}:bias",
        sample=dict(solver=f"{MODULE}:euler()", spacing="uniform()"),
    )
    assert train(tmp_path, num_steps=3, **mine).step == 3
    run = load_run(str(tmp_path))
    assert run.schedule.shift == 2.0 and run.step == 3 and run.dataset.shape == (2, 2, 1)


def test_load_run_gives_the_asked_average(tmp_path):
    train(tmp_path, num_steps=6, checkpoint_every=3)
    state, _ = saved(tmp_path, 6)
    same_bits(load_run(str(tmp_path)).params, state.ema["power(std=0.1)"])
    same_bits(load_run(str(tmp_path), ema="decay(0.9)").params, state.ema["decay(0.9)"])
    same_bits(load_run(str(tmp_path), ema="raw", step=3).params, saved(tmp_path, 3)[0].params)
    with pytest.raises(ConfigError, match=r"unknown ema 'decay\(0.8\)'.*did you mean 'decay\(0.9\)'"):
        load_run(str(tmp_path), ema="decay(0.8)")
    checkpoints = open_checkpoints(tmp_path / "checkpoints")
    best = min((3, 6), key=lambda step: checkpoints.info(step)["metrics"]["loss"])
    assert load_run(str(tmp_path), step="best").step == best
    with pytest.raises(ConfigError, match="no checkpoint of step 5; saved steps: 3, 6"):
        load_run(str(tmp_path), step=5)
    with pytest.raises(ConfigError, match="holds no run"):
        load_run(str(tmp_path / "elsewhere"))


def test_the_best_checkpoint_need_not_be_the_last(tmp_path, monkeypatch):
    losses = iter((3.0, 1.0, 2.0))
    monkeypatch.setattr(loop, "mean_loss", lambda windows: next(losses))
    train(tmp_path, num_steps=6, checkpoint_every=2)
    assert load_run(str(tmp_path), step="best").step == 4 and load_run(str(tmp_path)).step == 6


def test_tensorboard_is_written_when_asked_for(tmp_path):
    pytest.importorskip("tensorboardX")
    train(tmp_path, num_steps=2, tensorboard=True)
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1


def test_a_run_that_is_saved_does_not_fail_for_its_summary(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(loop, "summarize", full)
    stream = io.StringIO()
    assert loop.train(tiny(num_steps=2), str(tmp_path), stream=stream) == loop.Result(2, None)
    assert "no summary in" in stream.getvalue() and "no space left" in stream.getvalue()
