"""Configs that no other test trains: they resolve, and their heads tell the truth about sizes."""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from diffjax.train import config as configs
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
