"""Safetensors files: agreement with the safetensors package, and what is refused."""

import json
import math
import os
import pickle
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from diffjax.convert.weights import WeightsError
from diffjax.convert.weights.tensors import DTYPES, Source, Tensor, read_header, write, writing
from diffjax.convert.weights.tensors import read as reading
from diffjax.convert.weights.tensors.views import Joined, Unit

# What the numpy interface of the package writes, but does not read.
OPAQUE = {"BF16", "F8_E4M3", "F8_E5M2"}
SHAPES = ((), (1,), (5,), (0,), (3, 0, 2), (2, 3), (2, 1, 3, 4))
W = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def values(name, shape, seed=0):
    """Any bytes that are a value of the type."""
    dtype = DTYPES[name]
    raw = np.random.default_rng(seed).integers(0, 2 if name == "BOOL" else 256, math.prod(shape) * dtype.itemsize)
    return raw.astype(np.uint8).view(dtype).reshape(shape)


source = Source.of


def raw(path, header, data=b"", *, length=None):
    """A file with a header of these bytes, or of this object as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("name", DTYPES)
def test_what_the_package_writes_is_read_here(tmp_path, name):
    arrays = {f"t{i}": values(name, shape, i) for i, shape in enumerate(SHAPES)}
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    found, metadata = read_header(path)
    assert metadata == {"format": "pt"} and found.keys() == arrays.keys()
    for key, array in arrays.items():
        assert (found[key].dtype, found[key].shape, found[key].nbytes) == (array.dtype, array.shape, array.nbytes)
        assert found[key].part().tobytes() == array.tobytes()
        out = np.empty(array.shape, array.dtype)
        found[key].fill(out)
        assert out.tobytes() == array.tobytes()


def test_what_is_written_here_the_package_reads(tmp_path):
    arrays = {f"{name}.{i}": values(name, shape, i) for name in DTYPES for i, shape in enumerate(SHAPES)}
    path = tmp_path / "a.safetensors"
    write(path, {key: source(array) for key, array in arrays.items()}, {"a": "ä"})
    with safe_open(path, framework="np") as file:
        assert sorted(file.keys()) == sorted(arrays) and file.metadata() == {"a": "ä"}
        for key, array in arrays.items():
            part, name = file.get_slice(key), key.split(".")[0]
            assert (part.get_dtype(), tuple(part.get_shape())) == (name, array.shape)
            if name not in OPAQUE:
                assert file.get_tensor(key).tobytes() == array.tobytes()
    known = dict(safetensors.deserialize(path.read_bytes()))
    assert all(bytes(known[key]["data"]) == array.tobytes() for key, array in arrays.items())
    ours = read_header(path)[0]
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in ours.values())


def test_a_file_without_tensors(tmp_path):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    write(path, {}, {})
    assert read_header(path) == ({}, {})
    assert safetensors.numpy.load_file(path) == {}


@pytest.mark.parametrize(
    "header, data, words",
    [
        (b"no json at all", b"", "no safetensors file: its header is no JSON"),
        (b'{"w": ', b"", "its header is no JSON"),
        (b"\xff\xfe{}", b"", "its header is no JSON"),
        (b"[1]", b"", "its header is no JSON object"),
        (b"7", b"", "its header is no JSON object"),
        (b"[" * 100_000, b"", "nested too deeply"),
        (b'{"w":' * 5_000 + b"1" + b"}" * 5_000, b"", "nested too deeply"),
        (b"[" * 65 + b"]" * 65, b"", "nested too deeply"),
        (b"[" * 64 + b"]" * 64, b"", "its header is no JSON object"),
        (b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"], ", b"", "has 5000 digits"),
        (b'{"w": NaN}', b"", "NaN is no JSON"),
        (b'{"w": -Infinity}', b"", "-Infinity is no JSON"),
        (json.dumps({"w": W}).replace("[0,", "[-0,").encode(), bytes(24), "-0"),
        (b'{"\\ud800": 1}', b"", "surrogates not allowed"),
        (b'{"__metadata__": {"a": "\\udc00"}}', b"", "surrogates not allowed"),
        (b'{"w": ["\\udc00"]}', b"", "surrogates not allowed"),
        (b'{"w": [[1e999]]}', b"", "the number 1e999 is too large"),
        (b'{"w": -1e999}', b"", "the number -1e999 is too large"),
        (b'{"w": %s, "w": %s}' % ((json.dumps(W).encode(),) * 2), bytes(24), "name 'w' twice"),
        (json.dumps({"w": W})[:-2].encode() + b', "dtype": "F32"}}', bytes(24), "name 'dtype' twice"),
        ({"__metadata__": 3}, b"", "__metadata__ is no map from text to text"),
        ({"__metadata__": {"a": 3}}, b"", "__metadata__ is no map from text to text"),
        ({"w": 3}, b"", "expected dtype, shape and data_offsets, got 3"),
        ({"w": {"dtype": "F32", "shape": [1]}}, b"", "expected dtype, shape and data_offsets"),
        ({"w": W | {"more": 1}}, bytes(24), "expected dtype, shape and data_offsets"),
        ({"w": W | {"dtype": "F31"}}, bytes(24), "unknown dtype 'F31'; known: F64, F32"),
        ({"w": W | {"dtype": ["F32"]}}, bytes(24), "unknown dtype ['F32']"),
        ({"w": W | {"shape": 6}}, bytes(24), "shape 6: expected"),
        ({"w": W | {"shape": [2, -3]}}, bytes(24), "shape [2, -3]: expected"),
        ({"w": W | {"shape": [2, 3.0]}}, bytes(24), "shape [2, 3.0]: expected"),
        ({"w": W | {"shape": [6, True]}}, bytes(24), "shape [6, True]: expected"),
        ({"w": W | {"shape": [2**63, 3]}}, bytes(24), "expected at most 32 lengths"),
        ({"w": W | {"shape": [6] + [1] * 32}}, bytes(24), "expected at most 32 lengths"),
        ({"w": W | {"data_offsets": [0]}}, bytes(24), "data_offsets [0]: expected a begin and an end"),
        ({"w": W | {"data_offsets": [-1, 23]}}, bytes(24), "data_offsets [-1, 23]: expected"),
        ({"w": W | {"data_offsets": [24, 0]}}, bytes(24), "takes 24 bytes, the header gives -24"),
        ({"w": W | {"shape": [2, 4]}}, bytes(24), "F32 of shape [2, 4] takes 32 bytes, the header gives 24"),
        ({"w": W | {"shape": [2**40, 2**40]}}, bytes(24), "bytes, the header gives 24"),
        ({"w": W | {"shape": [2**40, 0, 2**40], "data_offsets": [0, 0]}}, b"", "fit into no memory"),
        ({"w": W}, bytes(23), "cut off: its tensors end at byte"),
        ({"w": W}, bytes(25), "too long: its tensors end at byte"),
        ({"w": W | {"data_offsets": [4, 28]}}, bytes(28), "has a gap before it"),
        ({"w": W, "v": W | {"data_offsets": [12, 36]}}, bytes(36), "overlaps what lies before it"),
        ({"w": W, "v": W}, bytes(24), "overlaps what lies before it"),
    ],
)
def test_what_is_no_sound_file_is_refused(tmp_path, header, data, words):
    path = raw(tmp_path / "a.safetensors", header, data)
    with pytest.raises(WeightsError, match=re.escape(words)) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "cut off: a header of 0 bytes in a file of 0"),
        (b"\1\0\0", "cut off"),
        ((2**63 + 5).to_bytes(8, "little") + b"{}", "cut off: a header of"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"PK\3\4" + bytes(100), "a zip file"),
        *((pickle.dumps({}, protocol=n) + bytes(100), "a pickle under another name") for n in (2, 3, 4, 5)),
    ],
)
def test_other_files_are_told_apart(tmp_path, content, words):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(words)):
        read_header(tmp_path / "a.safetensors")


def test_a_header_longer_than_the_format_allows(tmp_path):
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(WeightsError, match="a header of 100000001 bytes; the format allows 100000000"):
        read_header(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "gone.safetensors")


def test_enormous_names_do_not_fill_the_message(tmp_path):
    path = raw(tmp_path / "a.safetensors", {"n" * 1_000_000: W | {"dtype": "?" * 100_000}}, bytes(24))
    with pytest.raises(WeightsError) as error:
        read_header(path)
    assert len(str(error.value)) < 1000


def test_parts_are_those_of_the_whole(tmp_path, monkeypatch):
    # Chunks of any size meet rows that are longer and shorter than they are.
    path, rng = tmp_path / "a.safetensors", np.random.default_rng(3)
    shapes = [(), (7,), (0, 3), (40, 3), (3, 50), (5, 6, 7), (2, 3, 4, 5)]
    arrays = {f"t{i}": rng.normal(size=shape).astype("f4") for i, shape in enumerate(shapes)}
    write(path, {key: source(array) for key, array in arrays.items()}, {})
    found = read_header(path)[0]
    for chunk in (1, 8, 100, 1 << 20):
        monkeypatch.setattr(reading, "CHUNK", chunk)
        for key, array in arrays.items():
            for _ in range(8):
                ends = [np.sort(rng.integers(0, n + 1, 2)) for n in array.shape]
                index = tuple(slice(int(a), int(b)) for a, b in ends)[: rng.integers(array.ndim + 1)]
                out = np.zeros(array[index].shape[::-1], rng.choice(["f4", "f8"])).T
                found[key].fill(out, index)
                np.testing.assert_array_equal(out, array[index])


@pytest.mark.parametrize("change", ["replaced", "written to", "shorter"])
def test_a_file_that_changes_while_it_is_read(tmp_path, change):
    path = raw(tmp_path / "a.safetensors", {"w": W}, bytes(24))
    tensor, other = read_header(path)[0]["w"], path.read_bytes()[:-24] + bytes(range(24))
    if change == "replaced":  # by one of the same size and age
        stat = path.stat()
        (tmp_path / "b").write_bytes(other)
        os.utime(tmp_path / "b", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(tmp_path / "b", path)
    else:
        path.write_bytes(other[: -1 if change == "shorter" else None])
        os.utime(path, ns=(0, 0))
    for read in (tensor.part, lambda: tensor.fill(np.zeros((2, 3), np.float32))):
        with pytest.raises(WeightsError, match="was replaced while it was read; load it again"):
            read()
    if change == "shorter":
        with pytest.raises(WeightsError, match="became shorter"):
            tensor._replace(stamp=None).part()


def test_an_array_of_another_shape_is_not_filled(tmp_path):
    tensor = read_header(raw(tmp_path / "a.safetensors", {"w": W}, bytes(24)))[0]["w"]
    views = (tensor, Joined((tensor,)), Joined((tensor,), turned=True), Unit(tensor.path, tensor.dtype, (2, 3)))
    for view in views:
        for shape in ((3, 3), (1, 3), (3,), ()):
            with pytest.raises(ValueError, match="an array of shape"):
                view.fill(np.zeros(shape, np.float32), (slice(0, 2), slice(0, 2)))


def test_types_that_the_format_lacks_and_sources_that_lie_write_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    for given, words in (
        (source(np.zeros(2, np.complex64)), "tensor 'w' has type complex64, which safetensors does not have"),
        (source(np.zeros(2, ">f4")), "tensor 'w' has type >f4"),
        (source(np.zeros(2, jnp.float8_e4m3)), "has type float8_e4m3, "),
        (Source(np.dtype("f4"), (3,), lambda: np.zeros(2, np.float32)), r"float32 \(2,\) instead of float32 \(3,\)"),
        (Source(np.dtype("f4"), (2,), lambda: np.zeros(2, np.int32)), "int32"),
    ):
        with pytest.raises(WeightsError, match=words):
            write(path, {"w": given}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_while_writing_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.safetensors"
    write(path, {"w": source(np.ones(2, np.float32))}, {})
    before = path.read_bytes()

    def fail():
        raise error

    tensor = Source(np.dtype("f4"), (2,), fail)
    with pytest.raises(type(error)):
        write(path, {"v": source(np.zeros(9)), "w": tensor}, {})
    with pytest.raises(type(error)), writing(path, {"v": source(np.zeros(9))}, {}):
        raise error
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_tensor_knows_its_bytes():
    assert Tensor("", np.dtype("f4"), (2, 3), 0).nbytes == 24
