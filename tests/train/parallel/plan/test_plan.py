"""Plans for eight pretended devices, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from diffjax.cli import main
from diffjax.train.errors import ConfigError
from diffjax.train.parallel.accelerators import ACCELERATORS
from diffjax.train.parallel.flops import Flops
from diffjax.train.parallel.plan import Plan, estimate, plan, plan_text
from diffjax.train.parallel.plan.hlo import Collective
from diffjax.train.parallel.plan.kept import kept_activations
from diffjax.train.parts import prepare

WIDTH, DEPTH, CLASSES = 64, 3, 8
# Weights of the products, float32: those of the blocks, and those outside (patches of 16 numbers, sinusoids of 256).
BLOCKS = 4 * 18 * WIDTH**2 * DEPTH
REST = 4 * (16 * WIDTH + 256 * WIDTH + WIDTH**2 + 2 * WIDTH**2 + 16 * WIDTH)
LABELS = 4 * (CLASSES + 1) * WIDTH


def given(**changes):
    model = dict(name="dit", patch=2, width=WIDTH, depth=DEPTH, heads=4)
    data = f"synthetic(shape=(16, 16, 4), num_classes={CLASSES})"
    return ConfigDict(dict(data=data, batch_size=64, model=model, ema=("power(std=0.1)",)) | changes)


def total(found, kind, group=None):
    return sum(row.bytes for row in found.collectives if row.kind == kind and group in (None, row.group))


@pytest.mark.slow
def test_data_parallel_sums_the_gradient_once():
    found = plan(given(model=dict(name="mlp", width=WIDTH, depth=1)), "data=8")
    weights = 4 * found.parameters
    assert found.state == {
        "parameters": weights, "gradients": weights, "optimiser": pytest.approx(2 * weights, abs=8), "averages": weights
    }  # fmt: skip
    assert found.devices == found.rows == 8
    # Besides the gradient: a few sums that are logged.
    assert 0 <= total(found, "all-reduce") - weights < 256
    assert total(found, "all-gather") + total(found, "reduce-scatter") + total(found, "all-to-all") == 0


@pytest.mark.slow
def test_split_parameters_are_gathered_and_their_gradients_scattered():
    found = plan(given(), "data=2,fsdp=4,tensor=1", sharding="rules")
    biases = 4 * found.parameters - BLOCKS - REST - LABELS
    assert found.state["parameters"] == (BLOCKS + REST + LABELS) / 4 + biases
    # In a loop weights are gathered anew for the backward pass; outside it what was gathered is kept. XLA exchanges
    # the results of a product instead where they are smaller, as for the modulations (a sixth of the weights).
    assert 5 / 6 < total(found, "all-gather", 4) / (2 * BLOCKS + REST + LABELS) < 1.01
    scattered = total(found, "reduce-scatter", 4)
    assert 5 / 6 < scattered / (BLOCKS + REST) < 1.01
    assert total(found, "all-reduce", 2) == pytest.approx(scattered / 4, rel=1e-2)


ERROR = "raise RuntimeError('my own mistake\\nnote: of two lines')"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.often("error")
@pytest.mark.parametrize(
    "body, message",
    [
        (ERROR, "RuntimeError: my own mistake note: of two lines$"),
        (KILLED, "the process that compiles was ended by SIGKILL, as where memory runs out"),
        ("sys.stderr.close(); os._exit(3)", "exit code 3, and no message$"),
    ],
    ids=["error", "killed", "silent"],
)
def test_a_step_that_cannot_be_compiled_is_an_error_for_its_user(tmp_path, monkeypatch, body, message):
    # The network as such is sound, so that the checks of the config let it pass.
    code = f"""
import os, signal, sys, traceback
import jax.numpy as jnp
from diffjax.core import Model

def net(*, shape, num_classes):
    def apply(params, x, t, y, key=None):
        if any(frame.name == "trace_step" for frame in traceback.extract_stack()):
            {body}
        return x + params["b"]

    return Model(lambda key: {{"b": jnp.zeros(shape)}}, apply, {{}})
"""
    (tmp_path / "net_of_test_plan.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=f"--mesh=data=2: the step cannot be compiled for 2 devices: {message}"):
        plan(given(model=dict(name="net_of_test_plan:net")), "data=2")


@pytest.mark.slow
def test_a_block_that_is_computed_again_keeps_its_input():
    per_row, fixed = kept_activations(*prepare(given()))
    assert 0 <= fixed < BLOCKS + REST
    config, parts = prepare(given(model=dict(name="dit", patch=2, width=WIDTH, depth=DEPTH, heads=4, remat=True)))
    again, fixed = kept_activations(config, parts)
    # 64 tokens, and nothing else of two more blocks.
    deeper = prepare(given(model=dict(name="dit", patch=2, width=WIDTH, depth=DEPTH + 2, heads=4, remat=True)))
    assert kept_activations(*deeper)[0] - again == 2 * 4 * 64 * WIDTH
    assert again < per_row / 5


@pytest.mark.slow
def test_noise_paired_in_groups_is_planned_like_noise_that_is_not():
    paired = prepare(given(loss=dict(pairing="ot(group=16)")))
    assert kept_activations(*paired) == kept_activations(*prepare(given()))


def test_kept_activations_of_a_product():
    # The gradient of a sine is made of the cosine.
    from diffjax.core.types import Model

    config, parts = prepare(given())
    wide = 1024

    def apply(params, x, t, y, *, key=None, **_):
        return jnp.sin(x.reshape(len(x), -1) @ params["w"]).reshape(x.shape)

    init = lambda key: {"w": jax.random.normal(key, (wide, wide))}
    found = [
        kept_activations(config, parts._replace(model=Model(init, fn, {}, ())))[0]
        for fn in (apply, lambda params, x, t, y, **rest: jnp.sin(apply(params, x, t, y)))
    ]
    assert found[1] - found[0] == 4 * wide


def test_the_roofline_by_hand():
    state = {"parameters": 10e9, "gradients": 10e9, "optimiser": 20e9, "averages": 10e9}
    exchange = Collective("all-reduce", "f32", 8, 8, 1, 10e9)
    found = Plan({"data": 8}, "data", 64, 8, "bfloat16", 1, state, 30e9, 0.0, Flops(8e15, 8e15), (exchange,), 1.0)
    h200 = ACCELERATORS["h200"]
    time = estimate(found, h200)
    assert found.needed() == 80e9 and time.fits and not estimate(found, ACCELERATORS["tpu_v5e"]).fits
    assert time.compute == pytest.approx(1e15 / (0.5 * 989.4e12)) == time.step and time.bound == "compute"
    assert time.memory == pytest.approx((2 * 40e9 + 2 * 10e9 + 2 * 30e9) / (0.8 * 4800e9))
    assert time.link == pytest.approx(2 * 7 / 8 * 10e9 / (0.8 * 450e9))
    # Beyond one machine a GPU has its network adapter.
    far = found._replace(collectives=(exchange._replace(spread=16),))
    assert estimate(far, h200).link == pytest.approx(time.link * 450 / 50)
    text = plan_text(found, [h200, ACCELERATORS["tpu_v5e"]])
    assert "does not fit" in text and "all-reduce" in text and "H200" not in text and "h200" in text


@pytest.mark.parametrize("mesh", ["data=-1", "data=1024", "data=8,fsdp=0", ""])
def test_a_mesh_needs_its_sizes(mesh):
    with pytest.raises(ConfigError, match="a plan needs the size of every axis, at most 512"):
        plan(given(), mesh)


@pytest.mark.parametrize(
    "mesh, message",
    [
        ("data:2", "--mesh=data:2: cannot read mesh axis 'data:2'"),
        ("dat=8", "--mesh=dat=8: unknown mesh axis 'dat'; known: data, fsdp, tensor, sequence; did you mean 'data'"),
        ("data=3,tensor=2", "batch_size is 64; it must be a multiple of the 3 devices or groups"),
    ],
)
def test_what_needs_no_network_is_refused_without_one(monkeypatch, mesh, message):
    monkeypatch.delattr("subprocess.run")
    with pytest.raises(ConfigError, match=message):
        plan(given(), mesh)


def test_an_error_of_the_config_is_the_user_s(capsys):
    with pytest.raises(ConfigError, match="unknown key config.batchsize.*batch_size"):
        plan(ConfigDict(dict(batchsize=3)), "data=2")
    assert main(["inspect", "--config=configs/digits_mlp.py", "--accelerator=h200"]) == 2
    assert "--mesh=data=8" in capsys.readouterr().err
    assert main(["inspect", "--config=configs/digits_mlp.py", "--mesh=data=2", "--accelerator=h20"]) == 2
    assert "did you mean 'h200'" in capsys.readouterr().err
