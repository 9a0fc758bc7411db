"""Low-rank adaptation: identities, gradients, and what peft and diffusers make of the same files."""

import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close_gradient
from drawn import params_of
from networks.dit import CASES

from diffjax.adapters import lora
from diffjax.convert import WeightsError
from diffjax.convert.weights.adapters.lora import load_lora, lora_components, save_lora
from diffjax.convert.weights.adapters.lora_config import METADATA, config_of
from diffjax.convert.weights.adapters.lora_names import Meaning, spellings, targets_of
from diffjax.convert.weights.tensors import Source, read_header, write
from diffjax.models import MODELS, dit, from_config
from diffjax.nn.functional import names_of

LIVE = os.environ.get("DIFFJAX_PARITY")
RUNS = sorted(path.parent for path in Path(LIVE, "adapters").glob("*/out.npy")) if LIVE else []
GOLDEN = Path(__file__).parent.parent / "parity" / "golden" / "adapters"
TOLERANCE = dict(atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def run():
    return dict(np.load(GOLDEN / "lora.npz"))


@pytest.fixture(scope="module")
def model():
    return from_config({"_class_name": "DiTTransformer2DModel", **CASES["dit"].config})


@pytest.fixture(scope="module")
def params(model):
    return params_of(model)


@pytest.fixture(scope="module")
def output(model, run):
    given = [run[f"in/{name}"] for name in "xty"]
    return jax.jit(lambda params, adapters: model.apply(lora.apply(params, adapters), *given))


FILES = {"diffusers": "diffusers.safetensors", "peft": "peft", "kohya": "kohya.safetensors"}


@pytest.mark.parametrize("name", FILES)
def test_one_adapter_is_that_of_peft(name, model, params, output, run):
    adapter = load_lora(GOLDEN / FILES[name], model)
    wanted = run[f"out/{name}"]
    # What the adapter adds is not small beside the output.
    assert np.std(wanted - run["out/base"]) > 0.05 * np.std(wanted)
    np.testing.assert_allclose(output(params, [(adapter, 1.0)]), wanted, **TOLERANCE)


@pytest.mark.skipif(not LIVE, reason="`make parity` records random adapters and sets DIFFJAX_PARITY")
@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_live_adapter_is_that_of_peft(folder, model, params, output, tmp_path):
    adapter = load_lora(folder, model)
    np.testing.assert_allclose(output(params, [(adapter, 1.0)]), np.load(folder / "out.npy"), **TOLERANCE)
    save_lora(adapter, model, tmp_path)
    again = load_lora(tmp_path, model)
    assert again.layers == adapter.layers
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_two_adapters_with_weights_and_fused(model, params, output, run):
    one, two = (load_lora(GOLDEN / FILES[name], model) for name in ("diffusers", "peft"))
    np.testing.assert_allclose(output(params, [(one, 0.7), (two, -0.4)]), run["out/both"], **TOLERANCE)
    fused = lora.fuse(params, [(one, 0.35), (two, -0.2)])
    np.testing.assert_allclose(output(fused, []), run["out/fused"], **TOLERANCE)
    back = lora.unfuse(fused, [(one, 0.35), (two, -0.2)])
    for name, leaf in names_of(back).items():
        np.testing.assert_allclose(leaf, names_of(params)[name], atol=1e-6, err_msg=name)


def test_gradients_reach_the_adapter_as_in_pytorch(model, params, run):
    given = [run[f"in/{name}"] for name in "xty"]
    adapter = load_lora(GOLDEN / FILES["diffusers"], model)

    @jax.jit
    @jax.grad
    def gradient(adapter):
        return jnp.sum(model.apply(lora.apply(params, [(adapter, 1.0)]), *given) * run["probe"])

    ours = gradient(adapter)
    assert jax.tree.structure(ours) == jax.tree.structure(adapter)
    theirs = {name: tensor.part() for name, tensor in read_header(GOLDEN / "gradients.safetensors")[0].items()}
    seen = set()
    for module, target in targets_of(model).items():
        part = dict(adapter.layers).get(target.parameter, {target.layer: None})[target.layer]
        if not part:
            continue
        for slot, factor in zip("AB", ours.pairs[target.parameter], strict=True):
            mine = np.asarray(factor[target.layer] if lora.stacked(target.parameter) else factor)
            rest = mine[..., part.rank :] if slot == "A" else mine[part.rank :]
            assert not rest.any()  # what fills up a smaller rank stays zero
            mine = mine[..., : part.rank] if slot == "A" else mine[: part.rank]
            truth = theirs[f"{module}.lora_{slot}.weight"]
            axes = {2: (1, 0), 4: (2, 3, 1, 0)}[truth.ndim]
            truth = truth.transpose(axes).reshape(mine.shape)
            close_gradient(mine, truth, module)
            seen.add(f"{module}.lora_{slot}.weight")
    assert seen == theirs.keys()


@pytest.mark.parametrize("name", FILES)
def test_what_is_saved_is_what_was_read(name, model, tmp_path):
    adapter = load_lora(GOLDEN / FILES[name], model)
    save_lora(adapter, model, tmp_path / "a.safetensors")
    again = load_lora(tmp_path / "a.safetensors", model)
    assert again.layers == adapter.layers and again.use_rslora == adapter.use_rslora
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_the_saved_file_is_that_of_diffusers(model, tmp_path):
    theirs, metadata = read_header(GOLDEN / "diffusers.safetensors")
    save_lora(load_lora(GOLDEN / "diffusers.safetensors", model), model, tmp_path)
    ours, mine = read_header(tmp_path / "pytorch_lora_weights.safetensors")
    assert {k: v.part().tobytes() for k, v in ours.items()} == {k: v.part().tobytes() for k, v in theirs.items()}
    config, wanted = json.loads(mine[METADATA]), json.loads(metadata[METADATA])
    assert all(config[name] == wanted[name] for name in ("r", "lora_alpha", "use_rslora", "peft_type"))
    assert config["rank_pattern"] == {"^transformer_blocks.1.attn1.to_q": 4}
    # The pattern of one fits the module of that number; a name of ours is the whole one.
    assert config["alpha_pattern"] == {"^pos_embed.proj": 1, "^transformer_blocks.2.attn1.to_v": 5}


def test_a_fresh_adapter_changes_nothing(model, params, output):
    adapter = lora.init(jax.random.key(0), params, [r"to_(q|k)/kernel$", r"^proj_out"], rank=4)
    assert all(pair.a.any() and not pair.b.any() for pair in adapter.pairs.values())
    np.testing.assert_array_equal(output(params, [(adapter, 1.0)]), output(params, []))


def test_ranks_and_alphas_by_module(params):
    targets = [r"attn1/to_q/kernel$", r"transformer_blocks/1/attn1/to_k/kernel$", r"^pos_embed/proj/kernel$"]
    settings = dict(ranks={r"blocks/2/.*to_q": 5}, alphas={r"pos_embed": 1.5}, use_rslora=True)
    adapter = lora.init(jax.random.key(0), params, targets, 2, 4.0, **settings)
    parts = dict(adapter.layers)
    block = "transformer_blocks/0:3/attn1"
    assert [part.rank for part in parts[f"{block}/to_q/kernel"]] == [2, 2, 5]
    assert [part.rank for part in parts[f"{block}/to_k/kernel"]] == [0, 2, 0]
    assert parts["pos_embed/proj/kernel"] == (lora.Layer(2, 1.5),)
    a, b = adapter.pairs[f"{block}/to_q/kernel"]
    assert a.shape == (3, 16, 5) and b.shape == (3, 5, 16)
    assert not a[:2, :, 2:].any() and a[2].all() and np.abs(a).max() <= 16**-0.5
    a, b = adapter.pairs["pos_embed/proj/kernel"]
    assert a.shape == (2, 2, 4, 2) and b.shape == (2, 16)
    ones = jax.tree.map(jnp.ones_like, adapter)
    # rsLoRA: alpha / sqrt(rank) times a sum over the rank.
    np.testing.assert_allclose(lora.change(ones, "pos_embed/proj/kernel"), 1.5 / 2**0.5 * 2, rtol=1e-6)


def test_stacks_of_the_native_transformer():
    net = dit(shape=(4, 4, 1), width=8, depth=2, heads=2)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    adapter = lora.init(jax.random.key(0), shapes, [r"blocks/1/attention/qkv/kernel$", "^out/kernel"], 2)
    assert [part.rank for part in dict(adapter.layers)["blocks/attention/qkv/kernel"]] == [0, 2]
    assert adapter.pairs["blocks/attention/qkv/kernel"].a.shape == (2, 8, 2)
    changed = jax.eval_shape(lambda params: lora.apply(params, [(adapter, 1.0)]), shapes)
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, shapes)


def test_what_is_wrong_with_a_request(params, model):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="fits no kernel; there are"):
        lora.init(key, params, [r"to_w/kernel"], 2)
    with pytest.raises(ValueError, match="rank=0"):
        lora.init(key, params, ["kernel"], 0)
    with pytest.raises(ValueError, match="no targets"):
        lora.init(key, params, [], 2)
    adapter = lora.init(key, params, ["proj_out_1"], 2)
    with pytest.raises(ValueError, match="proj_out_1/kernel"):
        lora.apply({"other": jnp.ones(2)}, [(adapter, 1.0)])


def written(path, tensors, config=None):
    sources = {k: Source(v.dtype, v.shape, lambda v=v: np.asarray(v)) for k, v in tensors.items()}
    write(path, sources, {} if config is None else {METADATA: json.dumps(config)})
    return path


def pair(module, down="lora_A", up="lora_B", rank=2, shape=(16, 32)):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((rank, shape[0])), rng.standard_normal((shape[1], rank))
    return {f"{module}.{down}.weight": np.float32(a), f"{module}.{up}.weight": np.float32(b)}


PEFT = pair("base_model.model.proj_out_1")
TYPED = {"lora_alpha": 2}
SPELLINGS = {
    "peft": PEFT,
    "adapter": pair("proj_out_1", "lora_A.default", "lora_B.default"),
    "pipeline": pair("transformer.proj_out_1"),
    "older": pair("unet.proj_out_1", "lora.down", "lora.up"),
    "kohya": pair("lora_unet_proj_out_1", "lora_down", "lora_up"),
    "comfy": pair("diffusion_model.proj_out_1", "lora_down", "lora_up"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name, model, tmp_path):
    config = TYPED if name == "peft" else None
    adapter = load_lora(written(tmp_path / "a.safetensors", SPELLINGS[name], config), model)
    assert [*adapter.pairs] == ["proj_out_1/kernel"] and dict(adapter.layers)["proj_out_1/kernel"] == ((2, 2.0),)
    np.testing.assert_array_equal(adapter.pairs["proj_out_1/kernel"].a.T, next(iter(SPELLINGS[name].values())))


def test_the_oldest_names_of_diffusers(model, tmp_path):
    module = "unet.transformer_blocks.1.attn1.processor"
    tensors = pair(module, "to_out_lora.down", "to_out_lora.up", shape=(16, 16))
    adapter = load_lora(written(tmp_path / "a.safetensors", tensors), model)
    assert [p.rank for p in dict(adapter.layers)["transformer_blocks/0:3/attn1/to_out/0/kernel"]] == [0, 2, 0]


@pytest.mark.parametrize("module", ["encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"])
def test_text_encoders_with_and_without_their_inner_prefix(module):
    names = spellings({module: None}, {})
    for name in ("text_model_encoder_layers_0_mlp_fc1", "text_model.encoder.layers.0.mlp.fc1"):
        assert names[name] == {Meaning((module,))}
    assert names["encoder.layers.0.mlp.fc1"] == {Meaning((module,))}


def test_names_of_sdxl_in_kohyas_scripts():
    modules = ("down_blocks.1.attentions.0.proj_in", "proj_in", "up_blocks.0.upsamplers.0.conv")
    xl, sd = (["CrossAttnUpBlock2D", "UpBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"])
    for kinds, upsampler in ((xl, "output_blocks_2_2_conv"), (sd, "output_blocks_2_1_conv")):
        config = {"_class_name": "UNet2DConditionModel", "layers_per_block": 2, "up_block_types": kinds}
        names = spellings(dict.fromkeys(modules), config)
        assert names["input_blocks_4_1_proj_in"] == {Meaning(modules[:1])}
        assert names["proj_in"] == {Meaning(("proj_in",))} and names[upsampler] == {Meaning(modules[2:])}


def test_one_file_for_a_pipeline(model, tmp_path):
    tensors = pair("transformer.proj_out_1") | pair("text_encoder.proj_out_1", rank=3)
    config = {"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 9}
    config["text_encoder.alpha_pattern"] = {"proj_out_1": 6}
    path = written(tmp_path / "a.safetensors", tensors, config)
    assert lora_components(path) == ("text_encoder", "transformer")
    with pytest.raises(WeightsError, match="adapters of text_encoder, transformer: name one of them"):
        load_lora(path, model)
    parts = {name: load_lora(path, model, component=name).layers for name in ("transformer", "text_encoder")}
    assert parts["transformer"] == (("proj_out_1/kernel", ((2, 8.0),)),)
    assert parts["text_encoder"] == (("proj_out_1/kernel", ((3, 6.0),)),)
    for name in ("text_encoder_2", "unet"):
        with pytest.raises(WeightsError, match=f"no adapter of '{name}'; it has those of text_encoder, transformer"):
            load_lora(path, model, component=name)
    # ComfyUI and kohya's scripts have one name for whatever denoises.
    other = written(tmp_path / "b.safetensors", pair("diffusion_model.proj_out_1"), {})
    assert load_lora(other, model, component="transformer").layers == (("proj_out_1/kernel", ((2, 2.0),)),)


def test_the_config_of_the_only_part_is_that_of_tensors_without_a_prefix(model, tmp_path):
    config = {"transformer.r": 2, "transformer.lora_alpha": 8}
    for module in ("proj_out_1", "unet.proj_out_1"):
        adapter = load_lora(written(tmp_path / "a.safetensors", pair(module), config), model)
        assert adapter.layers == (("proj_out_1/kernel", ((2, 8.0),)),)


@pytest.mark.parametrize("pattern, alpha", [("proj_out_1", 5), ("^proj_out_1$", 5), (r"out\.1", 8), ("out_1", 8)])
def test_patterns_are_names_or_their_ends(pattern, alpha, model, tmp_path):
    config = {"lora_alpha": 8, "alpha_pattern": {pattern: 5, "proj_out_1": alpha}}
    adapter = load_lora(written(tmp_path / "a.safetensors", PEFT, config), model)
    assert adapter.layers == (("proj_out_1/kernel", ((2, float(alpha)),)),)


@pytest.mark.parametrize("pattern", ["proj.out.1", "^proj.out_1", "x.proj_out_1", "j.out_1"])
def test_patterns_that_fit_as_regexes_alone_are_refused(pattern, model, tmp_path):
    path = written(tmp_path / "a.safetensors", PEFT, {"lora_alpha": 8, "alpha_pattern": {pattern: 5}})
    if re.match(rf"(.*\.)?({pattern})$", "proj_out_1"):  # peft.utils.other.get_pattern_key
        with pytest.raises(WeightsError, match="alpha_pattern has '.*', which as a regex fits 'proj_out_1'"):
            load_lora(path, model)
    else:
        assert load_lora(path, model).layers == (("proj_out_1/kernel", ((2, 8.0),)),)


def test_peft_finds_the_same_alphas():
    patterns = {"^blocks.1.to_q": 1, "to_k": 2, r"^blocks\.2\.to_q$": 3, "1.to_v": 4, "2.to_k": 5, "q": 6}
    found = config_of(Path("a"), {"lora_alpha": 7, "alpha_pattern": patterns}, None)
    for module in (f"{start}blocks.{i}.to_{x}" for start in ("", "a.") for i in (1, 2, 11) for x in "qkv"):
        # peft.utils.other.get_pattern_key
        keys = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
        assert found.alpha_of(module) == patterns.get(next(keys, ""), 7), module


@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_native_networks(name, tmp_path):
    settings = dict(dit=dict(heads=2), mlp={})[name]
    net = MODELS[name](shape=(4, 4, 1), width=8, depth=2, **settings)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    adapter = lora.init(jax.random.key(0), shapes, ["blocks/.*kernel$"], 2, 3)
    adapter = jax.tree.map(lambda a: a + 1, adapter)
    save_lora(adapter, net, tmp_path)
    again = load_lora(tmp_path, net)
    assert again.layers == adapter.layers
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_what_is_wrong_with_a_call(params):
    shapes = jax.eval_shape(lambda: params)
    for given, words in ((dict(targets=["(a"]), r"'\(a' is no regular"), (dict(ranks={"[": 1}), r"'\[' is no regular")):
        with pytest.raises(ValueError, match=f"lora: {words} expression"):
            lora.init(jax.random.key(0), shapes, **{"targets": ["to_q"], "rank": 2, **given})
    adapter = lora.init(jax.random.key(0), shapes, ["to_q/kernel"], 2)
    for adapters in (adapter, [adapter], (adapter, 1.0)):
        for use in (lora.apply, lora.unfuse):
            with pytest.raises(ValueError, match=r"expected pairs \(adapter, weight\), .* not Adapter"):
                use(params, adapters)


def test_a_config_counts_whatever_the_file_is_called(model, tmp_path):
    path = written(tmp_path / "a.sft", pair("proj_out_1"), {"lora_alpha": 8})
    assert load_lora(path, model).layers == (("proj_out_1/kernel", ((2, 8.0),)),)
    for name, error in (("gone.safetensors", FileNotFoundError), ("a.bin", WeightsError)):
        (tmp_path / "a.bin").write_bytes(b"pickle")
        with pytest.raises(error, match="no such folder or file|a pickle, which runs code"):
            load_lora(tmp_path / name, model)


WRONG = [
    (pair("proj_out_1") | pair("proj_out_9"), None, "2 tensors are of no module of this network: proj_out_9.lora_A"),
    (pair("proj_out_1") | {"x.bias": np.zeros(2)}, None, "1 tensors are of no module of this network: x.bias"),
    ({"proj_out_1.lora_A.weight": np.zeros((2, 16))}, None, "one factor of two: proj_out_1"),
    (pair("proj_out_1", shape=(8, 32)), None, r"factors of shape \[2, 8\] and \[32, 2\] for a weight \[32, 16\]"),
    (pair("proj_out_1") | pair("lora_unet_proj_out_1"), None, "two tensors are the a of proj_out_1"),
    (pair("a") | {"proj_out_1.lora_magnitude_vector": np.zeros(2)}, None, "is DoRA, which is not supported"),
    ({"lora_unet_proj_out_1.hada_w1_a": np.zeros(2)}, None, "is LoHa"),
    ({"lora_unet_proj_out_1.lokr_w1": np.zeros(2)}, None, "is LoKr"),
    (PEFT, None, "names are those of peft, which has alpha in adapter_config.json"),
    (pair("proj_out_1"), {"r": 2}, "its config has no lora_alpha"),
    (pair("text_encoder.proj_out_1"), {"unet.lora_alpha": 2}, "for unet, and its tensors are of text_encoder"),
    (pair("proj_out_1"), {"unet.r": 2, "prior.r": 2}, "for unet, prior, and its .* a part that they do not name"),
    (PEFT, TYPED | {"use_rslora": "false"}, "use_rslora='false' is not supported; supported: False, True"),
    (PEFT, TYPED | {"r": True}, "r=True: expected a whole number"),
    (PEFT, {"lora_alpha": "8"}, "lora_alpha='8': expected a number"),
    (PEFT, {"lora_alpha": [1] * 9999}, r"lora_alpha=\[1, 1.*\.\.\.\]: expected a number"),
    (PEFT, TYPED | {"alpha_pattern": {"(a+)+$": 1}}, r"alpha_pattern has '\(a\+\)\+\$'; expected names of modules"),
    (PEFT, TYPED | {"rank_pattern": {"[": 1}}, r"rank_pattern has '\['; expected names"),
    (PEFT, TYPED | {"alpha_pattern": {"a": "b"}}, r"alpha_pattern\['a'\]='b': expected a number"),
    (PEFT, TYPED | {"alpha_pattern": [1]}, r"alpha_pattern=\[1\]: expected a map"),
    (PEFT | {"proj_out_1.alpha": np.ones(2)}, TYPED, r"alpha of shape \[2\]: expected one finite number"),
    (PEFT | {"proj_out_1.alpha": np.float32("nan")}, TYPED, r"alpha of shape \[\]: expected one finite number"),
    ({k: v.astype(np.int32) for k, v in PEFT.items()}, TYPED, "factors of int32 and int32; expected floating point"),
    ({f"x{i}": np.zeros(1) for i in range(999)}, None, "999 tensors are of no module .*: x0.* and 994 more$"),
    (pair("proj_out_1"), {"use_dora": True}, "use_dora=True is not supported"),
    (pair("proj_out_1"), {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
    (pair("proj_out_1"), {"peft_type": "LOKR"}, "peft_type='LOKR' is not supported"),
]


@pytest.mark.parametrize("tensors, config, message", WRONG, ids=[message[-30:] for *_, message in WRONG])
def test_what_is_wrong_with_a_file(tensors, config, message, model, tmp_path):
    with pytest.raises(WeightsError, match=message):
        load_lora(written(tmp_path / "a.safetensors", tensors, config), model)


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_factors_are_of_floating_point(dtype, model):
    with pytest.raises(ValueError, match="param_dtype='.*': expected a type of floating point"):
        load_lora(GOLDEN / "peft", model, param_dtype=dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load_lora(GOLDEN / "peft", model, param_dtype="float16"))} == {
        "float16"
    }


def test_metadata_is_read_strictly(model, tmp_path):
    twice, deep = '{"r": 1, "r": 2}', "[" * 99 + "]" * 99
    other = f"its {METADATA}: expected a JSON object, got list"
    for text, message in ((twice, "the name 'r' twice"), (deep, "nested"), ("[]", other)):
        path = tmp_path / "a.safetensors"
        write(path, {k: Source.of(v) for k, v in PEFT.items()}, {METADATA: text})
        with pytest.raises(WeightsError, match=message):
            load_lora(path, model)
