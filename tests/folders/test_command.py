"""`diffjax inspect FOLDER` and `diffjax convert`, as a user meets them."""

import io
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import cli
from diffjax.convert import load, save
from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.folders.survey import unusual
from diffjax.convert.weights.tensors import Source, read_header, write
from diffjax.models import from_config
from diffjax.nn.functional import names_of

CONFIG = {
    "_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3,
    "sample_size": 8, "num_embeds_ada_norm": 5,
}  # fmt: skip
ONE = "diffusion_pytorch_model.safetensors"


def run(capsys, *argv):
    code = cli.main([str(item) for item in argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = from_config(CONFIG)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    where = tmp_path_factory.mktemp("dit") / "transformer"
    save(model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes), where)
    return where


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def row(out, name):
    return next(line for line in out.splitlines() if line.startswith(name)).removeprefix(name).strip()


def test_inspect_counts_a_checkpoint(capsys, folder):
    code, out, _ = run(capsys, "inspect", folder)
    tensors = find(folder)
    count = sum(tensor.nbytes // 4 for tensor in tensors.values())
    assert code == 0 and row(out, "class") == "DiTTransformer2DModel" and row(out, "files") == ONE
    assert row(out, "parameters") == f"{count:,}" and "float32" in row(out, "bytes")
    assert row(out, "weights") == "fit, each parameter once"
    # The modulation is the largest: 3 layers of 16 x 96.
    assert row(out, "transformer_blocks/0:3/norm1/linear/kernel").split() == "[3, 16, 96] float32 18 KiB".split()
    assert row(run(capsys, "inspect", folder / ONE)[1], "parameters") == f"{count:,}"


def test_inspect_plans_a_config_without_weights(capsys, tmp_path):
    # As large as the largest networks that are published.
    config = CONFIG | {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 57}
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = time.perf_counter()
    code, out, _ = run(capsys, "inspect", tmp_path, "--mesh=fsdp=8", "--dtype=bfloat16")
    assert code == 0 and time.perf_counter() - start < 30
    assert row(out, "weights") == "none: a config alone" and row(out, "files") == "no weights"
    count = int(row(out, "parameters").replace(",", ""))
    assert count > 5e9 and row(out, "bytes") == f"{count * 2 / 2**30:.4g} GiB: bfloat16 {count * 2 / 2**30:.4g} GiB"
    # By its rules all matrices are split: an eighth, and what is not.
    each = float(row(out, "mesh fsdp=8, sharding 'rules':").split()[0])
    assert count * 2 / 8 < each * 2**30 < 1.02 * count * 2 / 8
    code, out, _ = run(capsys, "inspect", tmp_path, "--mesh=data=4", "--sharding=data")
    assert code == 0 and f"{count * 4 / 2**30:.4g} GiB of parameters on each of 4 devices" in out


def test_inspect_says_what_does_not_fit(capsys, folder, tmp_path):
    arrays = {name: tensor.part() for name, tensor in find(folder).items()}
    arrays["more"] = arrays.pop("proj_out_1.bias")
    arrays["proj_out_1.weight"][3, 5] = np.nan
    write(tmp_path / ONE, {k: Source.of(a) for k, a in arrays.items()}, {})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert code == 1
    assert row(out, "weights") == "do not fit: 1 missing: proj_out_1.bias; 1 unexpected: more"
    code, out, _ = run(capsys, "inspect", tmp_path, "--values")
    assert code == 1 and row(out, "NaN or infinite:") == "proj_out_1.weight (1)"
    code, _, err = run(capsys, "inspect", tmp_path, "--mesh=fsdp=2")
    assert code == 2 and "weights that fit" in err
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Other"}))
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert code == 0 and row(out, "weights") == "not compared: the class is not known here"
    os.remove(tmp_path / "config.json")
    code, out, _ = run(capsys, "inspect", tmp_path / ONE)
    assert code == 0 and row(out, "class") == "no config beside the file"


def test_values_that_are_no_numbers_are_counted(tmp_path):
    arrays = {"a": np.arange(5, dtype=np.int32), "b": np.array(np.inf, np.float16), "c": np.full((2, 3), np.nan)}
    arrays["d"], arrays["e"] = arrays["c"].astype(jnp.bfloat16), np.zeros((0, 3), np.float32)
    write(tmp_path / "a.safetensors", {k: Source.of(a) for k, a in arrays.items()}, {})
    found = {name: unusual(tensor) for name, tensor in read_header(tmp_path / "a.safetensors")[0].items()}
    assert found == {"a": 0, "b": 1, "c": 6, "d": 6, "e": 0}


def test_inspect_lists_the_parts_of_a_pipeline(capsys, folder, tmp_path):
    for name, config in {"vae": {"_class_name": "Other"}, "scheduler": None, "broken": {}}.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "model.safetensors", {"a": Source.of(np.zeros(2))}, {})
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "transformer").symlink_to(folder)
    parts = {
        "_class_name": "Pipeline", "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "Other"],
        "scheduler": ["diffusers", "DDIMScheduler"], "safety": [None, None], "id2label": {"0": "a"},
    }  # fmt: skip
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(parts))
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert code == 0 and out.startswith(f"pipeline {tmp_path}\n") and len(out.splitlines()) == 5
    assert row(out, "transformer ").split()[0] == "DiTTransformer2DModel" and "each parameter once" in out
    assert row(out, "scheduler").split() == ["DDIMScheduler", "no", "network"]
    code, out, _ = run(capsys, "inspect", tmp_path, "--values")
    assert code == 0 and row(out, "NaN or infinite:") == "nothing"
    arrays = {name: tensor.part() for name, tensor in find(folder).items()}
    arrays["proj_out_1.weight"][3, 5] = np.nan
    os.remove(tmp_path / "transformer")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    write(tmp_path / "transformer" / ONE, {name: Source.of(a) for name, a in arrays.items()}, {})
    code, out, _ = run(capsys, "inspect", tmp_path, "--values")
    assert code == 1 and row(out, "NaN or infinite:") == "transformer/proj_out_1.weight (1)"
    code, _, err = run(capsys, "inspect", tmp_path, "--mesh=fsdp=2")
    assert code == 2 and "--mesh needs one network: name its folder" in err
    index.write_text(json.dumps(parts | {"broken": ["a", "B"]}))
    code, out, _ = run(capsys, "inspect", tmp_path)
    assert code == 1 and "names no class" in row(out, "broken")
    for name in ("../x", "/etc", "..", ""):
        index.write_text(json.dumps({name: ["a", "B"]}))
        code, out, err = run(capsys, "inspect", tmp_path)
        assert (code, out) == (2, "") and "is no name of a folder inside" in err


def test_parts_of_a_pipeline_that_are_missing_are_told(capsys, tmp_path):
    known = ["diffusers", "DiTTransformer2DModel"]
    parts = {"unet": known, "transformer": known, "vae": ["diffusers", "Other"], "empty": ["transformers", "Other"]}
    parts |= {"tokenizer": ["transformers", "T5Tokenizer"], "scheduler": ["diffusers", "DDIM"], "safety": [None, None]}
    files = {"transformer/readme.txt": "", "vae/config.json": '{"_class_name": "Other"}', "scheduler/a.json": "{}"}
    files |= {"tokenizer/config.json": '{"architectures": ["Other"]}', "model_index.json": json.dumps(parts)}
    for name, text in files.items():
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_text(text)
    code, out, _ = run(capsys, "inspect", tmp_path / "all")
    told = {line.split()[0]: line.partition("missing: ")[2] for line in out.splitlines()[2:]}
    absent, beside = "there is no such folder, or nothing in it", {"scheduler": ""}
    gone = {"unet": absent, "transformer": "it has no config.json", "vae": "a config without weights", "empty": absent}
    assert code == 1 and told == gone | beside | {"tokenizer": ""}
    code, _, err = run(capsys, "convert", tmp_path / "all", tmp_path / "out")
    named = ", ".join(f"{name} ({what})" for name, what in gone.items())
    assert code == 2 and f"names parts that are missing: {named}; fetch them" in err and not (tmp_path / "out").exists()


def test_convert_changes_type_and_files_and_nothing_else(capsys, folder, tmp_path):
    code, _, err = run(capsys, "convert", folder, tmp_path / "half", "--dtype=bfloat16", "--shard-gb=0.00001")
    assert (code, err) == (0, "")
    assert len(list((tmp_path / "half").glob("*-of-*.safetensors"))) > 2
    whole = load(folder)[1]
    same(load(tmp_path / "half")[1], jax.tree.map(lambda a: a.astype(jnp.bfloat16), whole))
    assert json.loads((tmp_path / "half" / "config.json").read_text()) == CONFIG
    (tmp_path / "told").mkdir()
    sources = {name: Source.of(tensor.part()) for name, tensor in find(folder).items()}
    write(tmp_path / "told" / ONE, sources, {"format": "pt", "by": "me"})
    (tmp_path / "told" / "config.json").write_text(json.dumps(CONFIG))
    assert run(capsys, "convert", tmp_path / "told", tmp_path / "told", "--overwrite", "--dtype=float16")[0] == 0
    assert read_header(tmp_path / "told" / ONE)[1] == {"format": "pt", "by": "me"}
    assert run(capsys, "convert", folder, tmp_path / "again")[0] == 0
    assert (tmp_path / "again" / ONE).read_bytes() == (folder / ONE).read_bytes()
    # In place.
    assert run(capsys, "convert", tmp_path / "half", tmp_path / "half", "--overwrite", "--dtype=float32")[0] == 0
    assert sorted(path.name for path in (tmp_path / "half").iterdir()) == ["config.json", ONE]
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), whole)
    same(load(tmp_path / "half")[1], rounded)
    save(from_config(CONFIG), whole, tmp_path / "fp16", dtype="float16", variant="fp16")
    assert run(capsys, "convert", tmp_path / "fp16", tmp_path / "plain", "--variant=fp16")[0] == 0
    same(load(tmp_path / "plain")[1], load(tmp_path / "fp16", variant="fp16")[1])


def test_types_of_8_bits_are_loaded_as_another_one(capsys, folder, tmp_path):
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        assert run(capsys, "convert", folder, tmp_path / dtype, f"--dtype={dtype}")[0] == 0
        told = f"nothing computes in {dtype}: load with param_dtype='bfloat16'"
        code, out, _ = run(capsys, "inspect", tmp_path / dtype)
        assert code == 0 and row(out, "weights") == f"fit, each parameter once; {told}"
        with pytest.raises(ValueError, match=f"{dtype}: {told}$"):
            load(tmp_path / dtype, dtype="bfloat16")
        half = load(tmp_path / dtype, param_dtype="bfloat16")[1]
        assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}


def test_convert_to_parameters_and_back(capsys, folder, tmp_path):
    from diffjax.train.checkpoint.init_from import of_safetensors

    code, out, _ = run(capsys, "convert", folder, tmp_path / "params", "--keys=params")
    count = row(run(capsys, "inspect", folder)[1], "parameters")
    size = row(run(capsys, "inspect", folder)[1], "bytes").partition(":")[0]
    assert code == 0 and out == f"{folder} -> {tmp_path / 'params'}: {count} parameters, {size}\n"
    assert sorted(path.name for path in (tmp_path / "params").iterdir()) == ["config.json", "params.safetensors"]
    whole = load(folder)[1]
    leaves = of_safetensors(tmp_path / "params" / "params.safetensors")
    for name, leaf in names_of(whole).items():
        np.testing.assert_array_equal(leaves[name].read(()), leaf)
    same(load(tmp_path / "params")[1], whole)
    assert "fit, each parameter once" in run(capsys, "inspect", tmp_path / "params")[1]
    for keys, made in (((), "params.safetensors"), (("--keys=diffusers",), ONE)):
        target = tmp_path / f"back{len(keys)}"
        assert run(capsys, "convert", tmp_path / "params", target, *keys)[0] == 0
        source = (tmp_path / "params" if not keys else folder) / made
        assert (target / made).read_bytes() == source.read_bytes()
    # Weights under the other names are no longer those of the folder.
    assert run(capsys, "convert", folder, tmp_path / "params", "--overwrite")[0] == 0
    assert sorted(path.name for path in (tmp_path / "params").iterdir()) == ["config.json", ONE]


def test_convert_takes_classes_that_are_not_known(capsys, tmp_path):
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.arange(3)}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["Other"]}')
    name = "model.safetensors"
    write(tmp_path / "other" / name, {k: Source.of(a) for k, a in arrays.items()}, {})
    assert run(capsys, "convert", tmp_path / "other", tmp_path / "half", "--dtype=float16")[0] == 0
    found = read_header(tmp_path / "half" / name)[0]
    assert found["a.weight"].dtype == np.float16 and found["n"].dtype == np.int64
    np.testing.assert_array_equal(found["a.weight"].part(), arrays["a.weight"])
    code, _, err = run(capsys, "convert", tmp_path / "other", tmp_path / "p", "--keys=params")
    assert code == 2 and "needs a class that is known here, not 'Other'" in err and not (tmp_path / "p").exists()


@pytest.mark.slow
def test_convert_writes_the_names_of_the_authors_and_reads_them(capsys, tmp_path):
    config = {
        "_class_name": "UNet2DConditionModel", "block_out_channels": [8, 8], "layers_per_block": 1, "sample_size": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "attention_head_dim": 2, "norm_num_groups": 4,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 6,
    }  # fmt: skip
    model = from_config(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    save(model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes), tmp_path / "unet")
    one = tmp_path / "one.safetensors"
    code, out, _ = run(capsys, "convert", tmp_path / "unet", one, "--keys=original")
    assert code == 0 and out.startswith(f"{tmp_path / 'unet'} -> {one}: ")
    assert "model.diffusion_model.input_blocks.0.0.weight" in find(one)
    # No shape tells how many heads it has: nothing is guessed.
    code, out, _ = run(capsys, "inspect", one)
    assert code == 1 and "no published one is 8 channels wide, and no shape tells its heads: give its config" in out
    given = "--component=unet", f"--network={tmp_path / 'unet' / 'config.json'}"
    assert run(capsys, "convert", one, tmp_path / "again", *given)[0] == 0
    again, first = find(tmp_path / "again"), find(tmp_path / "unet")
    assert again.keys() == first.keys()
    assert all(again[name].part().tobytes() == tensor.part().tobytes() for name, tensor in first.items())
    code, _, err = run(capsys, "convert", tmp_path / "unet", one, "--keys=original")
    assert code == 2 and "it holds weights; name another one, or allow it by overwrite=True, --overwrite" in err


def test_convert_takes_whole_pipelines(capsys, folder, tmp_path):
    source, target = tmp_path / "pipeline", tmp_path / "half"
    texts = {"scheduler/scheduler_config.json": "{}", "tokenizer/merges.txt": "a b", "README.md": "read"}
    for name, text in texts.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    (source / "transformer").symlink_to(folder)
    kinds = {"transformer": "DiTTransformer2DModel", "scheduler": "DDIMScheduler", "tokenizer": "CLIPTokenizer"}
    (source / "model_index.json").write_text(json.dumps({name: ["a", kind] for name, kind in kinds.items()}))
    (source / "whole.safetensors").write_bytes(b"left")
    code, out, _ = run(capsys, "convert", source, target, "--dtype=float16")
    count = row(run(capsys, "inspect", folder)[1], "parameters")
    assert code == 0 and out.startswith(f"{source} -> {target}: {count} parameters, ")
    here = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert here == {
        "model_index.json", "README.md", "scheduler/scheduler_config.json", "tokenizer/merges.txt",
        "transformer/config.json", f"transformer/{ONE}",
    }  # fmt: skip
    assert {tensor.dtype.name for tensor in find(target / "transformer").values()} == {"float16"}
    assert (target / "model_index.json").read_bytes() == (source / "model_index.json").read_bytes()
    for flags, words in (
        (("--keys=params",), "need one network, such as"), ((), "it holds README.md"),
        (("--overwrite", "--component=unet"), "need one network"),
    ):  # fmt: skip
        code, _, err = run(capsys, "convert", source, target, *flags)
        assert code == 2 and words in err
    code, _, err = run(capsys, "convert", source, source, "--overwrite")
    assert code == 2 and "the pipeline itself; name another folder" in err


def test_adapters_and_variants_are_told(capsys, folder, tmp_path):
    half = np.zeros((4, 8), np.float16)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    arrays = {name.format("A"): half, name.format("B"): half.T.copy()}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write(path, {k: Source.of(a) for k, a in arrays.items()}, {})
    for where in (tmp_path, path):
        code, out, _ = run(capsys, "inspect", where)
        assert code == 0 and out.startswith("LoRA for unet, rank 4\n") and row(out, "parameters") == "64"
    # Beside the config of a network it is as much of a LoRA.
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    code, out, _ = run(capsys, "inspect", path)
    assert code == 0 and out.startswith("LoRA for unet, rank 4\n") and row(out, "parameters") == "64"
    assert row(out, "class") == "LoRA" and row(out, "weights").startswith("not compared: load_lora does it")
    code, _, err = run(capsys, "convert", path, tmp_path / "out")
    assert code == 2 and "is a LoRA, and networks are converted" in err and not (tmp_path / "out").exists()
    os.remove(tmp_path / "config.json")
    # A parameter may be called alpha, and what is refused by name is told.
    arrays = {"snake.alpha": half, "conv.weight": half}
    write(tmp_path / "other.safetensors", {k: Source.of(a) for k, a in arrays.items()}, {})
    code, out, _ = run(capsys, "inspect", tmp_path / "other.safetensors")
    assert code == 0 and "LoRA" not in out and row(out, "class") == "no config beside the file"
    assert row(out, "weights") == "not compared: no config tells of what network"
    write(tmp_path / "lokr.safetensors", {"lora_unet_a.lokr_w1": Source.of(half)}, {})
    code, _, err = run(capsys, "inspect", tmp_path / "lokr.safetensors")
    assert code == 2 and "is LoKr, which is not supported" in err
    (tmp_path / "fp16").mkdir()
    (tmp_path / "fp16" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "fp16" / ONE.replace(".", ".fp16.")).write_bytes((folder / ONE).read_bytes())
    code, _, err = run(capsys, "inspect", tmp_path / "fp16")
    assert code == 2 and "name the variant, such as 'fp16' (variant=, --variant=)" in err


def test_convert_takes_the_weights_of_a_run(capsys, tmp_path):
    from ml_collections import ConfigDict

    from diffjax.train import loop
    from diffjax.train.state import load_run

    model = dict(name="mlp", width=8, depth=1)
    optim = dict(name="adam", lr=1e-2)
    config = dict(data="digits()", batch_size=8, num_steps=1, ema=("decay(0.5)",), model=model, optim=optim)
    workdir = str(tmp_path / "run")
    loop.train(ConfigDict(config), workdir, stream=io.StringIO())
    for flags, ema in (((), "decay(0.5)"), (("--ema=raw",), "raw")):
        target = tmp_path / ema
        assert run(capsys, "convert", workdir, target, "--keys=params", *flags)[0] == 0
        found = read_header(target / "params.safetensors")[0]
        wanted = names_of(load_run(workdir, ema=ema).params)
        assert found.keys() == wanted.keys()
        assert all(found[name].part().tobytes() == np.asarray(leaf).tobytes() for name, leaf in wanted.items())
    code, _, err = run(capsys, "convert", workdir, tmp_path / "other", "--variant=fp16")
    assert code == 2 and "is a run, which has no such parts" in err
    code, _, err = run(capsys, "convert", workdir, workdir, "--overwrite", "--keys=params")
    assert code == 2 and "is a run, whose config would be replaced" in err
    code, _, err = run(capsys, "convert", workdir, tmp_path / "other")
    assert code == 2 and "'mlp' is of no class that checkpoints have" in err and "--keys=params" in err
    # The same as with --workdir.
    assert run(capsys, "inspect", workdir, "--fast") == run(capsys, "inspect", f"--workdir={workdir}", "--fast")


@pytest.mark.parametrize(
    "argv, code, words",
    [
        (["convert"], 2, "two folders are needed"),
        (["convert", "{0}"], 2, "two folders are needed"),
        (["convert", "{0}", "{0}"], 2, "it holds config.json, diffusion_pytorch_model.safetensors"),
        (["convert", "{0}", "{1}", "--dtype=int8"], 2, "expected a type of floating point"),
        (["convert", "{0}", "{1}", "--dtype=bf16"], 2, "expected a type of floating point"),
        (["convert", "{0}", "{1}", "--keys=mine"], 2, "unknown keys 'mine'; known: diffusers, params, original"),
        *((["convert", "{0}", "{1}", f"--shard-gb={n}"], 2, "expected a number above 0") for n in ("0", "inf", "nan")),
        (["convert", "{0}", "{1}.safetensors"], 2, "name a folder, or ask for one file"),
        (["convert", "{0}", "{1}", "--family=sd"], 2, "family='sd' is of a component"),
        (["convert", "{0}/diffusion_pytorch_model.safetensors", "{1}", "--variant=a"], 2, "chooses among those of"),
        (["inspect", "{0}/diffusion_pytorch_model.safetensors", "--variant=a"], 2, "chooses among those of a folder"),
        (["convert", "{0}", "{1}", "--variant=fp16"], 2, "no weights with variant 'fp16'"),
        (["convert", "{0}", "{1}", "--ema=raw"], 2, "is no run"),
        (["convert", "{0}", "{1}", "--dtyp=float16"], 2, "did you mean '--dtype'"),
        (["convert", "{0}", "{1}", "--config.seed=1"], 2, "convert takes no config"),
        (["convert", "{1}", "{0}/x"], 1, "no such folder or file"),
        (["inspect", "{1}"], 1, "no such folder or file"),
        (["convert", "{0}", "{0}/config.json", "--overwrite"], 2, "it is a file; a folder is to be written"),
        (["convert", "{0}", "{0}", "--overwrite", "--keys=original"], 2, "written to one file, such as"),
        (["convert", "{0}", "{1}.safetensors", "--keys=original", "--shard-gb=1"], 2, "are written to one file"),
        (["convert", "{0}", "{1}.safetensors", "--keys=original"], 2, "a DiTTransformer2DModel has no other names"),
        (["convert", "{0}", "{1}", "--network={0}/config.json"], 2, "is of a component of an original checkpoint"),
        (["convert", "{0}", "{1}", "--network={0}"], 2, "is of a component of an original checkpoint"),
        (["convert", "{0}/config.json", "{1}"], 2, "settings, and no weights; name its folder, "),
        (["inspect", "{0}/config.json"], 2, "settings, and no weights; name its folder, "),
        (["inspect", "{0}", "--mesh=fsd=2"], 2, "unknown mesh axis 'fsd'; known: data, fsdp, tensor, sequence"),
        (["inspect", "{0}", "--fast"], 2, "--fast is for configs and runs"),
        (["inspect", "{0}", "--config=x.py"], 2, "--config is for configs and runs"),
        (["inspect", "{0}", "--config.seed=1"], 2, "--config.seed is for configs and runs"),
        (["inspect", "{0}", "--sharding=fsdp"], 2, "--sharding needs a mesh"),
        (["inspect", "{0}", "--mesh=fsdp=-1"], 2, "the size of every axis is needed"),
        (["inspect", "{0}", "--mesh=fsdp=2", "--sharding=all"], 2, "unknown sharding 'all'"),
        (["inspect", "--values"], 2, "--values belongs to a folder of weights"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_line(capsys, folder, tmp_path, argv, code, words):
    before = sorted(os.listdir(folder))
    given = [item.format(folder, tmp_path / "gone") for item in argv]
    found, out, err = run(capsys, *given)
    assert (found, out) == (code, "") and err.startswith("diffjax: ") and err.count("\n") == 1
    assert words in err
    assert sorted(os.listdir(folder)) == before and not list(tmp_path.glob("gone*"))
