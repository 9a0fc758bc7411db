"""Checkpoints under the names of their authors, against diffusers' conversion and the authors' own networks.

Names and shapes are those that the authors' code gives, the results those of diffusers; see `parity/originals.py`.
"""

import gzip
import hashlib
import json
import math
from pathlib import Path

import networks
import numpy as np
import pytest

from diffjax.convert.weights import WeightsError, load, load_original, original_components, save_original
from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.originals import survey_original
from diffjax.convert.weights.originals.load import infer
from diffjax.convert.weights.tensors import Source, Tensor, write
from diffjax.nn.functional import names_of

PARITY = Path(__file__).parents[3] / "parity"
GOLDEN = PARITY / "golden" / "originals"
NAMES, CONVERTED = (
    json.loads(gzip.decompress((GOLDEN / f"{name}.json.gz").read_bytes())) for name in ("names", "converted")
)
TINY = [case for case in NAMES if case.startswith("tiny")]
COMPONENTS = {"openclip": "text_encoder", "vae": "vae", "flux": "transformer", "sd3": "transformer"}


def component_of(case):
    if case == "openclip-sdxl":
        return "text_encoder_2"
    return next((component for part, component in COMPONENTS.items() if part in case), "unet")


def file_of(folder, tensors, name="model.safetensors"):
    sources = {key: Source.of(a) for key, a in tensors.items()}
    write(folder / name, sources, {})
    return folder / name


def drawn(case):
    return {name: networks.weight(name, tuple(shape)) for name, shape in NAMES[case].items()}


@pytest.mark.parametrize("case", TINY)
def test_tensors_are_diffusers_bit_for_bit(tmp_path, case):
    path = file_of(tmp_path, drawn(case))
    found = survey_original(path, component_of(case), config=CONVERTED[case]["config"])
    assert not any(found.report)
    wanted = CONVERTED[case]["tensors"]
    got = {
        name: [list(t.shape), hashlib.sha256(np.ascontiguousarray(t.part()).tobytes()).hexdigest()[:16]]
        for name, t in found.tensors.items()
    }
    assert got == wanted


@pytest.mark.parametrize(
    "case", ["tiny-vae", pytest.param("tiny-sd", marks=pytest.mark.slow), "tiny-sdxl", "tiny-sd3", "tiny-flux"]
)
def test_what_is_written_is_what_was_read(tmp_path, case):
    path = file_of(tmp_path, drawn(case))
    save_original(*load_original(path, component_of(case), config=CONVERTED[case]["config"]), tmp_path / "again")
    first, again = find(path), find(tmp_path / "again")
    if case == "tiny-vae":  # the authors' older networks have these matrices as convolutions of one pixel, as this has
        assert first["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in again.items()}
    assert all(first[name].part().tobytes() == again[name].part().tobytes() for name in first)


def nowhere(case):
    """A file of the published sizes, of which only the header is asked for."""
    return {name: Tensor(Path("model.safetensors"), np.dtype("<f4"), tuple(s), 0) for name, s in NAMES[case].items()}


@pytest.mark.parametrize("case", [case for case in NAMES if case not in TINY])
def test_published_networks_are_known_by_their_shapes(monkeypatch, case):
    monkeypatch.setattr("diffjax.convert.weights.originals.contents.find", lambda path: nowhere(case))
    contents, component = original_components("model.safetensors"), component_of(case)
    assert list(contents.parts) == [component] and not contents.rest
    published = CONVERTED[case]["config"]
    got = infer(contents, component, "sd" if case == "vae-sd" else None)
    # Defaults of diffusers that the inferred config spells out.
    defaults = {"transformer_layers_per_block": 1, "use_linear_projection": False}
    for name, value in {**defaults, **published}.items():
        if name in got or name in published:
            assert got.get(name) == value, name


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in NAMES if case not in TINY])
def test_published_networks_fit_name_by_name(monkeypatch, case):
    monkeypatch.setattr("diffjax.convert.weights.originals.contents.find", lambda path: nowhere(case))
    found = survey_original("model.safetensors", component_of(case), family="sd" if case == "vae-sd" else None)
    assert found.tensors and not any(found.report)


def whole(case="tiny-sd"):
    """A file with all parts of a small Stable Diffusion, an average of the U-Net, and what else such files have."""
    tensors = {**drawn(case), **drawn("tiny-vae"), **drawn("tiny-openclip")}
    for name in NAMES[case]:
        flat = "model_ema.diffusion_model" + name.removeprefix("model.diffusion_model.").replace(".", "")
        tensors[flat] = tensors[name] + np.float32(1)
    tensors |= {"model_ema.decay": np.float32(0.99), "betas": np.zeros(4, np.float32)}
    return {name: np.asarray(array) for name, array in tensors.items()}


def test_a_whole_pipeline_in_one_file(tmp_path):
    path = file_of(tmp_path, whole())
    contents = original_components(path)
    assert (contents.family, contents.rest) == ("sd", ("betas",))
    assert list(contents.parts) == ["text_encoder", "unet", "unet_ema", "vae"]
    # The last layer of the text encoder, its projection and the scale of its logits.
    assert len(contents.parts["text_encoder"].ignored) == 12 + 2
    assert list(contents.parts["unet_ema"].ignored) == ["decay"]
    config = CONVERTED["tiny-sd"]["config"]
    (_, params), (_, mean) = (load_original(path, name, config=config) for name in ("unet", "unet_ema"))
    for name, leaf in names_of(params).items():
        assert np.array_equal(names_of(mean)[name], leaf + np.float32(1)), name
    with pytest.raises(WeightsError, match="no component 'text_encoder_2'; it has: text_encoder, unet, unet_ema, vae"):
        load_original(path, "text_encoder_2")


@pytest.mark.parametrize("case", ["tiny-vae", "tiny-flux", "tiny-openclip"])
def test_each_tensor_is_accounted_for(tmp_path, case):
    tensors, config, component = drawn(case), CONVERTED[case]["config"], component_of(case)
    prefix = {"tiny-vae": "first_stage_model.", "tiny-openclip": "cond_stage_model.model."}.get(case, "")
    path = file_of(tmp_path, {**tensors, f"{prefix}strange.weight": np.zeros(3, np.float32)})
    with pytest.raises(WeightsError, match=r"1 unexpected: strange\.weight"):
        load_original(path, component, config=config)
    ends = ("decoder.conv_out.weight", "linear2.weight", "ln_final.weight")
    gone = next(name for name in tensors if name.endswith(ends))
    path = file_of(tmp_path, {name: array for name, array in tensors.items() if name != gone})
    with pytest.raises(WeightsError, match=f"1 missing: {gone.removeprefix(prefix)}"):
        load_original(path, component, config=config)
    path = file_of(tmp_path, {**tensors, gone: tensors[gone][1:]})
    with pytest.raises(WeightsError, match=f"1 of another shape: {gone.removeprefix(prefix)}"):
        load_original(path, component, config=config)


def test_of_a_fused_tensor_only_the_part_is_read(tmp_path, monkeypatch):
    path, case = file_of(tmp_path, drawn("tiny-flux")), "tiny-flux"
    found = survey_original(path, "transformer", config=CONVERTED[case]["config"])
    read = []
    from diffjax.convert.weights.tensors import read as reading

    real = reading._read
    noted = lambda file, out, tensor: (read.append((tensor.offset, tensor.nbytes)), real(file, out, tensor))
    monkeypatch.setattr(reading, "_read", noted)
    whole_tensor = original_components(path).parts["transformer"].tensors["single_blocks.1.linear1.weight"]
    at = 0
    for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"):
        part = found.tensors[f"single_transformer_blocks.1.{name}.weight"]
        part.part()
        assert read.pop() == (whole_tensor.offset + at, part.nbytes) and not read
        at += part.nbytes
    assert at == whole_tensor.nbytes
    # Half of exchanged halves is one of them.
    swapped = found.tensors["norm_out.linear.weight"]
    swapped.part((slice(0, 32),))
    assert sum(size for _, size in read) == 4 * math.prod(swapped.shape) // 2


def test_text_encoders_under_the_names_of_transformers(tmp_path):
    """Stable Diffusion 3 and FLUX.1 with their text encoders inside, as ComfyUI's files have them."""
    facts = lambda name: json.loads(str(np.load(PARITY / "golden" / "networks" / f"{name}.npz")["facts"]))
    clip, t5 = facts("clip-text"), facts("t5")
    text = {name.removeprefix("text_model."): networks.weight(name, tuple(s)) for name, s in clip["shapes"].items()}
    text = {f"text_encoders.clip_l.transformer.text_model.{name}": array for name, array in text.items()}
    t5_prefix = "text_encoders.t5xxl.transformer."
    other = {t5_prefix + name: networks.weight(name, tuple(s)) for name, s in t5["shapes"].items()}
    sd3 = file_of(tmp_path, {**drawn("tiny-sd3"), **text, **other}, "sd3.safetensors")
    assert list(original_components(sd3).parts) == ["text_encoder", "text_encoder_3", "transformer"]
    config = {k: v for k, v in clip["config"].items() if k != "architectures"} | {"projection_dim": 16}
    _, params = load_original(sd3, "text_encoder", config=config)
    # There is no projection in these files, which stands for none at all.
    projection = names_of(params)["text_projection/kernel"]
    assert np.array_equal(projection, np.eye(len(projection)))
    flux = file_of(tmp_path, {f"model.diffusion_model.{k}": v for k, v in drawn("tiny-flux").items()} | text | other)
    contents = original_components(flux)
    assert {name: part.kind for name, part in contents.parts.items()} == {
        "text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel", "transformer": "FluxTransformer2DModel",
    }  # fmt: skip
    _, params = load_original(flux, "text_encoder_2", config=t5["config"])
    assert np.array_equal(names_of(params)["shared/embedding"], other[t5_prefix + "shared.weight"])
    found = infer(contents, "text_encoder_2")
    for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets"):
        assert found[name] == t5["config"][name], name


def test_a_lone_autoencoder_needs_its_family(tmp_path):
    path = file_of(tmp_path, {name.removeprefix("first_stage_model."): a for name, a in drawn("tiny-vae").items()})
    with pytest.raises(WeightsError, match="give family=, one of sd, sd2, sdxl"):
        load_original(path, "vae")
    model, _ = load_original(path, "vae", family="sdxl")
    assert model.config["scaling_factor"] == 0.13025


def test_names_and_shapes_that_no_network_has(tmp_path):
    convolution, tower = np.zeros((4, 4, 3, 3), np.float32), "text_encoders.clip_g.transformer"
    for tensors, words in (
        ({"input_blocks.0.0.weight": convolution, "input_blocks.99999999999.x": convolution}, "not numbered through"),
        ({"encoder.down.0.block.0.conv1.weight": convolution, "decoder.conv_in.weight": np.float32(1)}, "give family="),
        ({"encoder.down.0.block.0.conv1.weight": convolution}, "give family="),
        ({f"{tower}.text_model.embeddings.position_embedding.weight": convolution}, "no config"),
    ):
        path = file_of(tmp_path, {name: np.asarray(array) for name, array in tensors.items()})
        component = next(iter(original_components(path).parts))
        with pytest.raises(WeightsError, match=f"{path}: .*{words}"):
            load_original(path, component)
    config = {"architectures": ["CLIPTextModelWithProjection"], "hidden_size": 4, "num_attention_heads": 1}
    config |= {"num_hidden_layers": 1, "intermediate_size": 4, "vocab_size": 3}
    with pytest.raises(WeightsError, match=f"{path}: .*missing"):
        load_original(path, "text_encoder_2", config=config)
    path = file_of(tmp_path, {f"cond_stage_model.model.transformer.resblocks.{'9' * 5000}.a": convolution} | {
        "cond_stage_model.model.positional_embedding": convolution
    })  # fmt: skip
    assert list(original_components(path).parts) == ["text_encoder"]


@pytest.mark.parametrize("config", [{"num_layers": 10**9}, {"num_layer": 1}, {"dual_attention_layers": [0, 10**9]}])
def test_a_wrong_config_is_told_with_the_file(tmp_path, config):
    path = file_of(tmp_path, drawn("tiny-sd3"))
    with pytest.raises(WeightsError, match=f"^{path}: .*{next(iter(config))}"):
        load_original(path, "transformer", config=CONVERTED["tiny-sd3"]["config"] | config)


def test_a_folder_is_written_and_read(tmp_path, capsys):
    from diffjax import cli

    path = file_of(tmp_path, whole())
    # No published U-Net is as narrow: its heads are not guessed.
    assert cli.main(["inspect", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.count("channels wide, and no shape tells its heads: give its config") == 2
    assert "unet_ema" in out and "UNet2DConditionModel" in out and "of no network: betas, " in out
    assert cli.main(["convert", str(path), str(tmp_path / "vae"), "--component=vae", "--dtype=float16"]) == 0
    _, params = load(tmp_path / "vae")
    _, wanted = load_original(path, "vae", param_dtype="float16")
    for name, leaf in names_of(params).items():
        assert np.asarray(leaf).tobytes() == np.asarray(names_of(wanted)[name]).tobytes(), name
    for argv, words in (
        ([str(path), str(tmp_path / "x")], "--component="),
        ([str(path), str(tmp_path / "x"), "--component=vae", "--variant=fp16"], "variant='fp16' chooses among"),
        ([str(path), str(tmp_path), "--component=vae", "--overwrite"], "itself; name another one"),
        ([str(path), str(path), "--component=vae", "--overwrite", "--keys=original"], "the source itself"),
    ):
        before = path.read_bytes()
        assert cli.main(["convert", *argv]) == 2 and words in capsys.readouterr().err
        assert path.read_bytes() == before and not (tmp_path / "x").exists()
    lone = {name.removeprefix("first_stage_model."): a for name, a in drawn("tiny-vae").items()}
    (tmp_path / "lone").mkdir()
    lone = file_of(tmp_path / "lone", lone)
    # The only network of a file need not be named.
    assert cli.main(["convert", str(lone), str(tmp_path / "y"), "--family=sd"]) == 0
    assert json.loads((tmp_path / "y" / "config.json").read_text())["scaling_factor"] == 0.18215
