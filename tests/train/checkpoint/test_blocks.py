"""Blocks: what is read of them, what is checked, and the memory that they are copied into."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.train.checkpoint import blocks, meta, open_checkpoints, read
from diffjax.train.checkpoint.errors import Damaged


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint of a [40, 8] leaf in blocks of 4 rows, and of a scalar and an empty leaf."""
    monkeypatch.setattr(blocks, "PIECE", 4 * 8 * 4)
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, {"w": jnp.arange(320.0).reshape(40, 8), "s": jnp.float32(3), "e": jnp.zeros((0, 5))})
    checkpoints.close()
    return tmp_path / "1"


def box(folder, name, start, shape):
    [(_, found)] = read.read_leaves(folder, meta.read_meta(folder), {name: [read.Box(start, shape)]})
    return found[read.Box(start, shape)]


def test_any_box_is_put_together_from_the_blocks(folder):
    whole = np.arange(320.0, dtype=np.float32).reshape(40, 8)
    rng = np.random.default_rng(0)
    for _ in range(50):
        low = rng.integers(0, (40, 8))
        high = low + 1 + rng.integers(0, np.array((40, 8)) - low)
        part = box(folder, "w", tuple(map(int, low)), tuple(map(int, high - low)))
        np.testing.assert_array_equal(part, whole[low[0] : high[0], low[1] : high[1]])
    assert box(folder, "s", (), ()) == 3 and box(folder, "e", (0, 0), (0, 5)).shape == (0, 5)


def test_only_the_blocks_of_a_box_are_read_and_checked(folder):
    index = json.loads((folder / "state/blocks-0.json").read_text())["content"]["blocks"]["w"]
    assert len(index) == 10
    [offset] = [at for start, _, at, _ in index if start == [20, 0]]
    file = folder / "state/blocks-0.bin"
    content = bytearray(file.read_bytes())
    content[offset + 5] ^= 1
    file.write_bytes(content)
    assert box(folder, "w", (0, 0), (20, 8)).size and box(folder, "w", (24, 3), (16, 5)).size
    with pytest.raises(Damaged, match="leaf 'w' does not match its checksum"):
        box(folder, "w", (22, 7), (1, 1))


def test_a_block_that_no_process_wrote_is_missed(folder):
    path = folder / "state/blocks-0.json"
    content = json.loads(path.read_text())["content"]
    del content["blocks"]["w"][3]
    path.write_text(json.dumps(meta.seal(content)))
    with pytest.raises(Damaged, match="leaf 'w': 288 of the 320 numbers"):
        box(folder, "w", (0, 0), (40, 8))


def test_a_process_whose_file_is_missing_is_missed(folder):
    path = folder / "meta/metadata"
    content = json.loads(path.read_text())["content"] | {"processes": 2}
    path.write_text(json.dumps(meta.seal(content)))
    with pytest.raises(Damaged, match="blocks-1.json cannot be read"):
        box(folder, "w", (0, 0), (1, 1))


def test_the_copy_is_in_memory_of_its_own_that_is_used_again():
    staging = blocks.Staging()
    state = {"a": jnp.arange(1000.0), "b": jnp.arange(7, dtype=jnp.bfloat16)}
    staging.reserve(state)
    first = staging.copy(state)
    where = first.data[0].ctypes.data
    assert where != state["a"].unsafe_buffer_pointer()
    np.testing.assert_array_equal(first.data[0].view(np.float32), np.arange(1000.0))
    again = staging.copy(jax.tree.map(lambda x: x + 1, state))
    assert again.data[0].ctypes.data == where
    np.testing.assert_array_equal(again.data[1].view(jnp.bfloat16), np.arange(1, 8))


def test_a_save_does_not_keep_the_state_from_being_donated(tmp_path):
    step = jax.jit(lambda x: 2 * x, donate_argnums=0)
    state = jnp.ones(1_000_000)
    step = step.lower(state).compile()
    checkpoints = open_checkpoints(tmp_path)
    before = state.unsafe_buffer_pointer()
    checkpoints.save(1, {"w": state})
    assert step(state).unsafe_buffer_pointer() == before and state.is_deleted()
    checkpoints.close()
