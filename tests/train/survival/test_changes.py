"""What a run may change when it goes on is written down, and what follows from it is said."""

import io
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from diffjax.commands import UsageError, run_settings
from diffjax.pipelines.bulk import sample_many
from diffjax.pipelines.generate import generate
from diffjax.train import loop
from diffjax.train.checkpoint import CheckpointError, open_checkpoints, read_params
from diffjax.train.config import fill
from diffjax.train.errors import ConfigError
from diffjax.train.state import load_run
from diffjax.train.survival.workdir import CONFIG_FILE, read_config, refuse_changes

SETTINGS = dict(
    data="digits()",
    model=dict(name="mlp", width=4, depth=1),
    batch_size=16,
    num_steps=4,
    checkpoint_every=2,
    optim=dict(name="sgd", lr=1e-2, schedule="cosine()"),
    ema=("decay(0.9)",),
)


def train(workdir, allow=False, **changes):
    stream = io.StringIO()
    loop.train(ConfigDict(SETTINGS | changes), str(workdir), stream=stream, allow_changes=allow)
    return stream.getvalue()


def test_changes_are_refused_then_allowed_and_recorded(tmp_path):
    train(tmp_path, stop_at=2)
    with pytest.raises(ConfigError, match="label_dropout: 0.1 -> 0.5.*--allow_changes"):
        train(tmp_path, label_dropout=0.5)
    assert not (tmp_path / "config_history.jsonl").exists()
    text = train(tmp_path, allow=True, label_dropout=0.5, num_steps=8)
    # Half of a cosine's way is 1/2 of 1e-2; a quarter of it is (1 + cos(pi / 4)) / 2.
    assert "config.num_steps 4 -> 8" in text and "at step 2 it is 0.008536 where it would have been 0.005" in text
    [row] = map(json.loads, (tmp_path / "config_history.jsonl").read_text().splitlines())
    assert row["step"] == 2
    assert {"label_dropout: 0.1 -> 0.5", "num_steps: 4 -> 8", "stop_at: 2 -> 0"} <= set(row["changes"])
    assert read_config(str(tmp_path)).label_dropout == 0.5


def test_where_a_run_computes_is_not_what_a_change_is_refused_for(tmp_path):
    given = lambda **changes: fill(ConfigDict(SETTINGS | changes))
    (tmp_path / CONFIG_FILE).write_text(json.dumps(given().to_dict()))
    assert refuse_changes(str(tmp_path), given(mesh="fsdp=1", sharding="fsdp")) == given()
    with pytest.raises(ConfigError, match="ema"):
        refuse_changes(str(tmp_path), given(mesh="fsdp=1", ema=()))


@pytest.mark.slow
def test_where_a_run_computes_may_change(tmp_path):
    train(tmp_path, stop_at=2)
    train(tmp_path, mesh="fsdp=1", sharding="fsdp")
    assert json.loads((tmp_path / "summary.json").read_text())["facts"]["compile_seconds"] > 0
    [row] = map(json.loads, (tmp_path / "config_history.jsonl").read_text().splitlines())
    assert {"mesh: '' -> 'fsdp=1'", "sharding: 'data' -> 'fsdp'"} <= set(row["changes"])


def test_data_that_grew_is_refused_then_allowed(tmp_path):
    grow = lambda n: np.savez(tmp_path / "set.npz", image=np.zeros((n, 4, 4, 1), np.uint8))
    settings = dict(data=f"npz(path={str(tmp_path / 'set.npz')!r})")
    grow(40)
    train(tmp_path / "run", stop_at=2, **settings)
    grow(50)
    with pytest.raises(ValueError, match="there are 45 images to train on, and there were 36 when this run was saved"):
        train(tmp_path / "run", **settings)
    text = train(tmp_path / "run", allow=True, **settings)
    assert "45 images of 4x4x1 to train on, 5 held out, no classes; 4 steps of 16" in text
    [row] = map(json.loads, (tmp_path / "run" / "config_history.jsonl").read_text().splitlines())
    assert "images to train on: 36 -> 45" in row["changes"][-1] and row["changes"][-1] in text
    assert open_checkpoints(tmp_path / "run" / "checkpoints").info(4)["iterator"] == {"next_index": 4, "items": 45}


def test_a_run_is_opened_where_its_data_lie_now(tmp_path):
    before, after = (f"npz(path={str(tmp_path / name)!r})" for name in ("set.npz", "moved.npz"))
    np.savez(tmp_path / "set.npz", image=np.zeros((40, 4, 4, 1), np.uint8))
    train(tmp_path / "run", data=before)
    (tmp_path / "set.npz").rename(tmp_path / "moved.npz")
    with pytest.raises(ConfigError, match="config.data: .*set.npz"):
        load_run(str(tmp_path / "run"))
    # For samples the run's own note of its data is enough.
    known = load_run(str(tmp_path / "run"), items=False).dataset
    assert (known.train, known.shape, known.num_classes, known.to_pixels.high) == (None, (4, 4, 1), 0, 255)
    assert generate(tmp_path / "run", seeds=[0], steps=1, solver="ddim()").images.shape == (1, 4, 4, 1)
    assert sample_many(tmp_path / "run", 2, steps=1, solver="ddim()").drawn == 2
    # A note of other data, as of a run whose config was restored, or one without facts, is none.
    note = tmp_path / "run" / "data.json"
    told = json.loads(note.read_text())
    for other in (told | {"data": "digits()"}, told | {"facts": None}):
        note.write_text(json.dumps(other))
        with pytest.raises(ConfigError, match="config.data: .*set.npz"):
            load_run(str(tmp_path / "run"), items=False)
    note.write_text('{"data": ')
    with pytest.raises(ConfigError, match="data.json is damaged .*; delete it"):
        load_run(str(tmp_path / "run"), items=False)
    given = run_settings(str(tmp_path / "run"), {"data": after}, ("sample",))
    assert load_run(str(tmp_path / "run"), **given).dataset.shape == (4, 4, 1)
    with pytest.raises(UsageError, match="only config.sample.* and config.data, where the same data lie now"):
        run_settings(str(tmp_path / "run"), {"seed": "1"}, ("sample",))


def test_the_parameters_of_a_run_alone(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        read_params(tmp_path)
    train(tmp_path)
    step, params = read_params(tmp_path)
    assert step == 4 and params.keys() == open_checkpoints(tmp_path / "checkpoints").restore_part("params")[1].keys()
    step, average = read_params(tmp_path, "decay(0.9)", step=2)
    assert step == 2 and average.keys() == params.keys()
    with pytest.raises(ValueError, match="nothing under 'ema/decay.0.8.'"):
        read_params(tmp_path, "decay(0.8)")
