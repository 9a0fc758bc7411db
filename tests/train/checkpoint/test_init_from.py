"""A run that starts from other parameters: which ones it gets, and what is refused."""

import io
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from diffjax.train import loop, paths
from diffjax.train.checkpoint.init_from import first_state_from, of_checkpoint, of_safetensors, save_params
from diffjax.train.errors import ConfigError
from diffjax.train.parallel import sharding
from diffjax.train.parts import prepare
from diffjax.train.state import abstract_state, init_state, load_run


def tiny(**changes):
    base = dict(
        data="digits()",
        batch_size=8,
        num_steps=3,
        log_every=1,
        checkpoint_every=3,
        ema=("decay(0.5)", "decay(0.9)"),
        model=dict(name="mlp", width=8, depth=1),
        optim=dict(name="adam", lr=1e-2),
    )
    return ConfigDict(base | changes)


def start(**changes):
    """The first state of a config, and its parts."""
    config, parts = prepare(tiny(**changes))
    mesh = sharding.make_mesh(sharding.parse_mesh(config.mesh))
    places = sharding.state_sharding(mesh, abstract_state(parts), parts.model.rules, config.sharding)
    return first_state_from(config, parts, places), parts


def named(tree):
    return {name: np.asarray(leaf) for name, leaf in paths.named_leaves(tree).items()}


def same(a, b):
    a, b = named(a), named(b)
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "source"
    loop.train(tiny(), str(folder), stream=io.StringIO())
    return folder


@pytest.mark.parametrize("ema, chosen", [("", "decay(0.5)"), ("decay(0.9)", "decay(0.9)"), ("raw", "raw")])
def test_a_workdir_gives_its_average_and_all_averages_start_there(trained, ema, chosen):
    state, parts = start(init_from=str(trained), init_ema=ema)
    wanted = load_run(str(trained), ema=chosen).params
    assert same(state.params, wanted) and all(same(average, wanted) for average in state.ema.values())
    assert int(state.step) == 0
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    # The step consumes the state, so no two of its leaves may be one buffer.
    assert len(set(buffers)) == len(buffers)
    assert not same(state.params, init_state(parts, jax.random.key(0)).params)


@pytest.mark.parametrize("kind", ["safetensors", "two files", "npz"])
def test_a_weight_folder_gives_what_it_holds(trained, tmp_path, kind):
    params = load_run(str(trained)).params
    arrays = named(params)
    if kind == "npz":
        np.savez(tmp_path / "weights.npz", **arrays)
    elif kind == "safetensors":
        assert save_params(tmp_path, params).parent == tmp_path
        # Read by the package's own reader, the names are ours.
        assert set(safetensors.numpy.load_file(tmp_path / "params.safetensors")) == set(arrays)
    else:
        names = sorted(arrays)
        for part in (names[::2], names[1::2]):
            safetensors.numpy.save_file(
                {name: arrays[name] for name in part}, tmp_path / f"{part[0][:3]}{len(part)}.safetensors"
            )
    assert same(start(init_from=str(tmp_path))[0].params, params)


def test_a_scalar_parameter_and_half_precision_survive(tmp_path):
    tree = {"a": {"scale": np.float32(3.0), "w": np.arange(6, dtype=np.float16).reshape(2, 3)}}
    loaded = safetensors.numpy.load_file(save_params(tmp_path, tree))
    assert loaded["a/scale"].shape == () and loaded["a/scale"] == 3 and loaded["a/w"].dtype == np.float16


def test_bfloat16_arrays_are_read_in_parts(tmp_path):
    # The upper halves of float32 numbers, laid out as the format says: length, JSON header, bytes.
    numbers = np.array([[1.0, -2.5, 3.0], [0.15625, 1e30, 6.0]], np.float32)
    upper = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    wanted = (upper.astype(np.uint32) << 16).view(np.float32)
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [4, 16]},
    }
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + np.ones(1, np.float32).tobytes() + upper.tobytes()
    (tmp_path / "a.safetensors").write_bytes(data)
    leaf = of_safetensors(tmp_path / "a.safetensors")["w"]
    np.testing.assert_array_equal(np.asarray(leaf.read((slice(1, 2), slice(None))), np.float32), wanted[1:2])


def test_what_does_not_fit_is_listed_and_allowed_only_by_rule(trained, tmp_path):
    params = named(load_run(str(trained)).params)
    changed = dict(params)
    gone, shaped = [name for name in params if name.startswith("out/")]
    changed.pop(gone)
    changed[shaped] = np.zeros((3, *params[shaped].shape), np.float32)
    changed["other/kernel"] = np.zeros(2, np.float32)
    np.savez(tmp_path / "w.npz", **changed)
    with pytest.raises(ConfigError) as error:
        start(init_from=str(tmp_path))
    for words in (f"1 missing: {gone}", "1 unexpected: other/kernel", f"1 of another shape: {shaped}"):
        assert words in str(error.value)
    rules = dict(init_from=str(tmp_path), init_missing=("^out/",))
    with pytest.raises(ConfigError, match="1 unexpected: other/kernel; 1 of another shape"):
        start(**rules)
    state, parts = start(**rules, init_ignore=("^other/", f"^{shaped}$"), seed=5)
    got, afresh = named(state.params), named(init_state(parts, jax.random.key(5)).params)
    for name in got:
        np.testing.assert_array_equal(got[name], afresh[name] if name.startswith("out/") else params[name])
    with pytest.raises(ConfigError, match="no array is used"):
        start(init_from=str(tmp_path), init_missing=("",), init_ignore=("",))


@pytest.mark.parametrize(
    "make, changes, words",
    [
        (None, dict(init_from="nowhere"), ["no such folder", "nowhere"]),
        ({}, {}, ["no run, and no .safetensors or .npz file"]),
        ({"a.npz": b"no zip"}, {}, ["a.npz cannot be read"]),
        ({"a.safetensors": b"short"}, {}, ["a.safetensors cannot be read"]),
        ({"a.npz": b"", "b.safetensors": b""}, {}, ["both .safetensors and .npz"]),
        ({"a.npz": None}, dict(init_ema="raw"), ["no workdir and has no averages"]),
        ({"a.npz": None}, dict(init_missing=("(",)), ["config.init_missing", "regular expressions"]),
        ({"a.npz": None, "b.npz": None}, {}, ["another file has too: x"]),
    ],
)
def test_a_wrong_source_is_one_clear_error(tmp_path, make, changes, words):
    for name, content in (make or {}).items():
        if content is None:
            np.savez(tmp_path / name, x=np.zeros(2))
        else:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        start(**dict(init_from=str(tmp_path)) | changes)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda a: np.concatenate([a, a[:1]]), r"1 of another shape: proj_out_2.bias \[5\] instead of \[4\]"),
        (lambda a: a[:-1], r"1 of another shape: proj_out_2.bias \[3\] instead of \[4\]"),
        (lambda a: a.astype(np.int32), "1 of another type: proj_out_2.bias int32 instead of float32"),
    ],
    ids=["larger", "smaller", "integers"],
)
def test_a_checkpoint_folder_holds_its_network(tmp_path, change, words):
    from diffjax.convert import save
    from diffjax.models import from_config

    config = {
        "_class_name": "DiTTransformer2DModel", "num_attention_heads": 1, "attention_head_dim": 4, "num_layers": 1,
        "sample_size": 4, "in_channels": 1, "out_channels": 1, "num_embeds_ada_norm": 2,
    }  # fmt: skip
    model = from_config(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    save(model, jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes), tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    # A smaller one lies in front of the others, so that their bytes follow it.
    arrays["proj_out_2.bias"] = change(arrays["proj_out_2.bias"])
    safetensors.numpy.save_file(arrays, file)
    with pytest.raises(ConfigError, match=f"config.init_from: .*: not the parameters of its DiT.*Model: {words}"):
        of_checkpoint(tmp_path)
    del arrays["proj_out_2.bias"]
    safetensors.numpy.save_file(arrays, file)
    # What is missing may be left to start afresh.
    found = of_checkpoint(tmp_path)
    assert "proj_out_2/kernel" in found and "proj_out_2/bias" not in found


def test_a_resumed_run_does_not_need_its_source_and_records_it(trained, tmp_path):
    source, workdir = tmp_path / "source", tmp_path / "run"
    save_params(source, load_run(str(trained)).params)
    config = tiny(init_from=str(source), stop_at=2)
    loop.train(config, str(workdir), stream=io.StringIO())
    (source / "params.safetensors").unlink()
    source.rmdir()
    config.stop_at = 0
    assert loop.train(config, str(workdir), stream=io.StringIO()).step == 3
    assert load_run(str(workdir)).config.init_from == str(source)
    with pytest.raises(ConfigError, match="no such folder"):
        loop.train(config, str(tmp_path / "other"), stream=io.StringIO())
    assert not (tmp_path / "other" / "config.json").exists()
