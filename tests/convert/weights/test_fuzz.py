"""Files from anywhere: what is read is what the safetensors package reads, everything else is an error of ours.

Each test draws hundreds of inputs, of which some are sound; as slow ones they draw more than 10,000 malformed ones.
"""

import collections
import contextlib
import io
import json
import os
import random
import re
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from diffjax.convert.weights import WeightsError, load, save
from diffjax.convert.weights.folders.find import find, read_config
from diffjax.convert.weights.tensors import DTYPES, parse_header, read_header
from diffjax.models import from_config

MB = 1 << 20
# How many times as many inputs are drawn.
SCALES = pytest.mark.parametrize("scale", [1, pytest.param(8, marks=pytest.mark.slow)])
SEEN = collections.defaultdict(collections.Counter)  # by scale and line: inputs that were "read", "refused"
# Why a file may be refused that the safetensors package reads.
STRICTER = re.compile(
    r"the name .* twice|digits|\(-0\)|nested too deeply|surrogates not allowed"  # JSON of two readings
    r"|unknown dtype|at most 32 lengths|expected dtype, shape and data_offsets|is no map from text to text"
    r"|fit into no memory"
)
FAST = dict(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
NUMBERS = (0, 1, 2, 3, 4, 8, 24, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -1, -(2**40), 0.5, 1e300)
NASTY = (
    *NUMBERS, None, True, False, float("nan"), float("inf"), "", "a", "\0", "ü", "\ud800", "n" * 99, [], {}, [[]], [{}],
    {"a": []}, [None], [1, [2]], ["a"], {"a": {"a": {"a": 1}}}, [2**40, 2**40], [1] * 40, [0, 2**62, 2**62], [2**63, 0],
)  # fmt: skip
JUNK = st.sampled_from(NASTY)
LENGTHS = st.sampled_from((0, 1, 2, 3, 4, 6, 12, 24, 32, 33, 2**40, 2**63, -1))
SHAPE = st.lists(LENGTHS, max_size=3) | JUNK
OFFSETS = st.tuples(LENGTHS, LENGTHS) | JUNK
TYPE = st.sampled_from([*DTYPES, "F4", "C64", "f32"]) | JUNK
NAME = st.sampled_from(["a", "b.weight", "__metadata__", "", "\0", "ü", "../x", "\udfff", "n" * 1000])
ENTRY = st.fixed_dictionaries({"dtype": TYPE, "shape": SHAPE, "data_offsets": OFFSETS}) | JUNK
SOUND = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "BOOL", "shape": [], "data_offsets": [32, 33]},
    "d": {"dtype": "F64", "shape": [0, 7], "data_offsets": [33, 33]},
}
SIZE = 33


def tried(scale, count, check, *strategies):
    """Runs `check`, which says how many inputs it read and refused, on `count * scale` draws; there must be both."""
    seen = SEEN[scale][check.__code__.co_firstlineno] = collections.Counter()

    @settings(max_examples=count * scale, **FAST)
    @given(st.tuples(*strategies))
    def run(given):
        read = [*check(*given)]
        seen.update(read=sum(read), refused=len(read) - sum(read))

    run()
    assert seen["read"] and seen["refused"], seen


@contextlib.contextmanager
def cheap(most=4 * MB):
    """Fails if more memory than this is allocated inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def inside(where, monkeypatch):
    """Fails if a file outside the folder is opened."""
    opened = []

    def check(path):
        path = os.path.abspath(os.fspath(path))
        opened.append(path)
        assert path.startswith(f"{where}/"), path

    with monkeypatch.context() as patch:
        known, mapped, os_open = open, np.memmap, os.open
        patch.setattr("builtins.open", lambda path, *a, **k: (check(path), known(path, *a, **k))[1])
        patch.setattr(io, "open", lambda path, *a, **k: (check(path), known(path, *a, **k))[1])
        patch.setattr(os, "open", lambda path, *a, **k: (check(path), os_open(path, *a, **k))[1])
        patch.setattr(np, "memmap", lambda path, *a, **k: (check(path), mapped(path, *a, **k))[1])
        yield opened


def agrees(raw):
    """Reads a header as here and, where that is sound, as the package does; whether it is sound."""
    size = int.from_bytes(raw[:8], "little")
    try:
        tensors, metadata = parse_header(Path("a.safetensors"), raw[8 : 8 + size], len(raw))
    except WeightsError as error:
        assert str(error).startswith("a.safetensors: ") and len(str(error)) < 1500
        str(error).encode()
        with contextlib.suppress(safetensors.SafetensorError):
            safetensors.deserialize(raw)
            assert STRICTER.search(str(error)), f"the package reads what is refused here: {error}"
        return False
    theirs = dict(safetensors.deserialize(raw))
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert DTYPES[theirs[name]["dtype"]] == tensor.dtype and tuple(theirs[name]["shape"]) == tensor.shape
        assert bytes(theirs[name]["data"]) == raw[tensor.offset : tensor.offset + tensor.nbytes]
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items())
    return True


def file_of(text, data=bytes(SIZE)):
    return len(text).to_bytes(8, "little") + text + data


def encoded(value):
    return json.dumps(value).encode()


@SCALES
def test_headers_of_any_content(scale):
    headers = st.dictionaries(NAME, ENTRY, max_size=3) | st.sampled_from([{}, SOUND])
    sizes = (0, 4, 24, SIZE, 48)
    tried(scale, 200, lambda header: [agrees(file_of(encoded(header), bytes(size))) for size in sizes], headers)


@SCALES
def test_sound_headers_with_one_fact_changed(scale):
    def changed(*values):
        for name in ("a", "b.weight", "c", "d"):
            for key, value in zip(("dtype", "shape", "data_offsets"), values, strict=True):
                yield agrees(file_of(encoded(SOUND | {name: SOUND[name] | {key: value}})))

    tried(scale, 100, changed, TYPE, SHAPE, OFFSETS)


TEXT = encoded(SOUND)
EDITS = (*(bytes([byte]) for byte in b'\0"{}[],:-90e \xff'), b"", b"\\ud800", b"NaN")


def edited(text, rng):
    """The text with some of its bytes cut out and others put in, up to three times."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice(EDITS) + text[at + rng.randint(0, 3) :]
    return text


SEED = st.integers(0, 2**32).map(random.Random)


@SCALES
def test_sound_headers_with_bytes_changed(scale):
    tried(scale, 20, lambda rng: [agrees(file_of(edited(TEXT, rng))) for _ in range(50)], SEED)


@SCALES
def test_files_of_any_bytes(scale, tmp_path):
    path = tmp_path / "any.safetensors"

    def bytes_of(rng):
        length = rng.choice([0, 2, 8, 30, 100, 2**32, 2**63, rng.getrandbits(64), len(TEXT), len(TEXT)])
        rest = rng.choice([rng.randbytes(rng.randint(0, 60)), TEXT + bytes(SIZE)])
        raw = (length.to_bytes(8, "little") + rest)[: rng.choice([3, 7, 8, 900, 900, 900])]
        path.write_bytes(raw)
        try:
            read_header(path)
        except WeightsError:
            return [False]
        with safe_open(path, framework="np") as file:
            file.keys()
        return [True]

    tried(scale, 150, bytes_of, SEED)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000,
        b'{"a":' * 50_000,
        b'{"a":{"dtype":"F32","shape":[' + b"1," * 100_000 + b'1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 300_000 + b'],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e400]}}',
        b'{"' + b"n" * 300_000 + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"' + b"F" * 300_000 + b'","shape":[1],"data_offsets":[0,4]}}',
        encoded({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}),
        encoded({"a": {"dtype": "F32", "shape": [2**62] * 32, "data_offsets": [0, 4]}}),
        encoded({"a": {"dtype": "F32", "shape": [0] + [2**62] * 31, "data_offsets": [0, 0]}}),
        encoded({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        encoded({f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} for i in range(5_000)}),
    ],
)
def test_bombs_take_no_memory(tmp_path, text):
    (tmp_path / "a.safetensors").write_bytes(file_of(text))
    with cheap(8 * MB), pytest.raises(WeightsError) as error:
        read_header(tmp_path / "a.safetensors")
    assert len(str(error.value)) < 1500


def test_what_is_refused_here_is_not_made_before(tmp_path):
    """The memory of an error is that of the file, whatever shape it tells of."""
    for i in range(300):
        shape = [2 ** (10 + i % 20), 2**20]
        raw = file_of(encoded({"a": {"dtype": "F64", "shape": shape, "data_offsets": [0, 8 * shape[0] * 2**20]}}))
        with cheap(MB // 4), pytest.raises(WeightsError, match="cut off|data_offsets"):
            parse_header(tmp_path, raw[8:-SIZE], len(raw))


FILES = st.sampled_from(
    ["a.safetensors", "b.safetensors", "gone.safetensors", "../out.safetensors", "/etc/passwd", "x/y", "..", "", "a\0",
     "link.safetensors", "config.json", "a.bin", "n" * 300, "\\a", "C:\\a", "\udc80", 3, None, []]
)  # fmt: skip
INDEX = st.fixed_dictionaries({"weight_map": st.dictionaries(NAME, FILES, max_size=4) | JUNK}) | JUNK


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("index")
    for name in ("unet/a", "unet/b", "out"):
        path = where / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        path.write_bytes(file_of(encoded({path.stem: tensor}), bytes(4)))
    (where / "unet" / "link.safetensors").symlink_to("a.safetensors")
    return where / "unet"


@SCALES
def test_indices_of_any_content(scale, place):
    def index(value):
        (place / "model.safetensors.index.json").write_bytes(encoded(value))
        with pytest.MonkeyPatch.context() as patch, inside(place, patch):
            try:
                found = find(place)
            except (WeightsError, OSError) as error:
                assert len(str(error)) < 2500
                str(error).encode("utf-8", "backslashreplace")
                return [False]
        assert all(tensor.path.parent == place for tensor in found.values())
        return [True]

    sound = st.just({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
    tried(scale, 150, index, INDEX | sound)


def test_a_sound_index_is_found(place):
    where = {"a": "a.safetensors", "b": "b.safetensors"}
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.MonkeyPatch.context() as patch, inside(place, patch) as opened:
        assert find(place).keys() == {"a", "b"}
    assert {os.path.basename(path) for path in opened} == {"model.safetensors.index.json", *where.values()}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError), inside(place, patch):
        read_header(place.parent / "out.safetensors")


CONFIG = {"_class_name": "DiTTransformer2DModel", "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 4}


@SCALES
def test_configs_of_any_text(scale, tmp_path):
    def config(rng):
        (tmp_path / "config.json").write_bytes(edited(encoded(CONFIG | {"a": rng.choice(NASTY)}), rng))
        try:
            assert isinstance(read_config(tmp_path), dict)
        except WeightsError as error:
            assert len(str(error)) < 1000
            return [False]
        return [True]

    tried(scale, 150, config, SEED)


KEYS = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "patch_size", "sample_size")
SETTINGS = st.sampled_from(["dropout", "activation_fn", "architectures", "_class_name", *KEYS])


@SCALES
def test_configs_of_any_settings(scale, tmp_path):
    model = from_config(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    save(model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float16), shapes), tmp_path)

    def settings_of(key, value):
        try:
            load(tmp_path, config=CONFIG if value == "unset" else CONFIG | {key: value})
        except ValueError as error:
            assert len(str(error)) < 3000
            return [False]
        return [True]

    tried(scale, 8, settings_of, SETTINGS, st.just("unset") | JUNK)


@pytest.mark.slow
def test_ten_thousand_were_refused():
    """Of those that this run drew, if it drew all."""
    seen = SEEN[8]
    if len(seen) < 7:
        pytest.skip("not all tests of this file ran before")
    assert sum(count["refused"] for count in seen.values()) >= 10_000, seen
