import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffjax import cli, registry
from diffjax.data import SOURCES, UnreadableError, batches
from diffjax.pipelines.latents import write_latents

MODULE = "user_of_test_latents"
USER = """
import os, time
import numpy as np

def encode(images):
    # Space to depth, an offset and a scale per channel: undone exactly by `decode`.
    n, h, w, c = images.shape
    blocks = images.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c)
    return (blocks + 0.5) * 3

def decode(latents):
    blocks = latents / 3 - 0.5
    n, h, w, c = blocks.shape
    return blocks.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c // 4)

def slow(images):
    time.sleep(float(os.environ.get("PAUSE", 0)))
    return encode(images)

def times(factor):
    return lambda images: encode(images) * factor

def broken(images):
    return encode(images) / np.where(images[:, :1, :1, :1] > 2, 1, 0)
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / f"{MODULE}.py").write_text(USER)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def test_latents_are_the_encoders_normalised_and_decode_to_the_images(user):
    out = str(user / "latents")
    assert write_latents("digits()", f"{MODULE}:encode", out, shards=3, batch_size=64) == 1797
    digits = registry.build("digits()", SOURCES, "data")
    data = registry.build(f"latents(path={out!r}, decode='{MODULE}:decode')", SOURCES, "data")
    assert (len(data.train), len(data.heldout), data.shape, data.num_classes) == (899, 898, (4, 4, 4), 10)
    raw = registry.build(f"latents(path={out!r}, std=0)", SOURCES, "data")
    module = __import__(MODULE)
    for split in ("train", "heldout"):
        source = getattr(digits, split)
        every = np.arange(len(source))
        plain, scaled = getattr(raw, split).take(every), getattr(data, split).take(every)
        np.testing.assert_array_equal(plain["image"], module.encode(source.images))
        np.testing.assert_array_equal(scaled["label"], source.labels)
        # Sixteenths come back through a float32 normalisation with an error far below half a sixteenth.
        np.testing.assert_array_equal(data.to_pixels(scaled["image"]), np.rint((source.images + 1) * 127.5))
        np.testing.assert_array_equal(data.train[5]["image"], data.train.take(np.array([5]))["image"][0])
    normalised = data.train.take(np.arange(899))["image"].astype(np.float64)
    # Sums of 14 thousand float32 values, taken in float64: rounding of the values themselves only.
    np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(normalised.std((0, 1, 2)), 0.5, rtol=1e-6)
    batch = next(batches(data.train, 8, seed=0))
    assert batch["image"].shape == (8, 4, 4, 4) and batch["image"].dtype == np.float32
    assert raw.to_pixels(raw.train[0]["image"]).shape == (4, 4, 3)


@pytest.mark.parametrize("kills", [(2,), pytest.param((1, 2, 4, 5), marks=pytest.mark.faults)], ids=["once", "often"])
def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(user, kills):
    whole, cut = user / "whole", user / "cut"
    settings = dict(shards=6, batch_size=32)
    write_latents("digits()", f"{MODULE}:slow", str(whole), **settings)
    command = [sys.executable, "-m", "diffjax", "latents", "--data=digits()", f"--encode={MODULE}:slow"]
    command += [f"--out={cut}", "--shards=6", "--batch_size=32"]
    for wanted in kills:  # Finished shards at which the process is killed, in the middle of the next one.
        process = subprocess.Popen(
            command, cwd=user, stderr=subprocess.DEVNULL, env={**os.environ, "JAX_PLATFORMS": "cpu", "PAUSE": "0.05"}
        )
        deadline = time.monotonic() + 100
        while len(list(cut.glob("*-of-*.json"))) < wanted and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(list(cut.glob("*-of-*.json"))) >= wanted and not (cut / "index.json").exists()
        with pytest.raises(FileNotFoundError, match=r"no index\.json.*shards are there; run the same"):
            registry.build(f"latents(path={str(cut)!r})", SOURCES, "data")
    # A shard that a crash of the machine left half on disk is noticed by its checksum.
    first = cut / "train-00000-of-00006.npy"
    first.write_bytes(first.read_bytes()[:-8] + b"\0" * 8)
    stream = io.StringIO()
    redone = write_latents("digits()", f"{MODULE}:slow", str(cut), **settings, stream=stream)
    assert 149 <= redone < 1797 and "shards are there already" in stream.getvalue()
    left = {name: data for name, data in bytes_of(cut).items() if not name.endswith(".part")}
    assert left == bytes_of(whole)


def test_processes_share_the_shards_and_the_last_one_writes_the_index(user):
    alone, shared = str(user / "alone"), str(user / "shared")
    write_latents("digits()", f"{MODULE}:times(2.0)", alone, shards=5, batch_size=50)
    counts, streams = [], [io.StringIO() for _ in range(3)]
    for p in (2, 0, 1):
        assert not (user / "shared" / "index.json").exists()
        counts.append(
            write_latents(
                "digits()", f"{MODULE}:times(2.0)", shared, shards=5, batch_size=50, process_index=p, process_count=3,
                stream=streams[p],
            )
        )  # fmt: skip
    assert sum(counts) == 1797 and min(counts) > 0
    assert bytes_of(shared) == bytes_of(alone)
    assert "shards of other processes are still to come" in streams[2].getvalue()
    assert "complete" in streams[1].getvalue() and "/s" in streams[1].getvalue()


def test_captions_go_along_and_unreadable_images_are_left_out_up_to_the_limit(user):
    pictures = user / "pictures"
    pictures.mkdir()
    for i in range(8):
        Image.new("RGB", (4, 4), (30 * i,) * 3).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"grey {i}")
    spec = f"folder(path={str(pictures)!r}, size=4, heldout=2)"
    data = registry.build(spec, SOURCES, "data")
    lost = data.train.name(2)
    Path(lost).write_bytes(b"nothing")
    with pytest.raises(UnreadableError, match=rf"1 images of train-.*limit is 0: {lost}: not an image.*--max_bad"):
        write_latents(spec, f"{MODULE}:encode", str(user / "none"), shards=2, batch_size=2)
    # The same folder goes on with another limit.
    write_latents(spec, f"{MODULE}:encode", str(user / "none"), shards=2, batch_size=2, max_bad=1)
    made = registry.build(f"latents(path={str(user / 'none')!r}, std=0)", SOURCES, "data")
    assert len(made.train) == 5
    for i in range(5):
        number = int(made.train.captions[i][-1])
        # (pixel / 127.5 - 1 + 0.5) * 3, in float32.
        np.testing.assert_allclose(made.train[i]["image"], (30 * number / 127.5 - 0.5) * 3, rtol=1e-6)
    # Without the lost file the others would fall into other halves than those of the finished shards.
    Path(lost).rename(user / "away.png")
    with pytest.raises(ValueError, match="other settings.*train: '6 items, .*' -> '5 items"):
        write_latents(spec, f"{MODULE}:encode", str(user / "none"), shards=2, batch_size=2, max_bad=1)


def test_wrong_settings_encoders_and_folders_are_named(user, capsys):
    write = lambda **kw: write_latents(
        **{"data": "digits()", "encode": f"{MODULE}:encode", "out": str(user / "a")} | kw
    )
    for settings, message in (
        (dict(encode=f"{MODULE}:encod"), "cannot import encoder"),
        (dict(encode="encode"), "unknown encoder 'encode'"),
        (dict(encode=f"{MODULE}:MISSING(a=1)"), "cannot import encoder"),
        (dict(shards=0), "shards=0: expected 1 .. 899"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(process_index=1), "process 1/1"),
        (dict(encode=f"{MODULE}:broken", out=str(user / "b")), "not finite"),
        (dict(encode="numpy:mean", out=str(user / "c")), r"shape \(\) for images \(64, 8, 8, 1\)"),
    ):
        with pytest.raises(ValueError, match=message), np.errstate(all="ignore"):
            write(**settings)
    write(shards=2)
    with pytest.raises(ValueError, match=r"begun with other settings.*shards: 2 -> 3"):
        write(shards=3)
    os.truncate(user / "a" / "train-00001-of-00002.npy", 100)
    with pytest.raises(ValueError, match="has 100 bytes, and index.json says"):
        registry.build(f"latents(path={str(user / 'a')!r})", SOURCES, "data")
    assert cli.main(["latents", "--data=digits()", "--out=x"]) == 2
    assert "--encode is missing" in capsys.readouterr().err
