"""Configs that no other test trains: they resolve, and their heads tell the truth about sizes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from diffjax.convert import save
from diffjax.core import SCHEDULES
from diffjax.models import from_config
from diffjax.registry import build
from diffjax.train import config as configs
from diffjax.train.errors import ConfigError
from diffjax.train.parts import assemble, prepare
from diffjax.train.state import abstract_state

ROOT = Path(__file__).parent.parent


def parameters(parts):
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_state(parts).params))


@pytest.mark.parametrize("name, millions", [("dit_xl_2", 675), ("dit_12b", 12_100)])
def test_the_large_networks_have_the_size_that_their_heads_state(name, millions):
    # Without a look at the devices: the largest needs a mesh of many.
    parts = assemble(configs.fill(configs.load(str(ROOT / "configs" / f"{name}.py"))))
    # Three digits are stated.
    assert parameters(parts) / 1e6 == pytest.approx(millions, rel=5e-3)


@pytest.mark.parametrize("size, grey", [(24, True), (64, False)])
def test_a_folder_whose_name_has_quotes_and_blanks(tmp_path, size, grey):
    folder = tmp_path / 'the "other" cat\'s'
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 25, 25, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    config = configs.load(
        f"{ROOT}/configs/folder.py:path={folder},size={size}{',grey' if grey else ''},width=16,batch=16"
    )
    config, parts = prepare(config)
    assert parts.dataset.shape == (size, size, 1 if grey else 3) and len(parts.dataset.train) == 36
    assert config.batch_size == 16 and config.model.width == 16
    if grey:
        assert parameters(parts) / 1e3 == pytest.approx(358, rel=5e-3)


@pytest.mark.parametrize("labels, classes", [("", 2), (",labels=False", 0)])
def test_folders_in_it_are_classes_unless_told_otherwise(tmp_path, labels, classes):
    for i in range(40):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (24, 24)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    config = configs.load(f"{ROOT}/configs/folder.py:path={tmp_path},size=24{labels}")
    assert assemble(configs.fill(config)).dataset.num_classes == classes


def test_a_folder_is_asked_for():
    with pytest.raises(ValueError, match="say where the images are"):
        configs.load(f"{ROOT}/configs/folder.py:size=64")
    with pytest.raises(ValueError, match="size=30: expected a multiple of 8"):
        configs.load(f"{ROOT}/configs/folder.py:path=x,size=30")


@pytest.mark.often("DiT*")
@pytest.mark.parametrize("kind, out", [("UNet2DModel", 1), ("DiTTransformer2DModel", 2)])
def test_a_published_network_is_tuned_as_it_is(tmp_path, kind, out):
    network = {"_class_name": kind, "in_channels": 1, "out_channels": out, "sample_size": 8}
    unet = dict(block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, attention_head_dim=4)
    unet |= dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    dit = dict(num_attention_heads=2, attention_head_dim=4, num_layers=1, num_embeds_ada_norm=10)
    net = from_config(network | (unet if kind == "UNet2DModel" else dit))
    save(net, jax.jit(net.init)(jax.random.key(0)), tmp_path)
    config, parts = prepare(configs.load(f"{ROOT}/configs/tune.py:path={tmp_path},smoke"))
    shapes = lambda model: jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(model.init, jax.random.key(0)))
    assert shapes(parts.model) == shapes(net)
    # The network is told the schedule's own times, and has labels where the checkpoint has.
    assert config.model.time_scale * parts.schedule.t_max == 999
    assert (config.label_dropout > 0) == (kind != "UNet2DModel") and (out == 2) == bool(config.loss.variance)
    config.model.time_scale = 1000.0
    with pytest.raises(ConfigError, match="would be told 999000; set config.model.time_scale=1.0"):
        prepare(config)


def test_what_is_tuned_has_the_noise_and_the_output_of_its_scheduler_file(tmp_path):
    network, file = tmp_path / "unet", tmp_path / "scheduler" / "scheduler_config.json"
    for folder in (network, file.parent):
        folder.mkdir()
    (network / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    told = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01}

    def tuned(noise="", **changes):
        file.write_text(json.dumps(told | {"prediction_type": "v_prediction"} | changes))
        config = configs.load(f"{ROOT}/configs/tune.py:path={network}{noise}")
        return config.schedule, config.head, config.time

    found = "scaled_linear(num_steps=1000, start=0.001, end=0.01)", "v", "discrete(num_steps=1000)"
    assert tuned() == tuned(noise=",noise=scaled_linear") == found
    cosine = tuned(beta_schedule="squaredcos_cap_v2", num_train_timesteps=9, rescale_betas_zero_snr=True)
    assert cosine[::2] == ("squared_cosine(num_steps=9, rescale=True)", "discrete(num_steps=9)")
    for schedule in (found[0], cosine[0]):
        build(schedule, SCHEDULES, "schedule")
    with pytest.raises(ValueError, match="noise=ddpm: .* says scaled_linear"):
        tuned(noise=",noise=ddpm")
    for wrong in (dict(prediction_type="flow_prediction"), dict(beta_schedule="laplace"), dict(trained_betas=[0.1])):
        with pytest.raises(ValueError, match=f"scheduler_config.json: {next(iter(wrong))}="):
            tuned(**wrong)
    file.unlink()
    assert configs.load(f"{ROOT}/configs/tune.py:path={network}").schedule == "ddpm()"


def test_a_checkpoint_is_asked_for(tmp_path):
    (tmp_path / "ncsnpp").mkdir()
    (tmp_path / "ncsnpp" / "config.json").write_text('{"_class_name": "UNet2DModel", "time_embedding_type": "fourier"}')
    with pytest.raises(ValueError, match="is told noise levels"):
        configs.load(f"{ROOT}/configs/tune.py:path={tmp_path / 'ncsnpp'}")
    with pytest.raises(ValueError, match="expected the folder of a checkpoint"):
        configs.load(f"{ROOT}/configs/tune.py:path={tmp_path}")
    (tmp_path / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    with pytest.raises(ValueError, match="no config trains a SD3Transformer2DModel: .* docs/init_from.md"):
        configs.load(f"{ROOT}/configs/tune.py:path={tmp_path}")
