"""Folders of weights: what `save` leaves, whatever stops it."""

import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest

from diffjax.convert import load, save
from diffjax.convert.weights import WeightsError, rewrite
from diffjax.convert.weights.folders.find import find, read_config
from diffjax.convert.weights.folders.save import write_folder
from diffjax.convert.weights.tensors import Source, read_header
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


def sharded(network, folder):
    """The same network in several files; the names of these."""
    save(*network, folder, shard_bytes=20_000)
    return sorted(path.name for path in folder.glob("*-of-*.safetensors"))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_several_files_and_one_replace_each_other(network, tmp_path):
    model, params = network
    names = sharded(network, tmp_path)
    assert len(names) > 2 and names[0] == f"diffusion_pytorch_model-00001-of-{len(names):05d}.safetensors"
    assert all(sum(t.nbytes for t in read_header(tmp_path / n)[0].values()) <= 20_000 for n in names)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in find(tmp_path).values())
    same(load(tmp_path)[1], params)
    other = jax.tree.map(lambda a: a + 1, params)
    save(model, other, tmp_path, variant="fp16")
    save(model, other, tmp_path)
    # What is left of the several files would be taken for the network.
    variant = "diffusion_pytorch_model.fp16.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", variant, ONE]
    same(load(tmp_path)[1], other)
    sharded(network, tmp_path)
    assert not (tmp_path / ONE).exists() and (tmp_path / variant).exists()
    same(load(tmp_path)[1], params)


def test_a_network_that_nothing_would_read_is_not_written(tmp_path):
    from diffjax.models import mlp

    model = mlp(shape=(2, 2, 1), width=4, depth=1)
    with pytest.raises(WeightsError, match=f"^{tmp_path}: the config names no class: .*save_params .* of any network"):
        save(model, model.init(jax.random.key(0)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_transformers_and_diffusers_have_their_own_names(network, tmp_path):
    model, params = network
    config = {k: v for k, v in CONFIG.items() if k != "_class_name"} | {"architectures": ["DiTTransformer2DModel"]}
    try:
        named = from_config(config)
    except ValueError:  # the class takes no such key; the names of the files depend on it alone
        named = model._replace(config=config)
    save(named, params, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float32"])
def test_saved_in_any_type_of_floating_point(network, tmp_path, dtype):
    save(*network, tmp_path, dtype=dtype)
    same(load(tmp_path, param_dtype=dtype)[1], jax.tree.map(lambda a: a.astype(dtype), network[1]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", ["save", "rewrite", "params"])
def test_numbers_that_a_type_lacks_are_no_infinities(network, tmp_path, way):
    model, params = network
    large = np.array(params["proj_out_1"]["bias"])
    large[:3] = 65536, -1e30, np.inf
    params = params | {"proj_out_1": params["proj_out_1"] | {"bias": large}}
    save(model, params, tmp_path / "wide")
    rewrite(tmp_path / "wide", tmp_path / "half", dtype="bfloat16")
    before = (tmp_path / "half" / ONE).read_bytes()
    told = "tensor 'proj_out_1.*bias': 2 of its values are beyond 65504, the largest of float16; take bfloat16 or float"
    with pytest.raises(WeightsError, match=told):
        if way == "save":
            save(model, params, tmp_path / "half", dtype="float16")
        else:
            keys = "params" if way == "params" else None
            rewrite(tmp_path / "wide", tmp_path / "half", dtype="float16", keys=keys, overwrite=True)
    assert (tmp_path / "half" / ONE).read_bytes() == before
    with pytest.raises(WeightsError, match=told):
        load(tmp_path / "wide", param_dtype="float16")
    # What is infinite already stays so.
    large[:2] = 0
    save(model, params, tmp_path / "half", dtype="float16")
    assert np.count_nonzero(np.isinf(find(tmp_path / "half")["proj_out_1.bias"].part())) == 1


@pytest.mark.parametrize("shard_bytes", [20_000, 10**9])
@pytest.mark.parametrize("after", [1, 3])
def test_a_full_disk_leaves_the_old_folder_whole(network, tmp_path, monkeypatch, shard_bytes, after):
    model, params = network
    save(model, params, tmp_path, shard_bytes=shard_bytes)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = iter(range(1000))

    def full(*_):
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    other = jax.tree.map(lambda a: a + 1, params)
    with pytest.raises(OSError, match="No space left"):
        save(model, other, tmp_path, shard_bytes=20_000)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    same(load(tmp_path)[1], params)


def weights(start, **config):
    """A config, and four tensors of 8 bytes that start with this number."""
    arrays = {name: np.arange(start, start + 2, dtype=np.float32) for name in "abcd"}
    return {"_class_name": "Other", **config}, {name: Source.of(array) for name, array in arrays.items()}


def content(folder):
    """What a reader finds in a folder; None for one that it refuses."""
    try:
        return read_config(folder), {name: tensor.part().tolist() for name, tensor in find(folder).items()}
    except (WeightsError, FileNotFoundError):
        return None


SIZES = {"one": 100, "several": 8, "two": 16}


@pytest.mark.parametrize("config", ["same", "another"])
@pytest.mark.parametrize("new", SIZES)
@pytest.mark.parametrize("old", [*SIZES, "none"])
def test_whenever_it_is_stopped_one_set_is_whole(tmp_path, monkeypatch, old, new, config):
    """A copy of the folder is taken before each change of it, and each change but the first fails once."""
    (tmp_path / "start").mkdir()
    if old != "none":
        write_folder(tmp_path / "start", *weights(0), shard_bytes=SIZES[old])
    before, given = content(tmp_path / "start"), weights(5, **({"more": 1} if config == "another" else {}))
    write_folder(tmp_path / "wanted", *given, shard_bytes=SIZES[new])
    wanted, names = content(tmp_path / "wanted"), sorted(p.name for p in (tmp_path / "wanted").iterdir())
    seen, real = [], {name: getattr(os, name) for name in ("replace", "unlink", "link")}

    def run(folder, broken=None):
        count = iter(range(100))

        def step(name, *rest):
            if next(count) == broken:
                raise OSError(errno.EIO, "broken")
            if broken is None:
                seen.append(content(shutil.copytree(folder, tmp_path / f"seen{len(seen)}")))
            return real[name](*rest)

        for name in real:
            monkeypatch.setattr(os, name, lambda *rest, name=name: step(name, *rest))
        try:
            write_folder(folder, *given, shard_bytes=SIZES[new])
        finally:
            monkeypatch.undo()

    run(shutil.copytree(tmp_path / "start", tmp_path / "killed"))
    assert content(tmp_path / "killed") == wanted
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == names
    # Without a config nothing is read.
    away = [None] if config == "another" or old == "none" else []
    assert all(found in (before, wanted, *away) for found in seen)
    assert seen[0] == before and len(seen) >= 1 + (new != "one")
    for i in range(len(seen)):
        folder = shutil.copytree(tmp_path / "start", tmp_path / f"broken{i}")
        try:
            run(folder, broken=i)
        except OSError:
            assert content(folder) in (before, wanted, *away)
        else:  # no links in this file system: the index has the names
            assert content(folder) == wanted
        write_folder(folder, *given, shard_bytes=SIZES[new])
        assert content(folder) == wanted
        assert sorted(p.name for p in folder.iterdir()) == names


def test_a_file_cannot_take_the_place_of_a_folder(network, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        save(*network, tmp_path / "file")


def test_parameters_of_another_network_are_not_saved(network, tmp_path):
    model, params = network
    with pytest.raises(WeightsError, match="not those of this network: missing nothing, unexpected more"):
        save(model, params | {"more": np.zeros(2)}, tmp_path)
    wrong = params | {"proj_out_1": jax.tree.map(lambda a: a[1:], params["proj_out_1"])}
    with pytest.raises(WeightsError, match="wrong shapes: proj_out_1/bias"):
        save(model, wrong, tmp_path)
    with pytest.raises(ValueError, match="expected at least 1"):
        save(model, params, tmp_path, shard_bytes=0)
    with pytest.raises(WeightsError, match="complex64, which safetensors does not have"):
        save(model, jax.tree.map(lambda a: a.astype(np.complex64), params), tmp_path)
    assert not list(tmp_path.iterdir())
