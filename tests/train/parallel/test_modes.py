"""What configs may ask of eight devices, and where activations and optimiser states then lie."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, jax, jax.numpy as jnp, optax
from typing import Any, NamedTuple
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
from ml_collections import ConfigDict
from diffjax.train.errors import ConfigError
from diffjax.train.parallel.activations import constraint
from diffjax.train.parallel.mesh import batch_groups, batch_sharding, make_mesh, parse_mesh, place_batch
from diffjax.train.parallel.sharding import state_sharding
from diffjax.train.parts import prepare

DIT = dict(name="dit", patch=2, width=16, depth=1, heads=4, mlp_ratio=2.0)
UNET = dict(name="unet", width=8, mults=(1, 2), blocks=1, attention=(4,), head_width=4, groups=2)
MLP = dict(name="mlp", width=16, depth=1)
SIZES = dict(_class_name="DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=4, num_layers=1)
PUBLISHED = dict(name="checkpoint", network=SIZES)
CASES = {
    "tensor groups share rows": dict(model=DIT, mesh="data=2,tensor=4", sharding="rules", batch_size=2),
    "one group": dict(model=DIT, mesh="tensor=4,sequence=2", sharding="rules", batch_size=1),
    "sequence and copies": dict(model=DIT, mesh="data=2,sequence=4", batch_size=2),
    "batch": dict(model=DIT, mesh="data=2,fsdp=2,tensor=2", sharding="rules", batch_size=6),
    "microbatch": dict(model=DIT, mesh="data=2,fsdp=2,tensor=2", sharding="rules", batch_size=16, microbatch=3),
    "sequence of a U-Net": dict(model=UNET, mesh="data=4,sequence=2", batch_size=8),
    "sequence of a perceptron": dict(model=MLP, mesh="data=4,sequence=2", batch_size=8),
    "sequence with cuDNN": dict(
        model=DIT | dict(width=32, dtype="bfloat16", attention_impl="cudnn"), mesh="data=4,sequence=2", batch_size=8
    ),
    "splash on several devices": dict(model=DIT | dict(attention_impl="splash"), mesh="data=8", batch_size=8),
    "splash of a checkpoint": dict(model=PUBLISHED | dict(attention_impl="splash"), mesh="data=8", batch_size=8),
    "tokens": dict(model=DIT | dict(patch=4), mesh="sequence=8", batch_size=8),
    "tensor without rules": dict(model=MLP, mesh="data=4,tensor=2", batch_size=8),
    "pmap with tensor": dict(model=MLP, mesh="data=4,tensor=2", sharding="pmap", batch_size=8),
    "pmap with fsdp": dict(model=MLP, mesh="data=4,fsdp=2", sharding="pmap", batch_size=8),
    "rules without axes": dict(model=MLP, sharding="rules", batch_size=8),
}

def verdict(case):
    try:
        prepare(ConfigDict(case))
        return ""
    except ConfigError as error:
        return str(error)

out = {"configs": {name: verdict(case) for name, case in CASES.items()}}

mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
rules = [("q$", ("batch", "sequence", "tensor")), ("odd$", ("batch", "tensor")), ("labels", ())]
place = constraint(mesh, rules)
specs = {}
for name, shape in {"q": (4, 6, 8, 2), "odd": (4, 7), "labels": (3, 2)}.items():
    x = jax.device_put(jnp.zeros(shape), jax.devices()[0])
    spec = jax.jit(lambda x: place(name, x))(jnp.zeros(shape)).sharding.spec
    specs[name] = [list(group) if isinstance(group, tuple) else group for group in spec]
out["activations"] = specs
out["unnamed"] = place("other", 3)
laid = [str(batch_sharding(m).spec) for m in (mesh, make_mesh({"tensor": 8}))]
out["groups"] = [batch_groups(mesh.shape), *laid]
shards = place_batch({"x": jnp.arange(8.0)}, mesh)["x"].addressable_shards
out["rows"] = sorted(shard.data.tolist() for shard in shards)

class State(NamedTuple):
    params: Any
    opt_state: Any

params = {"a": {"kernel": jnp.zeros((256, 128))}, "square": jnp.zeros((128, 128)), "bias": jnp.zeros(128)}
param_rules = [("kernel", ("fsdp", "tensor")), ("square", ("fsdp", "tensor")), ("bias", ("tensor",))]

def where(optimizer):
    state = State(params, optimizer.init(params))
    tree = state_sharding(mesh, state, param_rules, "rules").opt_state
    found = jax.tree_util.tree_leaves_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): str(leaf.spec) for path, leaf in found}

out["adafactor"] = where(optax.scale_by_factored_rms(min_dim_size_to_factor=64))
out["schedule free"] = where(optax.contrib.schedule_free(optax.sgd(0.1), learning_rate=0.1))
out["muon"] = where(optax.contrib.muon(0.1))
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["tensor groups share rows", "one group", "sequence and copies"])
def test_the_batch_divides_over_data_and_fsdp_alone(eight, case):
    assert eight["configs"][case] == ""


@pytest.mark.parametrize(
    "case, parts",
    [
        ("batch", ["config.batch_size is 6", "multiple of the 4 devices or groups", "--config.batch_size=VALUE"]),
        ("microbatch", ["config.microbatch is 3", "divide the 4 rows that each of 4 groups", "16"]),
        (
            "sequence of a U-Net",
            ["'unet' is split over 'sequence'", "only transformers, such as 'dit'", "'data' or 'fsdp'"],
        ),
        ("sequence of a perceptron", ["'mlp' is split over 'sequence'"]),
        ("sequence with cuDNN", ["cuDNN's attention takes the whole sequence", "attention_impl='xla'"]),
        ("splash on several devices", ["splash attention is a kernel of one device", "sharding='pmap'"]),
        ("splash of a checkpoint", ["splash attention is a kernel of one device", "attention_impl='chunked'"]),
        ("tokens", ["4 tokens in 'tokens' do not divide over 8 devices along 'sequence'"]),
        ("tensor without rules", ["config.sharding is 'data'", "'mlp' is split over 'tensor'", "take 'rules'"]),
        ("pmap with tensor", ["config.sharding is 'pmap'", "split over 'tensor'"]),
        ("pmap with fsdp", ["config.sharding is 'pmap'", "one process", "'data=-1'"]),
        ("rules without axes", ["config.mesh is ''", "name none of the axes data", "'data=2,fsdp=2,tensor=2'"]),
    ],
)
def test_what_would_waste_devices_is_refused(eight, case, parts):
    assert all(part in eight["configs"][case] for part in parts), eight["configs"][case]


def test_activations_follow_their_rules(eight):
    # The mesh has no sequence axis; 2 does not divide 7; no entry means whole.
    assert eight["activations"]["q"] == [["data", "fsdp"], None, "tensor"]
    assert eight["activations"]["odd"] == [["data", "fsdp"]]
    assert eight["activations"]["labels"] == []
    assert eight["unnamed"] == 3


def test_groups_and_their_rows(eight):
    assert eight["groups"] == [4, "P(('data', 'fsdp'),)", "P(None,)"]
    # Both devices of a group along `tensor` hold the group's rows.
    assert eight["rows"] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]


def test_optimiser_states_follow_their_parameters(eight):
    # Row and column statistics of [256, 128] lack one axis and keep the split of the other; an unused [1] is copied.
    factored = {name: spec for name, spec in eight["adafactor"].items() if "kernel" in name}
    assert set(factored.values()) == {"P('fsdp',)", "P('tensor',)", "P()"}, factored
    # Rows and columns of a square cannot be told apart.
    assert {spec for name, spec in eight["adafactor"].items() if "square" in name} == {"P()"}
    assert eight["schedule free"]["z/a/kernel"] == "P('fsdp', 'tensor')"
    moments = {spec for name, spec in eight["muon"].items() if "a/kernel" in name}
    assert moments == {"P('fsdp', 'tensor')"}, eight["muon"]
