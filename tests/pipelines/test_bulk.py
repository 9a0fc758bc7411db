"""Samples in shards: the same bytes after kills, over devices and over processes, and settings that do not mix."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax import cli
from diffjax.pipelines import bulk, evaluate
from diffjax.pipelines.generate import draw_samples
from diffjax.pipelines.latents import write_latents
from diffjax.pipelines.sampler import settings_for
from diffjax.train import loop
from diffjax.train.errors import WorkdirError
from diffjax.train.state import load_run

ROOT = Path(__file__).parents[2]
QUICK = dict(steps=3, batch_size=8, shard_size=20)


def trained(folder, data="digits()"):
    config = ConfigDict(
        dict(
            data=data, batch_size=8, num_steps=2, ema=("decay(0.5)",), model=dict(name="mlp", width=8, depth=1),
            optim=dict(lr=1e-2),
        )
    )  # fmt: skip
    with open(os.devnull, "w") as null:
        loop.train(config, str(folder), stream=null)
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "mlp")


@pytest.fixture(scope="module")
def whole(workdir):
    folder = workdir / "whole"
    bulk.sample_many(workdir, 70, out=folder, **QUICK)
    return folder


def sums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).glob("*.npz"))}


def test_each_sample_is_that_of_its_seed_and_label(workdir, whole):
    assert list(sums(whole)) == [f"samples_0000{i}-of-00004.npz" for i in range(4)]
    run = load_run(str(workdir))
    found, index = bulk.read_samples(whole, run)
    np.testing.assert_array_equal(found.seeds, np.arange(70))
    np.testing.assert_array_equal(found.labels, np.arange(70) % 10)
    assert index["step"] == 2 and index["settings"]["steps"] == 3 and len(index["params_sha256"]) == 64
    # The other path of sampling, in one call of another size; pixels are integers, so rounding shows in a few at most.
    one = draw_samples(run, settings_for(run, steps=3), found.seeds, found.labels, batch_size=70)
    assert np.mean(one.images != found.images) < 0.005 and found.images.std() > 1
    assert (whole / "preview.png").stat().st_size > 5000


def test_random_labels_follow_the_seed_alone():
    index = dict(labels="random", classes=[2, 5, 7], seed=0)
    every = bulk.labels_of(index, np.arange(3000))
    np.testing.assert_array_equal(bulk.labels_of(index | {"seed": 100}, np.arange(100, 200)), every[100:200])
    counts = np.bincount(every, minlength=8)[[2, 5, 7]]
    # 1000 each, with a standard deviation of 26.
    assert counts.sum() == 3000 and np.abs(counts - 1000).max() < 105


def test_parts_of_processes_make_the_same_files(workdir, whole, tmp_path):
    for index, complete in ((1, False), (0, True)):
        done = bulk.sample_many(workdir, 70, out=tmp_path, part=(index, 2), **QUICK)
        assert done.complete is complete
    assert sums(tmp_path) == sums(whole)


def test_finished_shards_are_kept_and_damaged_ones_drawn_again(workdir, whole, tmp_path):
    bulk.sample_many(workdir, 70, out=tmp_path, **QUICK)
    names = list(sums(tmp_path))
    (tmp_path / names[0]).unlink()
    cut = (tmp_path / names[1]).read_bytes()
    (tmp_path / names[1]).write_bytes(cut[: len(cut) // 2])
    flipped = bytearray((tmp_path / names[2]).read_bytes())
    flipped[len(flipped) // 3] ^= 1
    (tmp_path / names[2]).write_bytes(bytes(flipped))
    left = tmp_path / f"{names[3]}.0-of-1.part"
    left.write_bytes(b"half")
    before = (tmp_path / names[3]).stat().st_mtime_ns
    done = bulk.sample_many(workdir, 70, out=tmp_path, **QUICK)
    assert (done.drawn, done.kept, done.complete) == (60, 10, True) and sums(tmp_path) == sums(whole)
    assert (tmp_path / names[3]).stat().st_mtime_ns == before and not left.exists()


MODULE = "user_of_test_bulk"
CODEC = """
sizes = []

def encode(images):
    n, h, w, _ = images.shape
    return images.reshape(n, h // 2, 2, w // 2, 2).transpose(0, 1, 3, 2, 4).reshape(n, h // 2, w // 2, 4)

def decode(latents):
    sizes.append(len(latents))
    n, h, w, _ = latents.shape
    return latents.reshape(n, h, w, 2, 2).transpose(0, 1, 3, 2, 4).reshape(n, 2 * h, 2 * w, 1)
"""


@pytest.fixture(scope="module")
def of_latents(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    (root / f"{MODULE}.py").write_text(CODEC)
    sys.path.insert(0, str(root))
    write_latents("digits()", f"{MODULE}:encode", str(root / "data"), shards=1)
    yield trained(root / "run", f"latents(path={str(root / 'data')!r}, decode='{MODULE}:decode')")
    sys.path.remove(str(root))


@pytest.mark.slow
def test_samples_of_latents_are_kept_as_decoded_images(of_latents, tmp_path):
    sizes = __import__(MODULE).sizes
    sizes.clear()
    first = bulk.sample_many(of_latents, 30, out=tmp_path, **QUICK)
    assert set(sizes) == {8}  # A decoder never gets more than a batch.
    again = bulk.sample_many(of_latents, 30, out=tmp_path, **QUICK)
    assert (first.drawn, again.drawn, again.kept) == (30, 0, 30)
    run = load_run(str(of_latents))
    found, _ = bulk.read_samples(tmp_path, run)
    assert found.images.shape == (30, 8, 8, 1) and run.dataset.shape == (4, 4, 4)
    one = draw_samples(run, settings_for(run, steps=3), found.seeds, found.labels, batch_size=30)
    assert np.mean(np.abs(one.images.astype(int) - found.images) > 1) < 0.005 and found.images.std() > 1


@pytest.mark.slow
def test_a_run_on_latents_is_evaluated_on_decoded_images(of_latents, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.judges.metrics, "baseline_rows", lambda *_: {"floor": {"fd_pixels": 0.1}})
    report = evaluate.evaluate(of_latents, num_samples=20, batch_size=20, steps=2, quick=True, out=tmp_path)
    assert report["heldout"]["images"] == 898 and next(iter(report["rows"].values()))["fd_pixels"] > 0
    assert {"grid.png", "neighbours.png", "strip.png"} <= {path.name for path in tmp_path.iterdir()}


def test_other_settings_are_refused_with_every_difference(workdir, whole):
    with pytest.raises(ValueError) as error:
        bulk.sample_many(workdir, 60, out=whole, **QUICK | dict(steps=4), labels="random")
    for words in ("num: 70 -> 60", "labels: 'balanced' -> 'random'", "'steps': 4", "another --out"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"\(stored -> given\): ema: 'decay\(0.5\)' -> 'raw'; give"):
        bulk.sample_many(workdir, 70, out=whole, ema="raw", **QUICK)
    with bulk.locked(whole, (0, 1)), pytest.raises(WorkdirError, match="part 0/1"):
        bulk.sample_many(workdir, 70, out=whole, **QUICK)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num=0), "num=0"), (dict(seed=-1), "seeds from -1"), (dict(seed=2**32 - 5), "2\\*\\*32"),
        (dict(part=(2, 2)), "part=2/2"), (dict(labels="even"), "known: balanced, random"),
        (dict(shard_size=0), "shard_size=0"), (dict(classes=(10,)), "classes"), (dict(solver="heunn()"), "heun"),
        (dict(steps=-3), "-3"),
    ],
)  # fmt: skip
def test_what_names_no_samples_is_refused(workdir, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        bulk.sample_many(workdir, **dict(num=70, out=tmp_path / "x") | changes)
    assert not (tmp_path / "x").exists()


def test_a_run_that_trained_on_says_how_its_former_samples_are_continued(tmp_path):
    index = {"num": 4, "step": 2, "params_sha256": "a"}
    bulk.claim(tmp_path, index)
    with pytest.raises(ValueError, match=r"step: 2 -> 3; give the stored values \(--step=2 for those of that step\)"):
        bulk.claim(tmp_path, index | {"step": 3, "params_sha256": "b"})


EIGHT = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
from diffjax.pipelines.bulk import sample_many
assert len(jax.local_devices()) == 8
sample_many(sys.argv[1], 70, out=sys.argv[2], steps=3, batch_size=8, shard_size=20)
"""


@pytest.mark.slow
def test_eight_devices_draw_the_same_bytes_as_one(workdir, whole, tmp_path):
    subprocess.run([sys.executable, "-c", EIGHT, str(workdir), str(tmp_path)], check=True, cwd=ROOT, timeout=300)
    assert sums(tmp_path) == sums(whole)


SLOW = """
import sys, time
from diffjax.pipelines import bulk
finite = bulk.check_finite
def check(*args):
    time.sleep(0.2)
    finite(*args)
bulk.check_finite = check
bulk.sample_many(sys.argv[1], 70, out=sys.argv[2], steps=3, batch_size=8, shard_size=5)
"""


@pytest.mark.parametrize("shards", [1, pytest.param(6, marks=pytest.mark.faults)])
def test_a_kill_loses_the_shard_in_progress_at_most(workdir, tmp_path, shards):
    out, uncut = tmp_path / "cut", tmp_path / "uncut"
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(SLOW), str(workdir), str(out)], cwd=ROOT)
    until = time.monotonic() + 120
    while len(sums(out)) < shards and child.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    there = len(sums(out))
    assert shards <= there < 14
    done = bulk.sample_many(workdir, 70, out=out, steps=3, batch_size=8, shard_size=5)
    assert done.kept == 5 * there and done.complete and not list(out.glob("*.part"))
    bulk.sample_many(workdir, 70, out=uncut, steps=3, batch_size=8, shard_size=5)
    assert sums(out) == sums(uncut)


def test_a_folder_is_evaluated_without_drawing(workdir, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.judges.metrics, "baseline_rows", lambda *_: {"floor": {"fd_relu": 0.1}})
    monkeypatch.setattr(evaluate, "MANY", 50)
    argv = ["eval", f"--workdir={workdir}", f"--samples={whole}", f"--out={tmp_path}/e"]
    assert cli.main(argv) == 0
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    row = next(iter(report["rows"].values()))
    assert report["ema"] == "decay(0.5)" and report["step"] == 2
    run = load_run(str(workdir))
    found, _ = bulk.read_samples(whole, run)
    assert row == pytest.approx(evaluate.judges.brief(evaluate.judges.judge_of(run), found.images, found.labels))
    assert report["num_samples"] == 70 and "c2st" not in row and (tmp_path / "e" / "grid.png").exists()
    assert "more than 50 samples" in capsys.readouterr().out
    assert cli.main([*argv, "--quick"]) == 2 and "--quick has no meaning" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds no samples"):
        bulk.read_samples(tmp_path, run)


def test_the_command_draws_num_samples_in_all(workdir, whole, tmp_path, capsys):
    argv = ["sample", f"--workdir={workdir}", "--num=70", "--steps=3", "--batch_size=8", "--shard_size=20"]
    for part in ("0/2", "1/2"):
        assert cli.main([*argv, f"--part={part}", f"--out={tmp_path}/x"]) == 0
    assert sums(tmp_path / "x") == sums(whole)
    out = capsys.readouterr().out
    assert "40 samples drawn, 0 there already" in out and "(complete)" in out
    assert cli.main([*argv, "--out=x.png"]) == 2 and "writes a folder" in capsys.readouterr().err
    assert cli.main(["sample", f"--workdir={workdir}", "--labels=random"]) == 2
    assert "--labels belongs to --num" in capsys.readouterr().err
