"""LoRA by the names of a network's authors, as kohya's scripts write it for SDXL, SD3 and FLUX.1."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from diffjax.adapters import lora
from diffjax.convert import WeightsError, load_lora, load_original
from diffjax.convert.weights.adapters.lora_names import targets_of
from diffjax.convert.weights.tensors import Source, write
from diffjax.models import from_config
from diffjax.models.published import published
from diffjax.nn.functional import names_of

PARITY = Path(__file__).parents[1] / "parity"
sys.path.insert(0, str(PARITY))
import networks  # noqa: E402

GOLDEN = PARITY / "golden"
NAMES, CONVERTED = (
    json.loads(gzip.decompress((GOLDEN / "originals" / f"{name}.json.gz").read_bytes()))
    for name in ("names", "converted")
)
PREFIX = "model.diffusion_model."
CASES = {"tiny-sd3": "transformer", "tiny-flux": "transformer", "tiny-sdxl": "unet", "tiny-sd": "unet"}


def written(path, tensors):
    sources = {k: Source(v.dtype, v.shape, lambda v=v: np.asarray(v)) for k, v in tensors.items()}
    write(path, sources, {})
    return path


def changes(adapter):
    """What the adapter adds to each kernel, in numpy: compiling hundreds of products takes longer."""
    for name, layers in adapter.layers:
        factors = [layer.alpha / layer.rank for layer in layers]
        a, b = (np.asarray(leaf if lora.stacked(name) else leaf[None]) for leaf in adapter.pairs[name])
        whole = np.stack([f * np.tensordot(*pair, 1) for f, *pair in zip(factors, a, b, strict=True)])
        yield name, whole if lora.stacked(name) else whole[0]


@pytest.mark.often("tiny-sd3", "tiny-flux")
@pytest.mark.parametrize("case", CASES)
def test_a_change_of_the_authors_tensors_is_that_of_ours(case, tmp_path):
    """Every matrix and convolution of the file gets one; B A is added to the file, or to what was read from it."""
    tensors = {name: networks.weight(name, tuple(shape)) for name, shape in NAMES[case].items()}
    merged, factors = dict(tensors), {}
    for name, whole in tensors.items():
        module = name.removesuffix(".weight").removeprefix(PREFIX)
        if module == name.removeprefix(PREFIX) or whole.ndim < 2:
            continue
        key = "lora_unet_" + module.replace(".", "_")
        down, up = networks.weight(f"{key}/a", (2, *whole.shape[1:])), networks.weight(f"{key}/b", (len(whole), 2))
        factors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": np.float32(3)}
        merged[name] = whole + 1.5 * (up @ down.reshape(2, -1)).reshape(whole.shape)
    read = lambda name, held: load_original(
        written(tmp_path / name, held), CASES[case], config=CONVERTED[case]["config"]
    )
    model, params = read("plain.safetensors", tensors)
    _, wanted = read("merged.safetensors", merged)
    adapter = load_lora(written(tmp_path / "lora.safetensors", factors), model)
    assert sum(layer.rank > 0 for _, layers in adapter.layers for layer in layers) == len(targets_of(model))
    before, after = names_of(params), names_of(wanted)
    for name, added in changes(adapter):
        np.testing.assert_allclose(before.pop(name) + added, after[name], atol=1e-5, err_msg=name)
        assert np.abs(added).max() > 0.01
    assert not any(name.endswith("kernel") for name in before)


def test_changes_of_flux_are_those_of_diffusers(tmp_path):
    facts = json.loads((GOLDEN / "adapters" / "lora_flux.json").read_text())
    drawn = {k: networks.weight(k, tuple(s)) if s else np.float32(3) for k, s in facts["shapes"].items()}
    model = from_config(published("flux_dev/transformer", num_layers=1, num_single_layers=1))
    path = written(tmp_path / "a.safetensors", drawn)
    adapter, seen = load_lora(path, model), {}
    for module, target in targets_of(model).items():
        layer = dict(adapter.layers).get(target.parameter, {target.layer: None})[target.layer]
        if layer:
            a, b = (np.asarray(factor[target.layer] if lora.stacked(target.parameter) else factor, np.float64)
                    for factor in adapter.pairs[target.parameter])
            u, v = (networks.draw(module, side, ("normal", (n,))) for side, n in (("u", b.shape[1]), ("v", len(a))))
            seen[module] = layer.alpha / layer.rank * (np.float64(v) @ a) @ (b @ np.float64(u))
    assert seen.keys() == facts["changes"].keys()
    np.testing.assert_allclose([*seen.values()], [facts["changes"][module] for module in seen], rtol=1e-5)


def test_factors_of_a_module_and_of_several_with_it(tmp_path):
    config = CONVERTED["tiny-sd3"]["config"]
    model = from_config({"_class_name": "SD3Transformer2DModel", **config})
    shape = targets_of(model)["transformer_blocks.0.attn.to_q"].shape
    whole, one = "lora_unet_joint_blocks_0_x_block_attn_qkv", "transformer_blocks.0.attn.to_q"
    factors = {
        f"{whole}.lora_down.weight": np.ones((1, shape[1])), f"{whole}.lora_up.weight": np.ones((3 * shape[0], 1)),
        f"{one}.lora_A.weight": np.ones((1, shape[1])), f"{one}.lora_B.weight": np.ones((shape[0], 1)),
    }  # fmt: skip
    with pytest.raises(WeightsError, match="and within those of several modules: transformer_blocks.0.attn.to_q"):
        load_lora(written(tmp_path / "a.safetensors", factors), model)
