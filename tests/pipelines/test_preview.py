"""Pictures of a run while it trains: what they show, and that they change nothing."""

import io

import jax
import numpy as np
from matplotlib.image import imread
from ml_collections import ConfigDict

from diffjax.data import Pixels
from diffjax.pipelines.preview import preview, sheet
from diffjax.train.checkpoint import open_checkpoints
from diffjax.train.loop import train
from diffjax.train.parts import prepare


def test_a_sheet_has_the_images_row_by_row():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1) * np.ones((1, 70, 64, 1), np.uint8)
    page = sheet(images, 3)
    assert page.shape == (2 * 72 - 2, 3 * 66 - 2, 1)
    for i in range(6):
        top, left = 72 * (i // 3), 66 * (i % 3)
        assert (page[top : top + 70, left : left + 64] == i).all()
    assert (page[70:72] == 128).all() and (page[:, 64:66] == 128).all()
    # 8 x 8 images are enlarged eight times, and of 4 channels three are shown.
    assert sheet(np.zeros((2, 8, 8, 4), np.uint8), 2).shape == (64, 130, 3)


class Halving:
    """A decoder: the integers 0 .. 16 of images of twice the size."""

    high = 16

    def __call__(self, x):
        return Pixels(16)(np.asarray(x).repeat(2, 1).repeat(2, 2))


def test_a_picture_shows_what_the_data_set_makes_of_samples():
    resolved, parts = prepare(config(sample=dict(steps=1)))
    parts = parts._replace(dataset=parts.dataset._replace(to_pixels=Halving()))
    page = preview(resolved, parts)(parts.model.init(jax.random.key(0)), 0)
    # 8 x 8 digits, decoded to 16 x 16 and enlarged four times.
    assert page.shape == (4 * 66 - 2, 10 * 66 - 2, 1)
    blocks = page[:64, :64, 0].reshape(8, 8, 8, 8)
    assert (blocks == blocks[:, :1, :, :1]).all()
    # Sixteenths of 255.
    assert set(np.unique(blocks)) <= {round(i * 255 / 16) for i in range(17)}


def config(**changes):
    model = dict(name="mlp", width=8, depth=1)
    sample = dict(steps=2)
    given = dict(batch_size=8, num_steps=6, log_every=2, checkpoint_every=6, model=model, sample=sample)
    return ConfigDict(given | changes)


def test_samples_and_a_profile_are_written_and_the_training_keeps_its_bits(tmp_path):
    for name, changes in {"plain": {}, "shown": dict(sample_every=4, profile=(2, 4))}.items():
        train(config(**changes), str(tmp_path / name), stream=io.StringIO(), preview=preview)
    plain, shown = (
        open_checkpoints(tmp_path / name / "checkpoints").restore_part("params") for name in ("plain", "shown")
    )
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (plain, shown)), strict=True))
    pictures = sorted(path.name for path in (tmp_path / "shown" / "samples").iterdir())
    assert pictures == ["samples_000004.png", "samples_000006.png"]
    picture = imread(tmp_path / "shown" / "samples" / pictures[-1])
    assert picture.shape[:2] == (4 * 66 - 2, 10 * 66 - 2) and picture.std() > 0
    assert list((tmp_path / "shown" / "profile").rglob("*.xplane.pb"))
    assert not (tmp_path / "plain" / "samples").exists() and not (tmp_path / "plain" / "profile").exists()
