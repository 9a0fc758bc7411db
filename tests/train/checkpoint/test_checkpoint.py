import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffjax.train.checkpoint import CheckpointError, meta, open_checkpoints


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    opt_state: Any


class Iterator:
    """Counts; the state is JSON."""

    def __init__(self, position=0):
        self.position = position

    def get_state(self):
        return {"next_index": self.position, "inner": [1, None, "a"]}

    def set_state(self, state):
        assert state["inner"] == [1, None, "a"]
        self.position = state["next_index"]


def make(step, seed=0):
    """A state with every awkward leaf: bfloat16, scalars, bool, nan and -0.0, zeros, names with '/', '.', '('."""
    key = jax.random.key(seed * 1000 + step)
    params = {
        "dense.0": {"kernel": jax.random.normal(key, (5, 3)), "bias": jnp.array([jnp.nan, -0.0, jnp.inf])},
        "half": jax.random.normal(key, (7,), jnp.bfloat16),
        "zeros": jnp.zeros((2, 2)),
        "mask": jnp.array([True, False]),
        "table": jax.random.normal(key, (100, 100)),
    }
    moments = optax.adam(1e-3).init(params)
    ema = {"power(std=0.1)": params, "my.pkg:fn(path='a/b')": jax.tree.map(lambda p: p[::-1], params)}
    return State(jnp.int32(step), params, ema, moments)


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = open_checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, make(step), Iterator(10 * step), {"lr": 0.1, "shape": (8, 8, 1)}, {"fid": 1.0})
    checkpoints.close()
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("diffjax") and r.levelno >= logging.WARNING]


def test_everything_comes_back_bit_for_bit(saved):
    iterator = Iterator()
    like = jax.eval_shape(lambda: make(0))
    step, state = open_checkpoints(saved).restore(like, iterator)
    assert step == 2 and iterator.position == 20
    same_bits(state, make(2))
    info = open_checkpoints(saved).info(2)
    assert info["config"] == {"lr": 0.1, "shape": [8, 8, 1]} and info["metrics"] == {"fid": 1.0}
    assert info["versions"]["jax"] == jax.__version__ and info["format"] == 2


def test_an_earlier_step_on_request(saved):
    iterator = Iterator()
    step, state = open_checkpoints(saved).restore(make(0), iterator, step=1)
    assert (step, iterator.position) == (1, 10)
    same_bits(state, make(1))


def test_only_the_parameters(saved):
    step, params = open_checkpoints(saved).restore_part("params")
    assert step == 2
    same_bits(params, make(2).params)
    name = "my.pkg:fn(path='a/b')"
    same_bits(open_checkpoints(saved).restore_part(f"ema/{name}", step=1)[1], make(1).ema[name])
    host = open_checkpoints(saved).restore_part("params", host=True)[1]
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
    same_bits(host, make(2).params)
    with pytest.raises(ValueError, match="nothing under 'emma'; it has: .*params"):
        open_checkpoints(saved).restore_part("emma")


def test_a_folder_without_checkpoints_is_left_alone(tmp_path):
    checkpoints = open_checkpoints(tmp_path / "none")
    assert checkpoints.restore(make(0)) is None and checkpoints.restore_part("params") is None
    assert checkpoints.steps() == [] and checkpoints.best_step() is None
    checkpoints.close()
    assert not (tmp_path / "none").exists()
    with pytest.raises(CheckpointError, match="no checkpoint of step 3 .*there are: none"):
        checkpoints.restore(make(0), step=3)


def test_the_state_may_be_donated_at_once(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    state = {"w": jnp.arange(100_000.0)}
    overwrite = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    for step in (1, 2):
        checkpoints.save(step, state)
        state = overwrite(state)
    checkpoints.close()
    np.testing.assert_array_equal(checkpoints.restore(state, step=1)[1]["w"], np.arange(100_000.0))


def test_the_latest_and_the_best_are_kept(tmp_path):
    for step, fid in enumerate([5.0, 1.0, float("nan"), 4.0, 3.0, None], start=1):
        # Opened anew each time: the best is remembered across restarts.
        checkpoints = open_checkpoints(tmp_path, keep=2, best_metric="fid")
        assert checkpoints.save(step, {"w": jnp.zeros(1)}, metrics={} if fid is None else {"fid": fid})
        checkpoints.close()
    assert checkpoints.steps() == [2, 5, 6] and checkpoints.best_step() == 2
    assert open_checkpoints(tmp_path, best_metric="fid", best_mode="max").best_step() == 5
    assert open_checkpoints(tmp_path).best_step() is None


def test_a_saved_step_is_not_saved_twice_and_time_does_not_run_backwards(copied):
    checkpoints = open_checkpoints(copied)
    assert not checkpoints.save(2, make(7))
    same_bits(checkpoints.restore(make(0))[1], make(2))
    shutil.move(copied / "1", copied / "5")
    with pytest.raises(CheckpointError, match=r"later steps \[5\]"):
        checkpoints.save(3, make(3))


def zero(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(len(content[middle : middle + 64]))
    path.write_bytes(content)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [zero, flip, cut, os.remove])
def test_damage_to_any_file_is_noticed_or_harmless(copied, harm, caplog):
    files = [p for p in (copied / "2").rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) >= 4
    noticed = set()
    for file in files:
        content = file.read_bytes()
        harm(file)
        caplog.clear()
        iterator = Iterator()
        step, state = open_checkpoints(copied).restore(make(0), iterator)
        same_bits(state, make(step))
        assert iterator.position == 10 * step
        if step == 1:
            noticed.add(file)
            [warning] = warnings(caplog)
            assert str(copied / "2") in warning and any(
                s in warning for s in ("leaf ", "meta/metadata", "blocks-0.json")
            )
        file.write_bytes(content)
    data = {max(files, key=lambda p: p.stat().st_size)}
    must = {copied / "2/meta/metadata", copied / "2/state/blocks-0.json"}
    assert noticed >= must | data


def test_values_that_the_store_returns_changed_without_an_error_are_noticed(copied, caplog):
    file = max((copied / "2/state").glob("*.bin"), key=lambda p: p.stat().st_size)
    content = file.read_bytes()
    for start in range(len(content) // 20, len(content), len(content) // 20):
        file.write_bytes(content[:start] + bytes(64) + content[start + 64 :])
        step, state = open_checkpoints(copied).restore(make(0))
        same_bits(state, make(step))
    assert any("/table" in w and "does not match its checksum" in w for w in warnings(caplog))


def damage(folder):
    for file in (folder / "state").glob("*.bin"):
        cut(file)


def test_a_damaged_checkpoint_is_set_aside_and_written_again(copied, caplog):
    damage(copied / "2")
    checkpoints = open_checkpoints(copied)
    assert checkpoints.restore(make(0))[0] == 1
    assert checkpoints.steps() == [1] and (copied / "2").exists()
    assert checkpoints.save(2, make(2))
    checkpoints.close()
    assert checkpoints.steps() == [1, 2] and len(list((copied / "damaged").iterdir())) == 1
    caplog.clear()
    same_bits(open_checkpoints(copied).restore(make(0))[1], make(2))
    assert not warnings(caplog)


def test_a_checkpoint_that_goes_bad_while_the_run_lasts_is_written_again(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, make(step))
    checkpoints.wait()
    damage(tmp_path / "2")
    assert checkpoints.restore(make(0))[0] == 1
    assert checkpoints.save(2, make(7))
    checkpoints.close()
    same_bits(open_checkpoints(tmp_path).restore(make(0), step=2)[1], make(7))
    assert len(list((tmp_path / "damaged").iterdir())) == 1


def test_no_readable_checkpoint_is_an_error_not_a_fresh_start(copied):
    damage(copied / "1")
    (copied / "2/meta/metadata").write_text("{}")
    with pytest.raises(CheckpointError, match="no readable checkpoint .*step 2: .*step 1: .*start afresh"):
        open_checkpoints(copied).restore(make(0))


def test_a_damaged_step_asked_for_by_number_is_an_error(copied):
    damage(copied / "2")
    with pytest.raises(CheckpointError, match=r"2 is damaged: leaf .*; other steps: \[1\]"):
        open_checkpoints(copied).restore(make(0), step=2)


def test_a_later_format_is_an_error(copied):
    path = copied / "2/meta/metadata"
    content = json.loads(path.read_text())["content"] | {"format": 99}
    path.write_text(json.dumps({"content": content, "digest": meta.digest(content)}))
    with pytest.raises(CheckpointError, match="format 99"):
        open_checkpoints(copied).restore(make(0))


def test_restore_lists_every_difference(saved):
    state = make(0)
    params = dict(state.params, extra=jnp.zeros(1), half=state.params["half"].astype(jnp.float32))
    params["dense.0"] = dict(params["dense.0"], kernel=jnp.zeros((5, 4)))
    del params["mask"]
    with pytest.raises(ValueError) as error:
        open_checkpoints(saved).restore(state._replace(params=params))
    text = str(error.value)
    assert "missing from it: params/extra\n" in text and "unexpected in it: params/mask\n" in text
    assert "params/dense.0/kernel: it has float32[5, 3], wanted float32[5, 4]" in text
    assert "params/half: it has bfloat16[7], wanted float32[7]" in text
    assert "bias" not in text and "ema" not in text


def test_an_iterator_needs_a_saved_state(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, {"w": jnp.zeros(1)})
    with pytest.raises(ValueError, match="without the state of a data iterator"):
        checkpoints.restore({"w": jnp.zeros(1)}, Iterator())
    checkpoints.close()


@pytest.mark.parametrize(
    "state, config, message",
    [
        ({"w": 1.0}, None, "leaf 'w': float is not a plain array"),
        ({"k": jax.random.key(0)}, None, "leaf 'k'"),
        ({"w": np.zeros(1)}, {"fn": print}, "config cannot be stored as JSON"),
        ({"a/b": np.zeros(1), "a": {"b": np.zeros(1)}}, None, "two leaves are named 'a/b'"),
    ],
)
def test_what_cannot_be_saved(tmp_path, state, config, message):
    with pytest.raises(ValueError, match=message):
        open_checkpoints(tmp_path).save(1, state, config=config)
    with pytest.raises(ValueError, match="at least 2"):
        open_checkpoints(tmp_path, keep=1)


def test_what_an_interrupted_save_left_is_ignored_then_removed(copied):
    stale = copied / "3.orbax-checkpoint-tmp"
    shutil.copytree(copied / "2", stale)
    damage(stale)
    checkpoints = open_checkpoints(copied)
    assert checkpoints.steps() == [1, 2] and checkpoints.restore(make(0))[0] == 2
    assert stale.exists()
    checkpoints.save(3, make(3))
    checkpoints.close()
    assert not stale.exists() and checkpoints.steps() == [2, 3]


def test_a_full_disk_keeps_the_last_good_checkpoint(copied):
    checkpoints = open_checkpoints(copied)
    big = {"w": jax.random.normal(jax.random.key(0), (500_000,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow past 100 kB: writes fail as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write checkpoint 3 .*the last good checkpoint is step 2"):
            checkpoints.save(3, big)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]
    same_bits(checkpoints.restore(make(0))[1], make(2))
    checkpoints.save(4, make(4))
    checkpoints.close()
    assert checkpoints.steps() == [2, 4] and not list(copied.glob("*tmp*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoint 1 .*there is no earlier checkpoint"):
        open_checkpoints(tmp_path / "file" / "checkpoints").save(1, {"w": jnp.zeros(1)})


WRITER = """
import sys, numpy as np
from diffjax.train.checkpoint import open_checkpoints
checkpoints = open_checkpoints(sys.argv[1])
for step in range(1, 1000):
    checkpoints.save(step, {"w": np.random.default_rng(step).normal(size=(20, 50_000))})
"""


def test_a_kill_inside_a_save_leaves_the_last_checkpoint(tmp_path):
    folder = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", WRITER, folder], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "2").is_dir():
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.002)
        while not list(folder.glob("*.orbax-checkpoint-tmp")):
            assert time.monotonic() < deadline and child.poll() is None
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert list(folder.glob("*.orbax-checkpoint-tmp"))
    checkpoints = open_checkpoints(folder)
    # float64, which stays as it is in numpy arrays and is refused elsewhere.
    like = np.zeros((20, 50_000))
    step, state = checkpoints.restore({"w": like})
    assert step >= 2
    np.testing.assert_array_equal(state["w"], np.random.default_rng(step).normal(size=(20, 50_000)))
    with pytest.raises(ValueError, match="a leaf is float64"):
        checkpoints.restore({"w": jax.ShapeDtypeStruct(like.shape, like.dtype)})
