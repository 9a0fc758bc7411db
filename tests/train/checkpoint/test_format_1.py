"""A committed run of the first checkpoint format is read, opened for inference and gone on with."""

import io
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from diffjax.train import loop, paths
from diffjax.train.checkpoint import open_checkpoints
from diffjax.train.parts import prepare
from diffjax.train.state import abstract_state, load_run
from diffjax.train.survival.workdir import read_config

FIXTURE = Path(__file__).parent / "fixtures" / "format_1"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(FIXTURE / "run", tmp_path / "run"))


def expected(prefix):
    with np.load(FIXTURE / "expected.npz") as arrays:
        return {name.removeprefix(prefix + "/"): arrays[name] for name in arrays if name.startswith(prefix + "/")}


def same_bits(tree, wanted):
    found = paths.named_leaves(tree)
    assert found.keys() == wanted.keys() and len(wanted) > 5
    for name, array in wanted.items():
        assert np.asarray(found[name]).tobytes() == array.tobytes(), name


class Position:
    def set_state(self, state):
        self.state = state


def test_state_iterator_and_config_are_read(run):
    config, parts = prepare(read_config(str(run)))
    checkpoints, iterator = open_checkpoints(run / "checkpoints"), Position()
    step, state = checkpoints.restore(abstract_state(parts), iterator)
    assert step == 20 and int(state.step) == 20 and iterator.state == {"next_index": 20}
    same_bits(state.params, expected("20:params"))
    same_bits(checkpoints.restore_part("ema/decay(0.9)")[1], expected("20:ema/decay(0.9)"))
    info = checkpoints.info(20)
    assert info["format"] == 1 and info["config"]["model"]["width"] == 8 and config.num_steps == 30


def test_it_opens_for_inference(run):
    opened = load_run(str(run), ema="decay(0.9)")
    assert opened.step == 20
    same_bits(opened.params, expected("20:ema/decay(0.9)"))


def test_it_goes_on_to_where_the_uninterrupted_run_ended(run):
    config = read_config(str(run))
    config.stop_at = 0
    assert loop.train(config, str(run), stream=io.StringIO()) == loop.Result(30, None)
    params = open_checkpoints(run / "checkpoints").restore_part("params")[1]
    wanted, before = expected("30:params"), expected("20:params")
    for name, leaf in paths.named_leaves(jax.device_get(params)).items():
        # Adam moves each number by up to lr = 1e-3 a step, 1e-2 in all; its rounding on other versions and machines is
        # a small part of that, and a lost moment, batch or key is a large one.
        np.testing.assert_allclose(leaf, wanted[name], atol=1e-4, err_msg=name)
    moved = max(float(np.abs(wanted[name] - before[name]).max()) for name in wanted)
    assert moved > 2e-3


def test_a_damaged_first_format_is_noticed(run):
    from diffjax.train.checkpoint import CheckpointError

    for file in (run / "checkpoints/20/state").rglob("d/*"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="no readable checkpoint .*step 20: leaf"):
        open_checkpoints(run / "checkpoints").restore_part("params")
