"""Pictures of an evaluation of many classes, and the small images that it compares."""

import numpy as np

from diffjax.pipelines import judge, report
from diffjax.pipelines.generate import Samples
from diffjax.pipelines.sampler import Cost, Settings


def samples_of(labels):
    images = np.broadcast_to(np.asarray(labels)[:, None, None, None] % 251, (len(labels), 4, 4, 1)).astype(np.uint8)
    return Samples(None, images, np.asarray(labels), np.arange(len(labels)), Settings(), Cost(1, 1, 1), 0.0, ())


def test_a_thousand_classes_are_shown_by_twenty_of_those_that_were_drawn(tmp_path, monkeypatch):
    drawn, real = {}, report.viz.image_grid
    monkeypatch.setattr(
        report.viz, "image_grid", lambda images, **k: drawn.update(k, images=images) or real(images, **k)
    )
    labels = np.tile(np.arange(300, 1000, 7), 12)
    path = report.draw_grid(tmp_path, samples_of(labels), num_classes=1000, max_value=255, note="")
    wanted = np.arange(300, 440, 7)
    assert drawn["column_labels"] == [str(label) for label in wanted] and drawn["columns"] == 20
    np.testing.assert_array_equal(drawn["images"][:, 0, 0, 0], np.tile(wanted % 251, 10))
    assert path.stat().st_size > 1000


def test_few_classes_are_all_shown_and_blank_where_there_is_no_sample(tmp_path, monkeypatch):
    drawn, real = {}, report.viz.image_grid
    monkeypatch.setattr(
        report.viz, "image_grid", lambda images, **k: drawn.update(k, images=images) or real(images, **k)
    )
    report.draw_grid(tmp_path, samples_of([3, 1, 3, 1]), num_classes=4, max_value=255, note="")
    np.testing.assert_array_equal(drawn["images"][:, 0, 0, 0], [0, 1, 0, 3] * 2)


def test_small_versions_are_means_of_blocks_however_many_there_are(monkeypatch):
    monkeypatch.setattr(judge, "CHUNK", 3)
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 1), dtype=np.uint8)
    means = images.astype(np.float64).reshape(7, 16, 2, 16, 2, 1).mean((2, 4))
    np.testing.assert_array_equal(judge.pooled(images), np.rint(means))
