"""Batches are the same whoever reads them, and whatever cannot be read is replaced, counted and named."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from PIL import Image

from diffjax.data import Unreadable, UnreadableError, WorkerError, batches, digits, folder

AUGMENT = ("shift(pixels=2)", "affine()", "flip()")


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(17):
        pixels = rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    return tmp_path


def random_views(path):
    return folder(str(path), 8, crop="random", zoom=1.2, flip=True, heldout=1).train


def bitwise(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes()


def take(iterator, n):
    # Copies: what comes out of a worker may lie in memory that is shared with it.
    return [{k: np.array(v) for k, v in next(iterator).items()} for _ in range(n)]


@pytest.mark.often("two")
@pytest.mark.parametrize("counts", [dict(workers=1, threads=2), dict(workers=2, prefetch=1)], ids=["one", "two"])
def test_any_number_of_workers_gives_the_same_bits_and_takes_up_the_state_of_any_other(pictures, counts):
    make = lambda **kw: batches(random_views(pictures), 6, seed=1, augment=AUGMENT, **kw)
    want = take(make(), 9)
    first = make(**counts)
    for got, expected in zip(take(first, 4), want, strict=False):
        bitwise(got, expected)
    state = json.loads(json.dumps(first.get_state()))
    assert state == {"next_index": 4, "items": 16}
    first.close()
    for other in (dict(), dict(threads=3)):
        resumed = make(**other)
        resumed.set_state(state)
        for got, expected in zip(take(resumed, 5), want[4:], strict=True):
            bitwise(got, expected)
    back = make()
    take(back, 6)
    resumed = make(**counts)
    resumed.set_state(back.get_state())
    for got, expected in zip(take(resumed, 3), want[6:], strict=True):
        bitwise(got, expected)
    resumed.close()


def whole_batch(batch, rng):
    """An augmentation that looks at the whole batch."""
    image = batch["image"]
    return {**batch, "image": (image - image.mean() + rng.random(image.shape)).astype(np.float32)}


@pytest.mark.parametrize("augment", [(), AUGMENT, (whole_batch, "flip()")], ids=["none", "rows", "whole"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_shards_of_the_processes_are_the_batch(pictures, augment, count):
    for source in (digits().train, random_views(pictures)):
        make = lambda source=source, **kw: batches(source, 6, seed=2, augment=augment, **kw)
        parts = [make(process_index=p, process_count=count) for p in range(count)]
        for want in take(make(), 5):
            got = [next(part) for part in parts]
            assert all(len(g["label"]) == 6 // count for g in got)
            bitwise({k: np.concatenate([g[k] for g in got]) for k in want}, want)
        # 2 processes -> 1 -> 3 in the middle of an epoch.
        whole, state = make(), parts[0].get_state()
        whole.set_state(state)
        (want,) = take(whole, 1)
        others = [make(process_index=p, process_count=3) for p in range(3)]
        for part in others:
            part.set_state(state)
        got = [next(part) for part in others]
        bitwise({k: np.concatenate([g[k] for g in got]) for k in want}, want)


def test_states_of_the_first_format_skips_and_ids(pictures):
    source = random_views(pictures)
    iterator = batches(source, 5, seed=3)
    want = take(iterator, 8)
    iterator.set_state({"next_index": 6})  # As Grain's own iterator wrote it.
    bitwise(take(iterator, 1)[0], want[6])
    iterator.set_state({"next_index": 2})
    bitwise(take(iterator, 1)[0], want[2])
    for state in ({}, {"next_index": -1}, {"next_index": "3"}, None):
        with pytest.raises(ValueError, match="expected {'next_index': n}"):
            iterator.set_state(state)
    data = digits().train
    iterator = batches(data, 7, seed=4)
    for b in range(200):  # Past the end of the first epoch.
        ids = iterator.batch_ids(b)
        np.testing.assert_array_equal(next(iterator)["image"], data.images[ids])
    assert iterator.get_state() == {"next_index": 200, "items": 899}


def test_a_state_of_other_data_is_refused(pictures):
    state = batches(random_views(pictures), 5, seed=3).get_state()
    Image.new("RGB", (9, 9)).save(pictures / "one_more.png")
    with pytest.raises(ValueError, match="there are 17 images to train on, and there were 16 when"):
        batches(random_views(pictures), 5, seed=3).set_state(state)
    batches(random_views(pictures), 5, seed=3, same_items=False).set_state(state)


def test_random_views_differ_between_epochs_and_places_and_follow_the_seed(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 40, 3), dtype=np.uint8)
    for i in range(4):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    source = folder(str(tmp_path), 8, crop="random", heldout=1).train
    views = {view.tobytes() for batch in take(batches(source, 3, seed=0), 8) for view in batch["image"]}
    assert len(views) == 24
    other = {view.tobytes() for batch in take(batches(source, 3, seed=1), 8) for view in batch["image"]}
    assert not views & other


def damage(path, *names):
    for name in names:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("counts", [dict(), dict(workers=2), pytest.param(dict(threads=2), marks=pytest.mark.slow)])
def test_unreadable_images_are_replaced_by_the_next_and_counted_once(tmp_path, caplog, counts):
    for i in range(12):
        Image.new("RGB", (6, 6), (20 * i, 0, 0)).save(tmp_path / f"{i:02}.jpg", quality=95)
    data = folder(str(tmp_path), heldout=1)
    numbers = [int(data.train.name(i)[-6:-4]) for i in range(11)]
    damage(tmp_path, f"{numbers[3]:02}.jpg", f"{numbers[4]:02}.jpg", f"{numbers[10]:02}.jpg")
    iterator = batches(data.train, 4, seed=0, **counts)
    with caplog.at_level(logging.WARNING, logger="diffjax"):
        for b in range(9):
            reds = (take(iterator, 1)[0]["image"][:, 3, 3, 0] + 1) * 127.5
            ids = [{3: 5, 4: 5, 10: 0}.get(i, i) for i in iterator.batch_ids(b)]
            # JPEG of a flat colour is within a few levels of it; neighbours are 20 apart.
            np.testing.assert_allclose(reds, [20 * numbers[i] for i in ids], atol=6)
    iterator.close()
    assert sorted(iterator.bad) == [3, 4, 10]
    for i in (3, 4, 10):
        assert iterator.bad[i].startswith(f"{tmp_path}/{numbers[i]:02}.jpg: ") and "runcated" in iterator.bad[i]
    assert len([r for r in caplog.records if "cannot read" in r.message]) == 3
    # The count belongs to the state, and what comes after a resume is what would have come.
    resumed = batches(data.train, 4, seed=0)
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    assert resumed.bad == iterator.bad
    straight = take(batches(data.train, 4, seed=0), 11)[9:]
    for got, want in zip(take(resumed, 2), straight, strict=True):
        bitwise(got, want)


@pytest.mark.parametrize("counts", [dict(), dict(workers=1)])
def test_past_the_limit_the_files_and_reasons_are_named(pictures, counts):
    source = random_views(pictures)
    names = [source.name(i) for i in (0, 2, 5)]
    damage(pictures, *(name.rsplit("/", 1)[1] for name in names))
    iterator = batches(source, 4, seed=0, max_bad=2, **counts)
    with pytest.raises(UnreadableError) as caught:
        take(iterator, 8)
    text = str(caught.value)
    assert (
        text.startswith("3 items of the data cannot be read, and the limit is 2: ") and "config.input.max_bad" in text
    )
    assert all(name in text for name in names) and "\n" not in text
    iterator.close()
    take(batches(source, 4, seed=0, max_bad=3), 8)


def test_reading_one_broken_item_directly_names_it(pictures):
    source = random_views(pictures)
    damage(pictures, source.name(3).rsplit("/", 1)[1])
    with pytest.raises(Unreadable) as caught:
        source[3]
    assert str(caught.value).startswith(f"cannot read {source.name(3)}: ")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.name, copy.reason) == (source.name(3), caught.value.reason)


def test_with_nothing_left_to_read_the_error_comes_at_once(pictures):
    source = random_views(pictures)
    damage(pictures, *(source.name(i).rsplit("/", 1)[1] for i in range(16)))
    with pytest.raises(UnreadableError, match="6 items of the data cannot be read, and the limit is 5"):
        next(batches(source, 4, seed=0, max_bad=5))


class Deadly:
    """A source whose reader process is killed at item 3."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"image": np.zeros((1, 1, 1), np.float32), "label": np.int32(index)}


def test_a_worker_that_dies_is_an_error_that_says_so():
    iterator = batches(Deadly(), 4, seed=0, workers=1)
    with pytest.raises(
        WorkerError, match=r"one of the 1 input workers ended with exit code -9 \(killed.*input\.workers"
    ):
        take(iterator, 4)
    iterator.close()


READER = """
import os, subprocess, sys
from diffjax.data import batches, digits

if __name__ == "__main__":
    iterator = batches(digits().train, 4, seed=0, workers=1, prefetch=1)
    next(iterator)
    children = subprocess.run(["pgrep", "-f", "-P", str(os.getpid()), "spawn_main"], capture_output=True, text=True)
    print(children.stdout.strip(), flush=True)
    sys.stdin.readline()
    for _ in range(8):
        next(iterator)
    print("read", flush=True)
    if sys.stdin.readline() == "wait\\n":
        sys.stdin.readline()
"""


@pytest.fixture
def reader(tmp_path):
    """A program that reads with a worker, and the worker's process id."""
    (tmp_path / "program.py").write_text(READER)
    with subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        yield program, int(program.stdout.readline())
        program.kill()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def say(program, word):
    program.stdin.write(word + "\n")
    program.stdin.flush()


def ends(pid, seconds=30):
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_reader(reader):
    program, worker = reader
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker, number)
    say(program, "read")
    assert program.stdout.readline() == "read\n"
    # It ends without closing the iterator.
    say(program, "end")
    assert program.wait(30) == 0 and ends(worker)


def test_workers_do_not_outlive_a_reader_that_is_killed(reader):
    program, worker = reader
    program.kill()
    program.wait()
    assert ends(worker)


@pytest.mark.slow
def test_workers_start_in_a_program_that_never_parsed_absl_flags(tmp_path):
    program = """
        from diffjax.data import batches, digits

        if __name__ == "__main__":
            iterator = batches(digits().train, 4, seed=0, workers=1)
            print(next(iterator)["label"].tolist())
            iterator.close()
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(next(batches(digits().train, 4, seed=0))["label"].tolist()), done.stderr


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(process_index=2, process_count=2), "process_index=2 with process_count=2; expected 0 .. 1"),
        (dict(process_count=3), "does not divide over 3 processes"),
        (dict(threads=-1), "threads=-1"),
        (dict(workers=-1), "workers=-1"),
        (dict(prefetch=0), "prefetch=0: expected at least 1"),
        (dict(max_bad=-1), "max_bad=-1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        batches(digits().train, 4, seed=0, **settings)
