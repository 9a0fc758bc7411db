"""The U-Net's levels, skips and attention are where they were asked for."""

import jax
import pytest

from diffjax.models import unet

SETTINGS = dict(shape=(8, 4, 1), width=4, mults=(1, 2), blocks=2, attention=(4,), head_width=4, groups=2)


@pytest.fixture(scope="module")
def shapes():
    return jax.eval_shape(unet(**SETTINGS).init, jax.random.key(0))


def test_blocks_and_attention_are_where_they_were_asked_for(shapes):
    down = {"8x4_block0", "8x4_block1", "4x2_down", "4x2_block0", "4x2_attention0", "4x2_block1", "4x2_attention1"}
    up = {f"4x2_{kind}{i}" for kind in ("block", "attention") for i in range(3)} | {"4x2_up"}
    assert set(shapes["enc"]) == down
    assert set(shapes["dec"]) == up | {f"8x4_block{i}" for i in range(3)}


def test_skips_are_concatenated_in_reverse(shapes):
    # Down: 4 (input), 4, 4, 4 (halved), 8, 8 channels. Up, current + skip: 8+8, 8+8, 8+4; then 8+4, 4+4, 4+4.
    entering = [
        shapes["dec"][f"{size}_block{i}"]["conv1"]["kernel"].shape[2] for size in ("4x2", "8x4") for i in range(3)
    ]
    assert entering == [16, 16, 12, 12, 8, 8]
