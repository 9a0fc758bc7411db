import json
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from diffjax.train.parallel.sharding import (
    batch_sharding,
    make_mesh,
    param_sharding,
    parse_mesh,
    place_batch,
    state_sharding,
)


class State(NamedTuple):
    params: Any
    rest: Any


# One process with 8 CPU devices does all the work and prints one JSON object; the tests read it.
SCRIPT = """
import json, sys, tempfile
from typing import Any, NamedTuple
import jax, jax.numpy as jnp, numpy as np, optax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
from diffjax.train.checkpoint import open_checkpoints
from diffjax.train.parallel.sharding import batch_sharding, make_mesh, place, place_batch, state_sharding

class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    opt_state: Any

optimizer = optax.adam(1e-2)

def init():
    k = jax.random.split(jax.random.key(0), 3)
    params = {
        "in": {"kernel": 0.3 * jax.random.normal(k[0], (6, 32)), "bias": jnp.zeros(32)},
        "out": {"kernel": 0.3 * jax.random.normal(k[1], (32, 3)), "bias": jnp.zeros(3)},
        "scale": jnp.float32(1),
    }
    return State(jnp.int32(0), params, {"power(std=0.1)": jax.tree.map(jnp.copy, params)}, optimizer.init(params))

def step(state, batch):
    def loss(p):
        h = jnp.tanh(batch["x"] @ p["in"]["kernel"] + p["in"]["bias"])
        return jnp.mean((p["scale"] * h @ p["out"]["kernel"] + p["out"]["bias"] - batch["y"]) ** 2)
    updates, opt_state = optimizer.update(jax.grad(loss)(state.params), state.opt_state)
    params = optax.apply_updates(state.params, updates)
    ema = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, state.ema, {"power(std=0.1)": params})
    return State(state.step + 1, params, ema, opt_state)

rng = np.random.default_rng(0)
batches = [{"x": rng.normal(size=(16, 6)).astype("f"), "y": rng.normal(size=(16, 3)).astype("f")} for _ in range(5)]

def train(mesh, rules, mode):
    where = state_sharding(mesh, jax.eval_shape(init), rules, mode)
    fn = jax.jit(step, in_shardings=(where, batch_sharding(mesh)), out_shardings=where, donate_argnums=0)
    state = place(init(), where)
    for batch in batches:
        state = fn(state, place_batch(batch, mesh))
    return state

def specs(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): list(l.sharding.spec) for p, l in leaves}

def apart(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)

alone = make_mesh(devices=jax.devices()[:1])
truth = train(alone, (), "data")
grid = make_mesh({"data": 2, "tensor": -1})
rules = [("in/kernel", (None, "tensor")), ("out/kernel", ("tensor", "data")), (".*", ())]
runs = {
    "data": train(make_mesh(), (), "data"),
    "fsdp": train(make_mesh(), (), "fsdp"),
    "rules": train(grid, rules, "rules"),
}
out = {"moved": apart(truth.params, init().params), "grid": dict(grid.shape)}
for name, state in runs.items():
    out[name] = {"apart": apart(truth, state), "specs": specs(state)}
bytes_on = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
out["bytes_on_one_device"] = {name: bytes_on(state.params) for name, state in runs.items()}

with tempfile.TemporaryDirectory() as folder:
    checkpoints = open_checkpoints(folder)
    checkpoints.save(5, runs["fsdp"])
    back = {}
    for name, mesh, mode in [("alone", alone, "data"), ("fsdp", make_mesh(), "fsdp"), ("rules", grid, "rules")]:
        abstract = jax.eval_shape(init)
        like = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract,
            state_sharding(mesh, abstract, rules, mode),
        )
        _, state = checkpoints.restore(like)
        same = all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like)))
        back[name] = {"apart": apart(state, runs["fsdp"]), "placed": same}
    checkpoints.close()
out["restored"] = back
try:
    place_batch({"x": np.zeros((12, 6))}, make_mesh())
except ValueError as error:
    out["odd_batch"] = str(error)
print(json.dumps(out))
"""


# The same of whole training steps, which take minutes to compile for eight devices.
NETWORK_SCRIPT = """
import json, sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
from ml_collections import ConfigDict
from diffjax.train.parts import prepare
from diffjax.train.setup import compile_step
from diffjax.train.state import init_state
from diffjax.train.parallel.sharding import make_mesh, parse_mesh, place, state_sharding

NETWORKS = {
    "unet": dict(name="unet", width=8, mults=(1, 2), blocks=1, attention=(4,), head_width=8, groups=4, dropout=0.1),
    "dit": dict(name="dit", patch=4, width=16, depth=2, heads=2, mlp_ratio=2.0, dropout=0.1),
}
KINDS = {"one": ("", "data"), "data": ("", "data"), "fsdp": ("", "fsdp"), "rules": ("data=2,fsdp=2,tensor=2", "rules")}

alone = make_mesh(devices=jax.devices()[:1])

def apart(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)

def train_network(network, mesh, mode, one):
    sgd = dict(name="sgd", lr=0.1, b1=0.0, clip=1.0)
    given = dict(batch_size=16, num_steps=3, model=NETWORKS[network], optim=sgd, mesh=mesh, sharding=mode)
    config, parts = prepare(ConfigDict(given))
    mesh = alone if one else make_mesh(parse_mesh(config.mesh))
    # The initial output is zero, and so are most gradients: noise on the parameters makes every layer count.
    state = jax.jit(lambda key: init_state(parts, key))(jax.random.key(0))
    noise = lambda p, i: p + 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(1), i), p.shape)
    leaves, tree = jax.tree.flatten(state.params)
    state = state._replace(params=tree.unflatten([noise(p, i) for i, p in enumerate(leaves)]))
    start = jax.tree.map(np.asarray, state.params)
    where = state_sharding(mesh, state, parts.model.rules, config.sharding)
    step_fn, empty, _ = compile_step(config, parts, mesh, where)
    state, window = place(state, where), empty()
    for i in range(3):
        items = parts.dataset.train[16 * i : 16 * (i + 1)]
        state, window = step_fn(state, window, dict(items))
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    return start, state.params, split, float(window.loss)

out = {}
for network in sys.argv[1:]:
    runs = {kind: train_network(network, *how, kind == "one") for kind, how in KINDS.items()}
    start, truth, _, loss = runs.pop("one")
    out[network] = {"moved": apart(start, truth), "loss": loss}
    for kind, (_, params, split, other) in runs.items():
        out[network][kind] = {"apart": apart(truth, params), "split": split, "loss": other}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight():
    return run(SCRIPT)


@pytest.fixture(scope="module", params=["unet", "dit"])
def network(request):
    return run(NETWORK_SCRIPT, request.param)[request.param]


def run(script, *args):
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data", "fsdp", "rules"])
def test_eight_devices_train_as_one(eight, mode):
    # Sums over the batch are added in another order: float32 rounding of values near 1, over 5 steps of Adam.
    assert eight[mode]["apart"] < 1e-6 < 1e-2 < eight["moved"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["data", "fsdp", "rules"])
def test_eight_devices_train_a_network_as_one(network, mode):
    # Sums over the batch and over split axes are added in another order: 1e-5 is some 80 units in the last place at 1,
    # through 3 steps of SGD, which keeps errors as they are where Adam would divide them by small second moments.
    kind = network[mode]
    assert kind["apart"] < 1e-5 < 1e-2 < network["moved"]
    assert kind["loss"] == pytest.approx(network["loss"], rel=1e-5)
    assert (kind["split"] == 0) == (mode == "data")


def test_mesh_text():
    assert parse_mesh("") is None and parse_mesh(" data=2, fsdp=-1") == {"data": 2, "fsdp": -1}
    for text in ("data", "data=x", "=2", "data=2,data=2", "data=2,"):
        with pytest.raises(ValueError, match="cannot read mesh axis"):
            parse_mesh(text)


def test_data_mode_copies_and_fsdp_splits(eight):
    assert all(not spec for spec in eight["data"]["specs"].values())
    specs = eight["fsdp"]["specs"]
    assert specs["params/in/kernel"] == [None, "data"]
    assert specs["params/out/kernel"] == ["data"]
    assert specs["params/out/bias"] == specs["params/scale"] == specs["step"] == []
    # in: 6 * 32 + 32, out: 32 * 3 are split 8 ways; the bias of 3 and the scalar are copied; 4 bytes each.
    assert eight["bytes_on_one_device"] == {
        "data": 4 * (192 + 32 + 96 + 3 + 1),
        "fsdp": 4 * ((192 + 32 + 96) // 8 + 3 + 1),
        "rules": 4 * (192 // 4 + 32 + 96 // 4 + 3 + 1),
    }


@pytest.mark.parametrize("mode", ["fsdp", "rules"])
def test_averages_and_moments_follow_their_parameter(eight, mode):
    specs = eight[mode]["specs"]
    for name in ("in/kernel", "in/bias", "out/kernel", "out/bias"):
        for tree in ("ema/power(std=0.1)", "opt_state/0/mu", "opt_state/0/nu"):
            assert specs[f"{tree}/{name}"] == specs[f"params/{name}"]
    assert specs["opt_state/0/count"] == []


def test_a_rule_that_does_not_divide_is_dropped_on_its_axis_alone(eight):
    # The kernel is [32, 3], the rule ("tensor", "data"): 4 divides 32, 2 does not divide 3.
    assert eight["grid"] == {"data": 2, "tensor": 4}
    assert eight["rules"]["specs"]["params/out/kernel"] == ["tensor", None]


def test_a_checkpoint_moves_between_meshes(eight):
    assert eight["restored"] == {name: {"apart": 0.0, "placed": True} for name in ("alone", "fsdp", "rules")}


def test_a_batch_must_divide(eight):
    assert "12 rows does not divide over 8 devices" in eight["odd_batch"]


def test_mesh_axes_are_auto_and_must_fit():
    mesh = make_mesh({"data": -1, "tensor": 1}, devices=jax.devices()[:1])
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto) and dict(mesh.shape) == {"data": 1, "tensor": 1}
    for axes in ({"data": 3}, {"data": -1, "tensor": 7}, {"data": -1, "tensor": -1}, {"data": 0}):
        with pytest.raises(ValueError, match="do not fit 1 devices"):
            make_mesh(axes, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="unknown mesh axis 'fsdq'; known: data, fsdp.*did you mean 'fsdp'"):
        make_mesh({"fsdq": -1})
    with pytest.raises(ValueError, match="mesh axes 'fsdp=8': expected sizes by name, as `parse_mesh`"):
        make_mesh("fsdp=8")


def test_rules_cover_every_parameter():
    mesh = make_mesh(devices=jax.devices()[:1])
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "b": jnp.ones(2)}
    with pytest.raises(ValueError, match="no sharding rule covers a/bias, b;"):
        param_sharding(mesh, params, [("kernel", ("data",))], "rules")
    with pytest.raises(ValueError, match="unknown mesh axis 'dta'; known: data; did you mean 'data'"):
        param_sharding(mesh, params, [(".*", ("dta",))], "rules")
    with pytest.raises(ValueError, match=r"'a/bias' has 2 axes .*shape is \(2,\)"):
        param_sharding(mesh, params, [(".*", (None, "data"))], "rules")
    with pytest.raises(ValueError, match="'fdsp'; known: data, fsdp, rules, pmap; did you mean 'fsdp'"):
        param_sharding(mesh, params, mode="fdsp")


def test_the_longest_name_with_the_same_shape_decides():
    mesh = make_mesh({"data": 1, "tensor": 1}, devices=jax.devices()[:1])
    params = {"kernel": jnp.ones((4, 4)), "in": {"kernel": jnp.ones((4, 4))}}
    state = State(params, {"mu": params, "factored": {"in": {"kernel": jnp.ones(4)}}})
    rules = [("in/kernel", ("tensor",)), ("kernel", (None, "data"))]
    found = state_sharding(mesh, state, rules, "rules").rest
    assert found["mu"]["in"]["kernel"].spec == P("tensor") and found["mu"]["kernel"].spec == P(None, "data")
    assert found["factored"]["in"]["kernel"].spec == P()
    assert batch_sharding(mesh).spec == P(("data",))


def test_a_batch_keeps_its_values():
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = place_batch({"image": jnp.arange(6.0).reshape(3, 2)}, mesh)
    assert batch["image"].tolist() == [[0, 1], [2, 3], [4, 5]]
