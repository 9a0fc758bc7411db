"""The official DiT and SiT: the network here with their parameters is theirs, and the way back keeps every bit."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from compare import TOLERANCE, close_gradient

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.official_dit import load_official_dit, positions, save_official_dit
from diffjax.convert.weights.tensors import Source, read_header, write
from diffjax.models import MODELS, preset
from diffjax.nn.functional import names_of
from diffjax.registry import build

GOLDEN = Path(__file__).parent.parent / "parity" / "golden" / "official_dit.npz"
LIVE = os.environ.get("DIFFJAX_PARITY")
RUNS = sorted(Path(LIVE, "official_dit").glob("*.npz")) if LIVE else []


def save(path, arrays):
    write(path, {k: Source(v.dtype, v.shape, lambda v=v: v) for k, v in arrays.items()}, {"format": "pt"})


@pytest.fixture(scope="module")
def run():
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def arrays(run):
    facts = json.loads(str(run["facts"]))
    names = {name.partition("/")[2]: value.shape for name, value in run.items() if name.startswith("gradient/")}
    side = facts["input_size"] // facts["patch_size"]
    drawn = {name: networks.weight(name, shape) for name, shape in names.items()}
    return drawn | {"pos_embed": positions(side, facts["hidden_size"])[None]}


@pytest.fixture(scope="module")
def file(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("dit") / "dit.safetensors"
    save(path, arrays)
    return path


def check(path, run, tmp_path):
    """Output, gradients and bytes of one run."""
    facts = json.loads(str(run["facts"]))
    model, params = load_official_dit(path, heads=facts["num_heads"])
    given = [run[f"in/{name}"] for name in "xty"]

    def total(params):
        out = model.apply(params, *given)
        return jnp.sum(out * run["probe"]), out

    gradients, out = jax.jit(jax.grad(total, has_aux=True))(params)
    assert np.std(run["out"]) > 1e-3
    assert "diffusers" in run or facts.get("mlp_ratio", 4.0) != 4.0
    for truth in run.keys() & {"out", "diffusers"}:
        np.testing.assert_allclose(out, run[truth], **TOLERANCE)
    save_official_dit(model, gradients, tmp_path / "gradients.safetensors")
    for name, value in read_header(tmp_path / "gradients.safetensors")[0].items():
        if name != "pos_embed":
            close_gradient(value.part(), run[f"gradient/{name}"], name, run[f"rounding/{name}"])
    save_official_dit(model, params, tmp_path / "again.safetensors")
    ours, theirs = (read_header(where)[0] for where in (tmp_path / "again.safetensors", path))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].part().tobytes() == tensor.part().tobytes(), name


def test_output_gradients_and_bytes_are_those_of_pytorch(run, file, tmp_path):
    check(file, run, tmp_path)


@pytest.mark.skipif(not LIVE, reason="`make parity` records random networks and sets DIFFJAX_PARITY")
def test_live_runs_are_there():
    assert RUNS


@pytest.mark.skipif(not LIVE, reason="tests/parity/official_dit.py records random networks, DIFFJAX_PARITY names them")
@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_live_run_is_that_of_pytorch(path, tmp_path):
    check(path.with_suffix(".safetensors"), dict(np.load(path)), tmp_path)


@pytest.mark.parametrize("name, millions", [("s", 33), ("b", 130), ("l", 458), ("xl", 675)])
def test_sizes_of_the_paper(name, millions):
    settings = dict(shape=(32, 32, 4), num_classes=1000, extra_out=4, time_scale=1.0)
    model = build(preset(f"dit_{name}_2"), MODELS, "model", **settings)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6) == millions
    # What the released code prints counts the positions.
    assert name != "xl" or count + 256 * 1152 == 675_129_632


def test_positions_may_be_left_out_and_no_other_tensor(arrays, tmp_path):
    bare = {name: value for name, value in arrays.items() if name != "pos_embed"}
    save(tmp_path / "a.safetensors", bare)
    model, _ = load_official_dit(tmp_path / "a.safetensors", heads=2)
    assert model.config["shape"] == (32, 32, 3)
    del bare["blocks.1.attn.proj.bias"]
    save(tmp_path / "b.safetensors", bare | {"extra": np.zeros(2)})
    with pytest.raises(WeightsError, match="1 missing: blocks.1.attn.proj.bias; 1 unexpected: extra"):
        load_official_dit(tmp_path / "b.safetensors", heads=2)


def test_what_is_no_official_network(arrays, file, tmp_path):
    with pytest.raises(WeightsError, match="width 16 is none of the paper's"):
        load_official_dit(file)
    save(tmp_path / "a.safetensors", arrays | {"pos_embed": np.zeros_like(arrays["pos_embed"])})
    with pytest.raises(WeightsError, match="pos_embed is not that of sines and cosines"):
        load_official_dit(tmp_path / "a.safetensors", heads=2)
    save(tmp_path / "b.safetensors", {"weight": np.zeros(2)})
    with pytest.raises(WeightsError, match="not an official DiT"):
        load_official_dit(tmp_path / "b.safetensors")
    model = MODELS["dit"](shape=(8, 8, 3), num_classes=5, width=16, depth=1, heads=2)
    with pytest.raises(WeightsError, match="the official DiT has no time_scale=1000.0"):
        save_official_dit(model, {}, tmp_path / "c.safetensors")


def test_parameters_lie_where_they_are_asked_to(file):
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("a",))
    last = lambda leaf: jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), "a")
    split = lambda model, shapes: jax.tree.map(lambda leaf: jax.sharding.NamedSharding(mesh, last(leaf)), shapes)
    model, plain = load_official_dit(file, heads=2)
    _, params = load_official_dit(file, heads=2, sharding=split, param_dtype="bfloat16")
    for name, leaf in names_of(params).items():
        assert leaf.dtype == jnp.bfloat16 and len(leaf.sharding.device_set) == len(devices)
        np.testing.assert_array_equal(leaf, names_of(plain)[name].astype(jnp.bfloat16), err_msg=name)


WRONG = {
    "int8": (lambda t: t, dict(param_dtype="int8"), "param_dtype='int8': expected a type of floating point"),
    "bf16": (lambda t: t, dict(param_dtype="bf16"), "param_dtype='bf16': expected a type of floating point"),
    "far": (
        lambda t: t | {"blocks.1000000000000.attn.qkv.weight": t["blocks.0.attn.qkv.weight"]}, {},
        "10 missing: blocks.2.adaLN_.*; 1 unexpected: blocks.1000000000000.attn",
    ),
    "square": (
        lambda t: {k.replace("blocks.1", "blocks.\u00b2"): v for k, v in t.items()}, {},
        "10 unexpected: blocks.\u00b2.adaLN_modulation.1.bias",
    ),
    "empty": (
        lambda t: t | {"x_embedder.proj.weight": np.zeros((16, 3, 0, 0))}, {}, "the shape .16, 3, 0, 0., of no numbers"
    ),
    "vector": (lambda t: t | {"blocks.0.mlp.fc1.weight": np.zeros(2)}, {}, "not an official DiT: not enough values"),
    "whole": (
        lambda t: t | {"blocks.0.mlp.fc1.weight": t["blocks.0.mlp.fc1.weight"].astype(np.int32)}, {},
        "1 of another type: blocks.0.mlp.up.weight int32 instead of float32",
    ),
    "heads": (lambda t: t, dict(heads=3), "dit.safetensors: dit: heads=3 does not divide"),
    "oblong": (
        lambda t: t | {"x_embedder.proj.weight": np.zeros((16, 3, 2, 4), np.float32)}, {},
        r"x_embedder.proj.weight .16, 3, 2, 4. instead of .16, 3, 2, 2.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_refused(name, arrays, tmp_path):
    change, settings, message = WRONG[name]
    save(tmp_path / "dit.safetensors", change(arrays))
    with pytest.raises(ValueError, match=message):
        load_official_dit(tmp_path / "dit.safetensors", **{"heads": 2, **settings})
