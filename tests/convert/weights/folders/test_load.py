"""Folders of weights: what is found, what is loaded, what is refused and with which words."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.convert import load, save
from diffjax.convert.weights import WeightsError, survey
from diffjax.convert.weights.folders import find as finding
from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.tensors import Source, read_header, write
from diffjax.convert.weights.tensors import read as reading
from diffjax.models import from_config

CONFIG = {
    "_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3,
    "sample_size": 8, "num_embeds_ada_norm": 5, "out_channels": 8,
}  # fmt: skip
ONE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def network():
    model = from_config(CONFIG)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def written(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    save(*network, folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "unet")


def sharded(network, folder):
    """The same network in several files; the names of these."""
    save(*network, folder, shard_bytes=20_000)
    return sorted(path.name for path in folder.glob("*-of-*.safetensors"))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def rewrite(path, change):
    """The file again with its tensors, `{name: array}`, as `change` leaves them."""
    arrays = {name: tensor.part() for name, tensor in read_header(path)[0].items()}
    change(arrays)
    write(path, {k: Source.of(a) for k, a in arrays.items()}, {})


def set_index(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_folder_comes_back_as_it_was(network, folder):
    model, params = load(folder)
    same(params, network[1])
    assert model.config == CONFIG and sorted(p.name for p in folder.iterdir()) == ["config.json", ONE]
    same(load(folder / ONE)[1], params)
    same(load(str(folder / ONE), config=CONFIG)[1], params)


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_variants_lie_beside_each_other(network, folder, variant):
    model, params = network
    save(model, params, folder, dtype="bfloat16", variant=variant)
    save(model, params, folder / "parts", dtype="bfloat16", variant=variant, shard_bytes=9_000)
    assert (folder / f"diffusion_pytorch_model.{variant}.safetensors").is_file()
    assert (folder / "parts" / f"diffusion_pytorch_model.safetensors.index.{variant}.json").is_file()
    half = load(folder, variant=variant)[1]
    same(half, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params))
    same(load(folder / "parts", variant=variant)[1], half)
    same(load(folder)[1], params)
    with pytest.raises(WeightsError, match=f"no weights without a variant; .* it has .*{variant}-00001-of-"):
        load(folder / "parts")
    with pytest.raises(WeightsError, match=f"no weights with variant 'fp8'; .* it has .*{variant}.safetensors"):
        load(folder, variant="fp8")


def test_each_difference_is_listed_and_all_at_once(folder):
    def change(arrays):
        arrays["more"] = arrays.pop("proj_out_1.bias")
        arrays["proj_out_2.weight"] = arrays["proj_out_2.weight"].T
        arrays["pos_embed.proj.bias"] = arrays["pos_embed.proj.bias"].astype(np.int32)
        for i in range(3):
            del arrays[f"transformer_blocks.{i}.attn1.to_q.bias"], arrays[f"transformer_blocks.{i}.attn1.to_k.bias"]

    rewrite(folder / ONE, change)
    with pytest.raises(WeightsError) as error:
        load(folder)
    for words in (
        f"{folder}: not the parameters of its DiTTransformer2DModel: 7 missing: proj_out_1.bias, ",
        "transformer_blocks.0.attn1.to_k.bias",
        " and 2 more; 1 unexpected: more; 1 of another shape: proj_out_2.weight [16, 32] instead of [32, 16]; ",
        "1 of another type: pos_embed.proj.bias int32 instead of float32",
    ):
        assert words in str(error.value)


def test_names_that_fill_a_page_are_cut(folder):
    rewrite(folder / ONE, lambda arrays: arrays.update({"n" * 100_000: np.zeros(2)}))
    with pytest.raises(WeightsError, match="1 unexpected: nnn") as error:
        load(folder)
    assert len(str(error.value)) < 1000


def test_types_are_kept_and_cast_on_request(network, folder):
    def change(arrays):
        arrays["proj_out_1.bias"] = arrays["proj_out_1.bias"].astype(np.float16)
        arrays["proj_out_2.bias"] = arrays["proj_out_2.bias"].astype(jnp.bfloat16)
        arrays["pos_embed.proj.bias"] = arrays["pos_embed.proj.bias"].astype(np.float64)
        for i, dtype in enumerate((np.float16, jnp.bfloat16, jnp.bfloat16)):
            name = f"transformer_blocks.{i}.ff.net.2.bias"
            arrays[name] = arrays[name].astype(dtype)

    rewrite(folder / ONE, change)
    params = load(folder)[1]
    assert params["proj_out_1"]["bias"].dtype == jnp.float16 and params["proj_out_2"]["bias"].dtype == jnp.bfloat16
    # float64 is float32 in JAX; neither of the two halves holds the other's values.
    assert params["pos_embed"]["proj"]["bias"].dtype == jnp.float32
    bias = params["transformer_blocks"]["0:3"]["ff"]["net"]["2"]["bias"]
    truth = network[1]["transformer_blocks"]["0:3"]["ff"]["net"]["2"]["bias"]
    assert bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[0], truth[0].astype(np.float16))
    np.testing.assert_array_equal(bias[1:], truth[1:].astype(jnp.bfloat16).astype(np.float32))
    half = load(folder, param_dtype="bfloat16")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    with jax.enable_x64(True):
        assert load(folder)[1]["pos_embed"]["proj"]["bias"].dtype == jnp.float64


def test_types_that_are_none_of_floating_point(network, folder, tmp_path):
    for dtype in ("bfloat17", "int8", "", "M8", object()):
        with pytest.raises(ValueError, match="param_dtype=.*: expected a type of floating point"):
            load(folder, param_dtype=dtype)
        with pytest.raises(ValueError, match="^dtype=.*: expected a type of floating point"):
            save(*network, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
    same(load(folder, param_dtype=jnp.float32)[1], network[1])


def test_what_is_loaded_can_be_given_away(network, folder):
    # On a CPU the arrays are the memory that was read into.
    params = load(folder)[1]
    kept = jax.tree.map(lambda a: np.array(a), params)
    out = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)(params)
    same(out, jax.tree.map(lambda a: a + 1, kept))
    same(load(folder)[1], kept)


def test_values_are_taken_as_they_are(network, tmp_path):
    params = jax.tree.map(lambda a: np.full_like(a, np.nan), network[1])
    save(network[0], params, tmp_path)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(load(tmp_path)[1]))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt", "pytorch_model.pt", "a.pth", "a.pkl"])
def test_pickles_are_refused_with_the_reason_and_the_way_out(folder, name, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / name).write_bytes(pickle.dumps(Bomb()))
    load(folder)  # beside safetensors it is not looked at
    (folder / ONE).unlink()
    for path in (folder, folder / name):
        with pytest.raises(WeightsError, match="a pickle, which runs code of its own when it is read; convert it"):
            load(path, config=CONFIG)
    with pytest.raises(WeightsError, match="a pickle, which runs code of its own"):
        survey(folder)
    names = sharded((from_config(CONFIG), load_zeros()), folder)
    os.replace(folder / names[0], folder / name)
    set_index(folder, lambda where: where.update({k: name for k, v in where.items() if v == names[0]}))
    with pytest.raises(WeightsError, match="a pickle"):
        load(folder)
    os.replace(folder / name, folder / names[0])
    (folder / names[0]).write_bytes(pickle.dumps(Bomb(), protocol=2))
    set_index(folder, lambda where: where.update({k: names[0] for k, v in where.items() if v == name}))
    with pytest.raises(WeightsError, match="a pickle under another name"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def load_zeros():
    model = from_config(CONFIG)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../out.safetensors", "a/b.safetensors", "..", ".", "", "a\\b.safetensors", "a\0b", "/"]
)
def test_an_index_names_files_of_its_own_folder_alone(network, tmp_path, name):
    folder = tmp_path / "unet"
    sharded(network, folder)
    shutil.copy(next(folder.glob("*-of-*")), tmp_path / "out.safetensors")
    set_index(folder, lambda where: where.update({"proj_out_1.bias": name}))
    with pytest.raises(WeightsError, match="is no name of a file in its folder"):
        load(folder)


def test_links_of_a_cache_lead_out_of_the_folder(network, tmp_path):
    # The cache of huggingface_hub: snapshots/REVISION/NAME is a link to blobs/HASH.
    names = sharded(network, tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted((tmp_path / "blobs").iterdir())):
        path.rename(path.with_name(f"{i:064x}"))
        (snapshot / path.name).symlink_to(f"../../blobs/{i:064x}")
    same(load(snapshot)[1], network[1])
    (snapshot / names[1]).unlink()
    (snapshot / names[1]).symlink_to("../../blobs/gone")
    with pytest.raises(WeightsError, match=re.escape(f"names '{names[1]}', which is not there; copy the folder again")):
        load(snapshot)


def test_an_index_under_its_older_name(network, tmp_path):
    save(*network, tmp_path, variant="fp16", shard_bytes=20_000)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.rename(tmp_path / "diffusion_pytorch_model.safetensors.fp16.index.json")
    same(load(tmp_path, variant="fp16")[1], network[1])
    save(*network, tmp_path, variant="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]


def test_a_folder_that_is_replaced_while_it_is_read(network, tmp_path, monkeypatch):
    names = sharded(network, tmp_path)
    model, other = network[0], jax.tree.map(lambda a: a + 1, network[1])

    def once(path):
        monkeypatch.undo()
        found = read_header(path)
        save(model, other, tmp_path, shard_bytes=20_000)
        return found

    monkeypatch.setattr(finding, "read_header", once)
    with pytest.raises(WeightsError, match="was replaced while it was read; load it again"):
        load(tmp_path)
    same(load(tmp_path)[1], other)
    assert sorted(p.name for p in tmp_path.glob("*-of-*")) == names
    found = find(tmp_path)
    sharded(network, tmp_path)
    with pytest.raises(WeightsError, match="was replaced while it was read; load it again"):
        next(iter(found.values())).part()


def test_what_does_not_fit_the_index_is_refused(network, tmp_path):
    names = sharded(network, tmp_path)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    sound = index.read_text()
    for change, words in (
        (lambda where: where.pop("proj_out_1.bias"), "tensor 'proj_out_1.bias' lies in .*, but it does not have it"),
        (lambda where: where.update(more=names[0]), "tensors that its files lack: more"),
        (lambda where: where.update({"proj_out_1.bias": names[1]}), "'proj_out_1.bias' lies in"),
        (lambda where: where.clear(), "expected a 'weight_map'"),
        (lambda where: where.update({"proj_out_1.bias": 3}), "expected a 'weight_map'"),
    ):
        set_index(tmp_path, change)
        with pytest.raises(WeightsError, match=words):
            load(tmp_path)
        index.write_text(sound)
    for text, words in (
        ("{", "no JSON"), ("[]", "expected a JSON object, got list"), ("{}", "expected a 'weight_map'"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "name 'a' twice"), ('{"weight_map": NaN}', "NaN is no JSON"),
    ):  # fmt: skip
        index.write_text(text)
        with pytest.raises(WeightsError, match=words):
            load(tmp_path)
    index.write_text(sound)
    # The same tensor in two files.
    extra = read_header(tmp_path / names[1])[0]
    rewrite(tmp_path / names[0], lambda arrays: arrays.update({k: t.part() for k, t in extra.items()}))
    with pytest.raises(WeightsError, match=f"lies in '{names[0]}', but it says '{names[1]}'"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "no JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"_class_name": "DiTTransformer2DModel", "num_layers": 1, "num_layers": 2}', "name 'num_layers' twice"),
        ('{"_class_name": "DiTTransformer2DModel", "norm_eps": NaN}', "NaN is no JSON"),
        ('{"_class_name": "DiTTransformer2DModel", "num_layers": %s}' % ("9" * 5000), "has 5000 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"_class_name": "DiTTransformer2DModel", "num_layers": %s}' % ("[" * 300 + "]" * 300), "nested too deeply"),
        ("{}", "names no class"),
        ('{"_class_name": "Gone"}', "a 'Gone', which is not known here"),
        ('{"_class_name": "DiTTransformer2DModel", "num_layer": 2}', "did you mean 'num_layers'"),
        ('{"_class_name": "DiTTransformer2DModel", "num_layers": 1000000000}', "'num_layers'=1000000000; at most"),
        ('{"_class_name": "DiTTransformer2DModel", "attention_head_dim": 9999999999999999999}', "of another shape"),
        ('{"_class_name": "DiTTransformer2DModel", "num_layers": -1}', "not the parameters of its"),
        ('{"_class_name": "DiTTransformer2DModel", "patch_size": "2"}', "expected int"),
        ('{"_class_name": "SD3Transformer2DModel", "pos_embed_max_size": 1000000000000}', "for at most 14563 patches"),
    ],
)
def test_a_config_that_describes_nothing(folder, text, words):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        load(folder)
    assert len(str(error.value)) < 2000


BLOCKS = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [32]}


@pytest.mark.parametrize(
    "config, key",
    [
        ({"_class_name": "UNet2DModel", **BLOCKS, "layers_per_block": 10**8}, "layers_per_block"),
        ({"_class_name": "UNet2DConditionModel", "transformer_layers_per_block": [1, [1, 10**8]]}, "transformer_lay"),
        ({"_class_name": "AutoencoderKL", "layers_per_block": 10**8}, "layers_per_block"),
        ({"_class_name": "ControlNetModel", "layers_per_block": 10**8}, "layers_per_block"),
        ({"_class_name": "T2IAdapter", "num_res_blocks": 10**8}, "num_res_blocks"),
        ({"_class_name": "SD3Transformer2DModel", "dual_attention_layers": [0, 10**8]}, "dual_attention_layers"),
        ({"_class_name": "UNet2DModel", "block_out_channels": [32] * 10_001}, "block_out_channels"),
    ],
    ids=lambda value: value["_class_name"] if isinstance(value, dict) else value,
)
def test_a_config_that_would_build_for_hours(folder, config, key):
    with pytest.raises(WeightsError, match=f"^{folder}: its config has '{key}.*at most 10000 are built"):
        load(folder, config=config)


def test_what_is_wrong_is_told_with_the_folder(folder):
    for config in ({"_class_name": "DiTTransformer2DModel", "num_layer": 2}, {}, {"_class_name": "Gone"}):
        with pytest.raises(WeightsError, match=f"^{folder}: "):
            load(folder, config=config)
    with pytest.raises(WeightsError, match=r"unknown setting 'x' \(here 'nnn") as error:
        load(folder, config={"_class_name": "DiTTransformer2DModel", "x": "n" * 10**6})
    assert len(str(error.value)) < 2500


@pytest.mark.parametrize(
    "sharding, words",
    [
        ("fsdp", "sharding='fsdp': expected a function, such as lambda model, shapes"),
        (lambda model, shapes: {"pos_embed": shapes["pos_embed"]}, "they differ at proj_out_1/bias, .* and .* more"),
    ],
)
def test_a_sharding_tells_of_each_parameter(folder, sharding, words):
    with pytest.raises(ValueError, match=words):
        load(folder, sharding=sharding)


def test_names_are_shown_on_one_line(folder):
    rewrite(folder / ONE, lambda arrays: arrays.update({"a\nb\x1b[31m": np.zeros(2)}))
    with pytest.raises(WeightsError, match=re.escape(r"1 unexpected: a\nb\x1b[31m")):
        load(folder)


def test_folders_that_are_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json, .* it has those of unet: name one of these folders"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        load(tmp_path / "gone", config=CONFIG)
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        load(tmp_path / "gone")
    (folder / ONE).unlink()
    with pytest.raises(WeightsError, match="no weights without a variant; looked for .* it has no .safetensors file"):
        load(folder)
    with open(folder / "config.json", "wb") as file:
        file.truncate(10**9)
    with pytest.raises(WeightsError, match="too many for a file of settings"):
        load(folder)


def test_chunks_smaller_than_a_row_give_the_same(network, folder, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 100)
    same(load(folder)[1], network[1])


# One process with 8 CPU devices.
EIGHT = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from diffjax.convert import load, save
from diffjax.convert.weights.folders import load as loading
from diffjax.train.parallel.sharding import make_mesh, param_sharding
whole = load(sys.argv[1])[1]
calls, read = [], loading.read
loading.read = lambda place, *rest: calls.append(place) or read(place, *rest)
for axes, mode in (({"data": 8}, "data"), ({"fsdp": 8}, "fsdp"), ({"data": 2, "fsdp": 2, "tensor": 2}, "rules")):
    mesh = make_mesh(axes)
    places = lambda model, shapes: param_sharding(mesh, shapes, model.rules, mode)
    calls.clear()
    model, params = load(sys.argv[1], sharding=places)
    wanted = places(model, jax.eval_shape(model.init, jax.random.key(0)))
    split = 0
    for a, b, where in zip(*map(jax.tree.leaves, (whole, params, wanted)), strict=True):
        assert b.sharding == where and b.dtype == a.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for shard in b.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(a)[shard.index].tobytes()
        split += len({str(s.index) for s in b.addressable_shards})
    assert len(calls) == split, (len(calls), split)
    assert (split == len(jax.tree.leaves(whole))) == (mode == "data")
    save(model, params, sys.argv[2])
    same = [open(f"{folder}/diffusion_pytorch_model.safetensors", "rb").read() for folder in sys.argv[1:]]
    assert same[0] == same[1]
    print(mode, split)
"""


def test_each_device_gets_its_part(folder, tmp_path):
    arguments = [sys.executable, "-c", EIGHT, str(folder), str(tmp_path / "again")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["data", "fsdp", "rules"]
