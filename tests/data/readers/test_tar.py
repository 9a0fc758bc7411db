import io
import json
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffjax.data.readers import TarReader, tar


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(path, members, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Two shards of three items; a name of 150 characters takes tar's extended headers."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    for shard in range(2):
        members = []
        for i in range(3 * shard, 3 * shard + 3):
            key = f"set/{'x' * 150 if i == 4 else 'item'}{i}"
            members += [(f"{key}.cls", str(i % 3).encode()), (f"{key}.png", png(pixels[i]))]
            members += [(f"{key}.txt", f"number {i}".encode()), (f"{key}.seg.bin", b"?" * i)]
        write(tmp_path / f"train-{shard}.tar", members)
    return tmp_path, pixels


def test_items_are_what_tarfile_and_pillow_wrote(shards):
    path, pixels = shards
    data = tar(str(path / "train-*.tar"), heldout=2)
    assert (len(data.train), len(data.heldout), data.shape, data.num_classes) == (4, 2, (5, 4, 3), 3)
    seen = set()
    for source in (data.train, data.heldout):
        for i in range(len(source)):
            number = int(source.name(i)[-1])
            seen.add(number)
            np.testing.assert_array_equal(data.to_pixels(source[i]["image"]), pixels[number])
            assert source[i]["label"] == number % 3 and source.captions[i] == f"number {number}"
            assert f"train-{number // 3}.tar:set/" in source.name(i)
    assert seen == set(range(6))


def test_the_index_is_kept_beside_the_shard_and_made_anew_when_the_shard_changes(shards):
    path, pixels = shards
    tar(str(path / "train-*.tar"), heldout=2)
    index = path / "train-0.tar.index.json"
    kept = json.loads(index.read_text())
    kept |= {"items": kept["items"][:2], "labels": kept["labels"][:2]}
    index.write_text(json.dumps(kept))
    data = tar(str(path / "train-*.tar"), heldout=2)
    assert len(data.train) == 3  # It was believed: its stamp fits the file.
    write(path / "train-0.tar", [("a.png", png(pixels[0])), ("a.cls", b"1"), ("a.txt", b"a")])
    assert len(tar(str(path / "train-*.tar"), heldout=2).train) == 2
    index.write_text("{")
    assert len(tar(str(path / "train-*.tar"), heldout=2).train) == 2


def test_labels_and_captions_from_json_and_a_reader_that_was_pickled(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    fields = [json.dumps({"label": i, "caption": f"c{i}"}).encode() for i in range(4)]
    write(tmp_path / "a.tar", [m for i in range(4) for m in ((f"{i}.json", fields[i]), (f"{i}.png", png(pixels[i])))])
    data = tar(str(tmp_path / "a.tar"), channels=1, heldout=1)
    for source in (data.train, pickle.loads(pickle.dumps(data.train))):
        for i in range(3):
            label = int(source[i]["label"])
            np.testing.assert_array_equal(data.to_pixels(source[i]["image"])[..., 0], pixels[label])
            assert source.captions[i] == f"c{label}"


def refuse(*args):
    raise AssertionError("labels were read")


def test_labels_are_read_once_and_only_where_they_are_wanted(shards, monkeypatch):
    path, _ = shards
    pattern, index = str(path / "train-*.tar"), path / "train-1.tar.index.json"
    module = sys.modules[TarReader.__module__]
    with monkeypatch.context() as patched:
        patched.setattr(module, "labels_of", refuse)
        assert tar(pattern, heldout=2, labels=False).num_classes == 0
    first = tar(pattern, heldout=2)
    monkeypatch.setattr(module, "labels_of", refuse)
    again = tar(pattern, heldout=2)
    assert [again.train[i]["label"] for i in range(4)] == [first.train[i]["label"] for i in range(4)]
    assert tar(pattern, heldout=2, labels=False).train[0]["label"] == 0
    # What format 1 kept had no labels.
    old = json.loads(index.read_text())
    del old["labels"]
    index.write_text(json.dumps(old | {"stamp": [1, *old["stamp"][1:]], "items": []}))
    monkeypatch.undo()
    assert len(tar(pattern, heldout=2).train) == 4 and json.loads(index.read_text())["labels"] == [0, 1, 2]


@pytest.mark.parametrize(
    "member, message",
    [
        (("1.cls", b"cat"), r"a\.tar:1: label 'cat'; expected an integer from 0, or give labels=False"),
        (("1.cls", b"\xff"), r"a\.tar:1: label"),
        (("1.json", b"{"), r"a\.tar:1: its \.json is none"),
        (("1.json", b'{"label": null}'), r"a\.tar:1 has no label and .*a\.tar:0 has one"),
        (("1.seg", b""), r"a\.tar:1 has no label and .*a\.tar:0 has one"),
    ],
)
def test_labels_that_are_none_are_refused_where_they_are_wanted(tmp_path, member, message):
    image = png(np.zeros((2, 2, 3), np.uint8))
    write(tmp_path / "a.tar", [("0.png", image), ("0.cls", b"1"), ("1.png", image), member])
    with pytest.raises(ValueError, match=message):
        tar(str(tmp_path / "a.tar"), heldout=1)
    data = tar(str(tmp_path / "a.tar"), heldout=1, labels=False)
    assert data.num_classes == 0 and data.train[0]["label"] == 0


MANY = """
import os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from diffjax.data import Unreadable
from diffjax.data.readers import tar

opened = lambda: len(os.listdir("/dev/fd"))
limit = lambda n: resource.setrlimit(resource.RLIMIT_NOFILE, (n, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
tar(sys.argv[1] + "/0.tar", heldout=1).train[0]  # What is imported on the way opens files of its own.
limit(opened() + 64 + 16)
data = tar(sys.argv[1] + "/*.tar", heldout=1)
with ThreadPoolExecutor(8) as pool:
    items = list(pool.map(data.train.__getitem__, 8 * list(range(len(data.train)))))
for i, item in enumerate(items):
    assert int(data.to_pixels(item["image"])[0, 0, 0]) == item["label"] == data.train[i % len(data.train)]["label"]
limit(3)
reader = data.train.reader
kept = {path for path, _ in reader._files._idle}
index = next(i for i in range(len(data.train)) if data.train.name(i).split(":")[0] not in kept)
try:
    data.train[index]
except Unreadable as error:
    sys.exit(f"taken for a bad item: {error}")
except OSError as error:
    assert "ulimit -n" in str(error) and ".tar" in str(error), error
else:
    sys.exit("nothing was raised")
"""


def test_more_shards_than_files_may_be_open_and_that_limit_is_no_bad_item(tmp_path):
    for i in range(120):
        images = [(f"{j}.png", png(np.full((1, 1, 3), i, np.uint8))) for j in range(2)]
        write(tmp_path / f"{i}.tar", [*images, *((f"{j}.cls", str(i).encode()) for j in range(2))])
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unlabelled_compressed_damaged_and_missing_shards(tmp_path, shards):
    path, pixels = shards
    write(tmp_path / "plain.tar", [(f"{i}.png", png(pixels[i])) for i in range(3)])
    data = tar(str(tmp_path / "plain.tar"), heldout=1)
    assert data.num_classes == 0 and data.train.captions is None and data.train[0]["label"] == 0
    # A name that reads like a pattern, and two patterns that fit one file.
    (tmp_path / "plain.tar").rename(tmp_path / "plain[1].tar")
    twice = tar((str(tmp_path / "plain[1].tar"), str(tmp_path / "plain*.tar")), heldout=1)
    assert len(twice.train) + len(twice.heldout) == 3
    write(tmp_path / "half.tar", [("0.png", png(pixels[0])), ("0.cls", b"1"), ("1.png", png(pixels[1]))])
    with pytest.raises(ValueError, match=r"half\.tar:1 has no label"):
        tar(str(tmp_path / "half.tar"), heldout=1)
    write(tmp_path / "small.tar.gz", [("0.png", png(pixels[0]))], "w:gz")
    with pytest.raises(ValueError, match="not an uncompressed tar file.*gunzip"):
        tar(str(tmp_path / "small.tar.gz"))
    with pytest.raises(FileNotFoundError, match=r"no file '.*nothing-\*\.tar'"):
        tar(str(tmp_path / "nothing-*.tar"))
    write(tmp_path / "empty.tar", [("readme.txt", b"")])
    with pytest.raises(ValueError, match="no image in"):
        tar(str(tmp_path / "empty.tar"))
