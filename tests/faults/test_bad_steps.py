"""A poisoned batch stops a run, is left out, or is gone around, as configured, and what it did is written down."""

import functools
import io
import json
import textwrap

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from diffjax.data import batches
from diffjax.train import loop
from diffjax.train import step as steps
from diffjax.train.checkpoint import open_checkpoints
from diffjax.train.errors import NonFiniteError
from diffjax.train.parts import prepare
from diffjax.train.state import init_state

USER = """
import jax.numpy as jnp
import numpy as np
from diffjax.core import Model
from diffjax.data import ArraySource, Dataset

def data(items=(), value="nan"):
    images = np.random.default_rng(0).uniform(-1, 1, (1024, 2, 2, 1)).astype(np.float32)
    images[list(items)] = float(value)
    source = ArraySource(images, np.arange(1024, dtype=np.int32) % 2)
    return Dataset(source, source, (2, 2, 1), 2, lambda x: x)

def linear(*, shape, num_classes):
    init = lambda key: {"out": {"w": jnp.ones(shape)}, "label": {"b": jnp.zeros((num_classes + 1, *shape))}}
    apply = lambda p, x, t, y, key=None: p["out"]["w"] * x + p["label"]["b"][y]
    return Model(init, apply, {})
"""
MODULE = "user_of_test_bad_steps"
BATCH, STEPS, BAD = 16, 40, 23


@pytest.fixture(autouse=True)
def user_code(tmp_path, monkeypatch):
    folder = tmp_path / "their_code"
    folder.mkdir()
    (folder / f"{MODULE}.py").write_text(textwrap.dedent(USER))
    monkeypatch.syspath_prepend(folder)


def poisoned(*numbers, value="nan"):
    """The spec of the data with one bad item in each of the batches of these numbers, and the items."""
    order = batches(np.arange(1024)[:, None], BATCH, seed=0)
    items = tuple(int(order.batch_ids(b)[b % BATCH]) for b in numbers)
    return f"{MODULE}:data(items={items}, value='{value}')", items


def config(data, **changes):
    base = dict(
        data=data,
        model=f"{MODULE}:linear",
        batch_size=BATCH,
        num_steps=STEPS,
        log_every=2,
        checkpoint_every=10,
        # Plain descent: its updates are continuous in the gradient, so other rounding stays other rounding.
        optim=dict(name="sgd", lr=0.02, b1=0.0, clip=0.0),
        ema=("decay(0.9)",),
    )
    return ConfigDict(base | changes)


def train(workdir, data, **changes):
    return loop.train(config(data, **changes), str(workdir), stream=io.StringIO())


def final(workdir):
    return {
        part: open_checkpoints(workdir / "checkpoints").restore_part(part)[1] for part in ("params", "ema/decay(0.9)")
    }


@functools.cache
def prepared(data):
    settings, parts = prepare(config(data))
    return parts, jax.jit(steps.make_train_step(parts, settings))


def reference(data, numbers, left_out=()):
    """Parameters and average after a step on each of the batches of these numbers, written out: nothing of the loop.

    The steps at the positions `left_out` make no update, and count.
    """
    parts, step = prepared(data)
    stream = batches(parts.dataset.train, BATCH, seed=0)
    state = init_state(parts, jax.random.key(0))
    for position, number in enumerate(numbers):
        stream.set_state({"next_index": number})
        after, _ = step(state, next(stream))
        state = state._replace(step=after.step) if position in left_out else after
    return {"params": state.params, "ema/decay(0.9)": state.ema["decay(0.9)"]}


def close(a, b):
    # float32 sums in another order, over 40 small steps.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), a, b)


def far(a, b):
    distance = optax.tree.norm(jax.tree.map(lambda x, y: x - y, a["params"], b["params"]))
    assert float(distance) > 1e-3


POISONS = [("nan", dict()), pytest.param("inf", dict(), marks=pytest.mark.faults), ("300.0", dict(spike=4.0))]


@pytest.mark.parametrize("value, spike", POISONS)
def test_skip_leaves_out_the_update_of_the_bad_batch_alone(tmp_path, value, spike):
    data, items = poisoned(BAD, value=value)
    assert train(tmp_path, data, guard=dict(on_bad="skip", **spike)).step == STEPS
    wanted = reference(data, range(STEPS), left_out={BAD})
    close(final(tmp_path), wanted)
    far(wanted, reference(data, range(STEPS), left_out={BAD, BAD + 1}))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["skipped"]) for row in rows if "skipped" in row] == [(24, 1.0)]
    assert all(np.isfinite(row["loss"]) and row["loss"] < 50 for row in rows)
    check_evidence(tmp_path, items, value)


def check_evidence(workdir, items, value):
    facts = json.loads((workdir / "evidence" / f"step_{BAD + 1}.json").read_text())
    assert facts["step"] == BAD + 1 and facts["batch"] == BAD and facts["batch_ids"][BAD % BATCH] == items[0]
    assert f"step {BAD + 1} " in facts["message"]
    arrays = np.load(workdir / "evidence" / f"step_{BAD + 1}.npz")
    assert arrays["image"].shape == (BATCH, 2, 2, 1) and len(facts["batch_ids"]) == BATCH
    bad = arrays["image"][BAD % BATCH]
    np.testing.assert_array_equal(bad, np.full_like(bad, float(value)))
    # One item of 16 is bad: its loss, and through the mean every gradient.
    wrong = np.isnan(arrays["losses"]) | (arrays["losses"] > 100)
    assert wrong.tolist() == [i == BAD % BATCH for i in range(BATCH)]
    norms = facts["gradient_norm_by_module"]
    assert norms.keys() == {"out", "label"} and (norms["out"] == "nan" or norms["out"] > 10)
    assert len(facts["loss_by_logsnr"]) > 1


@pytest.mark.parametrize("value, spike", POISONS)
def test_rollback_is_the_run_that_never_saw_the_window(tmp_path, value, spike):
    data, items = poisoned(BAD, value=value)
    assert train(tmp_path, data, guard=dict(on_bad="rollback", **spike)).step == STEPS
    # The log line after step 24 is of the steps 23 and 24, whose batches are 22 and 23.
    numbers = [n for n in range(STEPS + 2) if n not in (BAD - 1, BAD)]
    close(final(tmp_path), reference(data, numbers))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, STEPS + 1, 2))
    check_evidence(tmp_path, items, value)


@pytest.mark.parametrize("policy", [pytest.param("skip", marks=pytest.mark.faults), "rollback"])
def test_a_guarded_run_resumes_to_the_same_bits(tmp_path, policy):
    data, _ = poisoned(BAD, BAD + 7, value="300.0")
    settings = dict(guard=dict(on_bad=policy, spike=4.0), log_every=3)
    train(tmp_path / "whole", data, **settings)
    for stop in (10, 20, 30, STEPS):
        # Each start reads the skipped batches and the median of the loss from the checkpoint before.
        assert train(tmp_path / "parts", data, stop_at=stop, **settings).step == stop
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    states = [open_checkpoints(tmp_path / name / "checkpoints").info(STEPS)["iterator"] for name in ("whole", "parts")]
    assert states[0] == states[1] and states[0]["guard"]["events"] == 2


def test_stop_writes_evidence_and_the_run_may_go_on_with_another_policy(tmp_path):
    data, items = poisoned(BAD)
    with pytest.raises(NonFiniteError, match=rf"step {BAD + 1} is not finite.*step 20 in .*evidence: .*step_24.json"):
        train(tmp_path, data)
    assert open_checkpoints(tmp_path / "checkpoints").steps() == [10, 20]
    check_evidence(tmp_path, items, "nan")
    assert train(tmp_path, data, guard=dict(on_bad="skip")).step == STEPS
    close(final(tmp_path), reference(data, range(STEPS), left_out={BAD}))


@pytest.mark.parametrize("policy", ["rollback", pytest.param("skip", marks=pytest.mark.faults)])
def test_evidence_that_cannot_be_written_does_not_stop_a_run(tmp_path, policy, caplog):
    data, _ = poisoned(BAD)
    (tmp_path / "evidence").write_text("a file in the place of the folder")
    assert train(tmp_path, data, guard=dict(on_bad=policy)).step == STEPS
    left = [n for n in range(STEPS + 2) if n not in (BAD - 1, BAD)]
    wanted = reference(data, left) if policy == "rollback" else reference(data, range(STEPS), left_out={BAD})
    close(final(tmp_path), wanted)
    assert f"no evidence about step {BAD + 1}: FileExistsError" in caplog.text


def test_each_bad_step_of_a_window_has_evidence_of_its_own(tmp_path):
    data, items = poisoned(20, 21)
    assert train(tmp_path, data, guard=dict(on_bad="skip")).step == STEPS
    facts = [json.loads((tmp_path / "evidence" / f"step_{step}.json").read_text()) for step in (21, 22)]
    for number, item, found in zip((20, 21), items, facts, strict=True):
        assert found["batch"] == number and found["batch_ids"][number % BATCH] == item
    # The device keeps what it saw of the first one alone.
    assert facts[0]["seen"]["loss"] == "nan" and "seen" not in facts[1]


def test_a_spike_stops_the_run_where_that_is_asked_for(tmp_path):
    data, _ = poisoned(BAD, value="300.0")
    with pytest.raises(NonFiniteError, match="has a loss above .*config.guard.spike times its median"):
        train(tmp_path, data, guard=dict(spike=4.0))
    assert train(tmp_path / "without", data).step == STEPS


def test_patience_and_the_number_of_events_are_limits(tmp_path):
    data, _ = poisoned(20, 21, 30)
    with pytest.raises(NonFiniteError, match="2 bad steps .21, 22. since the last log line"):
        train(tmp_path / "patience", data, guard=dict(on_bad="skip", patience=1))
    for policy, text in (("skip", "3 bad steps in the run"), ("rollback", "rolled back 1 times")):
        with pytest.raises(NonFiniteError, match=text):
            limit = 2 if policy == "skip" else 1
            train(tmp_path / policy, data, guard=dict(on_bad=policy, max_events=limit))
        assert open_checkpoints(tmp_path / policy / "checkpoints").steps()[-1] in (20, 30)


def test_a_bad_start_rolls_back_to_the_initial_state(tmp_path):
    data, _ = poisoned(1)
    assert train(tmp_path, data, num_steps=10, guard=dict(on_bad="rollback")).step == 10
    close(final(tmp_path), reference(data, range(2, 12)))
