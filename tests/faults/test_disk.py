"""A disk that is full, a folder that is read-only or gone: the run says so, and its last good checkpoint is left."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import textwrap
import time
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax import files
from diffjax.train import loop
from diffjax.train.checkpoint import CheckpointError, open_checkpoints
from diffjax.train.errors import WorkdirError
from diffjax.train.optim import snapshots
from diffjax.train.survival import saving
from diffjax.train.survival.saving import Files, keep

USER = """
import numpy as np
import jax.numpy as jnp
from diffjax.core import Model
from diffjax.data import ArraySource, Dataset

HOOK = [lambda number: None]
SEEN = [0]

def data():
    images = np.random.default_rng(0).uniform(-1, 1, (64, 2, 2, 1)).astype(np.float32)
    source = ArraySource(images, np.zeros(64, np.int32))
    return Dataset(source, source, (2, 2, 1), 1, lambda x: x)

def wide(*, shape, num_classes):
    # A state of 2 MB, most of it along for the ride.
    init = lambda key: {"out": {"b": jnp.zeros(shape)}, "rest": {"w": jnp.zeros((512, 256))}}
    apply = lambda p, x, t, y, key=None: p["out"]["b"] + 0.0 * jnp.sum(p["rest"]["w"]) + 0.0 * x
    return Model(init, apply, {})

def hook():
    def fn(batch, rng):
        SEEN[0] += 1
        HOOK[0](SEEN[0])
        return batch
    return fn
"""
MODULE = "user_of_test_disk"


@pytest.fixture
def during(tmp_path, monkeypatch):
    """`during(fn)`: from then on `fn(n)` is called when batch n, counted from 1, is read."""
    folder = tmp_path / "their_code"
    folder.mkdir()
    (folder / f"{MODULE}.py").write_text(textwrap.dedent(USER))
    monkeypatch.syspath_prepend(folder)
    sys.modules.pop(MODULE, None)
    module = __import__(MODULE)

    def set_hook(fn):
        module.SEEN[0], module.HOOK[0] = 0, fn

    return set_hook


def train(workdir, stream=None, **changes):
    base = dict(
        data=f"{MODULE}:data()",
        model=f"{MODULE}:wide",
        augment=f"{MODULE}:hook()",
        batch_size=16,
        num_steps=12,
        log_every=1,
        checkpoint_every=3,
        optim=dict(name="adam", lr=1e-2),
        ema=("decay(0.9)",),
    )
    return loop.train(ConfigDict(base | changes), str(workdir), stream=stream or io.StringIO())


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes on `folder`; skips the test where it cannot be made."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def saved(workdir, step):
    """True, once the checkpoint of `step`, which is written in the background, is complete."""
    deadline = time.monotonic() + 60
    while not (workdir / "checkpoints" / str(step)).is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return True


def same_as_undisturbed(workdir, other):
    a, b = (open_checkpoints(folder / "checkpoints").restore_part("params") for folder in (workdir, other))
    assert a[0] == b[0] == 12
    np.testing.assert_array_equal(a[1]["out"]["b"], b[1]["out"]["b"])


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(tmp_path, during):
    # Each checkpoint is 2 MB: three fit, while another is written, and a file that appears takes their place.
    with small_disk(tmp_path / "disk", 12_000_000) as disk:
        workdir, hog = disk / "run", disk / "hog"
        during(lambda n: n == 5 and saved(workdir, 3) and hog.write_bytes(bytes(9_000_000)))
        with pytest.raises(
            CheckpointError, match=r"cannot write checkpoint .*No space left.*last good checkpoint is step 3"
        ):
            train(workdir)
        assert open_checkpoints(workdir / "checkpoints").restore_part("params")[0] == 3
        hog.unlink()
        during(lambda n: None)
        assert train(workdir).step == 12
        during(lambda n: None)
        train(tmp_path / "undisturbed")
        same_as_undisturbed(workdir, tmp_path / "undisturbed")


def test_a_full_disk_may_be_borne(tmp_path, during):
    with small_disk(tmp_path / "disk", 12_000_000) as disk:
        workdir, hog, stream = disk / "run", disk / "hog", io.StringIO()

        def fill_then_free(n):
            if n == 5 and saved(workdir, 3):
                hog.write_bytes(bytes(9_000_000))
            if n == 11:
                hog.unlink()

        during(fill_then_free)
        assert train(workdir, stream, on_save_error="continue").step == 12
        assert "cannot write checkpoint 6" in stream.getvalue() and "training goes on" in stream.getvalue()
        during(lambda n: None)
        train(tmp_path / "undisturbed")
        same_as_undisturbed(workdir, tmp_path / "undisturbed")


def test_a_vanished_workdir_stops_the_run_and_nothing_is_saved_into_its_place(tmp_path, during):
    workdir = tmp_path / "run"
    during(lambda n: n == 5 and saved(workdir, 3) and shutil.move(workdir, tmp_path / "moved"))
    with pytest.raises(WorkdirError, match="is gone or no longer holds its config.json"):
        train(workdir)
    assert not workdir.exists()
    assert open_checkpoints(tmp_path / "moved" / "checkpoints").steps() == [3]


def test_a_vanished_workdir_may_come_back(tmp_path, during):
    workdir, stream = tmp_path / "run", io.StringIO()

    def away(n):
        if n == 5 and saved(workdir, 3):
            shutil.move(workdir, tmp_path / "moved")
        if n == 8:
            shutil.move(tmp_path / "moved", workdir)

    during(away)
    assert train(workdir, stream, on_save_error="continue").step == 12
    assert stream.getvalue().count("is gone") >= 1
    assert open_checkpoints(workdir / "checkpoints").steps()[-1] == 12


def test_a_read_only_folder_stops_the_run(tmp_path, during):
    with small_disk(tmp_path / "disk", 50_000_000) as disk:
        command = lambda mode: ["mount", "-o", f"remount,{mode}", str(disk)]
        # The metrics file is open for writing, which a remount would wait for; so checkpoints alone are on this disk.
        workdir = tmp_path / "run"
        workdir.mkdir()
        (workdir / "checkpoints").symlink_to(disk)
        during(lambda n: n == 5 and saved(workdir, 3) and subprocess.run(command("ro"), check=True))
        with pytest.raises(
            CheckpointError, match="cannot write checkpoint 6 .*Read-only.*last good checkpoint is step 3"
        ):
            train(workdir)
        subprocess.run(command("rw"), check=True)
        during(lambda n: None)
        assert train(workdir).step == 12


def test_a_damaged_line_of_the_metrics_is_left_out_and_named(tmp_path, during, caplog):
    workdir = tmp_path / "run"
    path = workdir / "metrics.jsonl"

    def zero(number):
        # What a file system may bring back after a power cut for a block that was not yet on the disk.
        lines = path.read_bytes().split(b"\n")
        with open(path, "r+b") as file:
            file.seek(sum(len(line) + 1 for line in lines[: number - 1]))
            file.write(bytes(len(lines[number - 1])))

    during(lambda n: None)
    assert train(workdir, stop_at=6).step == 6
    zero(3)
    # Another is lost while the run goes on, so that the summary at its end meets it.
    during(lambda n: n == 4 and zero(2))
    assert train(workdir).step == 12
    warnings = [r.getMessage() for r in caplog.records if f"{path}: left out" in r.getMessage()]
    assert warnings[0].endswith("line 3") and {w[-6:] for w in warnings[1:]} == {"line 2"}
    assert [row["step"] for row in files.read_rows(path) if "loss" in row] == [1, *range(4, 13)]
    # What was damaged at the start of the run is gone from the file.
    assert path.read_bytes().count(b"\0\n") == 1
    during(lambda n: None)
    train(tmp_path / "undisturbed")
    same_as_undisturbed(workdir, tmp_path / "undisturbed")


class Broken:
    def __getattr__(self, name):
        def fail(*args):
            raise OSError(28, "No space left on device")

        return fail


def test_several_processes_bear_no_failed_save(tmp_path, monkeypatch):
    def save(*args):
        raise CheckpointError("no space")

    (tmp_path / "config.json").write_text("{}")
    told = types.SimpleNamespace(write_texts=lambda step, texts: None)
    session = types.SimpleNamespace(
        config=ConfigDict(dict(on_save_error="continue")), workdir=str(tmp_path), terminal=told, iterator=None,
        checkpoints=types.SimpleNamespace(save=save, wait=lambda: None), snapshots=None,
    )  # fmt: skip
    assert not keep(session, 1, {}, {}, {}, last=False)
    monkeypatch.setattr(saving.processes, "jax_count", lambda: 2)
    with pytest.raises(CheckpointError, match="no space"):
        keep(session, 1, {}, {}, {}, last=False)


AVERAGES = dict(ema=("power(std=0.05)", "power(std=0.1)"), ema_snapshots=3)


def test_no_snapshot_is_written_into_what_took_the_place_of_the_workdir(tmp_path, during):
    workdir = tmp_path / "run"
    during(lambda n: n == 5 and saved(workdir, 4) and shutil.move(workdir, tmp_path / "moved"))
    with pytest.raises(WorkdirError, match="is gone or no longer holds its config.json"):
        train(workdir, checkpoint_every=4, **AVERAGES)
    assert not workdir.exists()


def test_a_snapshot_that_fails_costs_no_other(tmp_path, during, monkeypatch):
    broken = iter([False, True])
    write = snapshots.save

    def fails_in_the_background(kept, step, averages):
        write(kept, step, averages)
        if next(broken, False):
            kept.wait()
            shutil.rmtree(kept.directory / str(step))
            wait = kept.wait

            def failed():
                kept.wait = wait
                raise CheckpointError("no space")

            kept.wait = failed

    monkeypatch.setattr(saving.snapshots, "save", fails_in_the_background)
    during(lambda n: None)
    stream = io.StringIO()
    train(tmp_path / "run", stream, on_save_error="continue", **AVERAGES)
    assert "no space; training goes on" in stream.getvalue()
    assert snapshots.open_snapshots(str(tmp_path / "run")).steps() == [3, 9, 12]


def test_a_checkpoint_is_never_later_than_an_unfinished_snapshot(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = []
    note = lambda name: lambda *args: done.append(name)
    session = types.SimpleNamespace(
        config=ConfigDict(dict(on_save_error="stop")), workdir=str(tmp_path), iterator=None,
        checkpoints=types.SimpleNamespace(save=note("checkpoint"), wait=note("checkpoints")),
        snapshots=types.SimpleNamespace(wait=note("snapshots")),
    )  # fmt: skip
    assert keep(session, 1, {}, {}, {}, last=False)
    assert done.index("snapshots") < done.index("checkpoint")


def test_a_save_that_failed_does_not_hide_why_a_run_goes_back(monkeypatch, caplog):
    def wait():
        raise CheckpointError("no space")

    saving.settle(types.SimpleNamespace(wait=wait))
    saving.close_snapshots(types.SimpleNamespace(close=wait))
    assert caplog.text.count("no space") == 2
    monkeypatch.setattr(saving.processes, "jax_count", lambda: 2)
    with pytest.raises(CheckpointError, match="no space"):
        saving.settle(types.SimpleNamespace(wait=wait))


def test_metrics_that_cannot_be_rewound_are_opened_again_later():
    rows, full = [], [False]

    def open_writers(step):
        if full[0]:
            raise OSError(28, "No space left on device")
        return [types.SimpleNamespace(write_scalars=lambda *row: rows.append((step, *row)), close=lambda: None)]

    with pytest.raises(WorkdirError, match="cannot drop the metrics after step 5: OSError.*No space left"):
        stops = Files(open_writers, 0, "stop")
        full[0] = True
        stops.rewind(5)
    full[0] = False
    files = Files(open_writers, 0, "continue")
    full[0] = True
    files.rewind(5)
    files.write_scalars(6, {"loss": 1.0})
    full[0] = False
    files.write_scalars(7, {"loss": 1.0})
    assert rows == [(5, 7, {"loss": 1.0})]


def test_metrics_that_cannot_be_written_end_the_run_clearly_or_are_borne(caplog):
    files = Files(lambda step: [Broken()], 0, "stop")
    with pytest.raises(WorkdirError, match="cannot write the metrics with Broken: OSError.*No space left"):
        files.write_scalars(1, {"loss": 1.0})
    files = Files(lambda step: [Broken()], 0, "continue")
    for step in range(3):
        files.write_scalars(step, {"loss": 1.0})
        files.flush()
    assert len([r for r in caplog.records if "training goes on" in r.getMessage()]) == 1
