import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from diffjax.data.readers import tar


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
    kept["items"] = kept["items"][:2]
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
