import numpy as np
import pytest

from diffjax.data import ArraySource, batches


def numbered(n):
    """A source whose image `i` is the constant `i`, label `i`."""
    return ArraySource(np.arange(n, dtype=np.float32)[:, None, None, None] * np.ones((2, 2, 1)), np.arange(n))


class Plain:
    """Items one at a time, no `take`."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.source[index]


def labels(iterator, n):
    return np.stack([next(iterator)["label"] for _ in range(n)])


def test_every_epoch_visits_every_item_once_in_an_order_of_its_own():
    stream = labels(batches(numbered(11), 4, seed=0), 33).reshape(-1, 11)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(11), (12, 1)))
    assert len({tuple(epoch) for epoch in stream}) == 12


def test_image_and_label_stay_together():
    batch = next(batches(numbered(9), 9, seed=1))
    np.testing.assert_array_equal(batch["image"][:, 1, 1, 0], batch["label"])


def test_first_items_of_many_epochs_are_uniform():
    first = labels(batches(numbered(8), 8, seed=2), 4000)[:, 0]
    # 500 expected in each of 8 cells; 5 standard errors of a binomial count.
    assert np.abs(np.bincount(first, minlength=8) - 500).max() < 5 * np.sqrt(4000 / 8 * 7 / 8)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 2, 7])
def test_a_restored_state_goes_on_with_the_same_batches(stop, threads):
    make = lambda: batches(numbered(10), 4, seed=3, augment="affine(rotate=90)", threads=threads)
    straight, stopped, resumed = make(), make(), make()
    expected = [next(straight) for _ in range(stop + 6)][stop:]
    for _ in range(stop):
        next(stopped)
    resumed.set_state(stopped.get_state())
    for want in expected:
        got = next(resumed)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])


def test_threads_and_take_change_nothing_but_the_seed_does():
    source = numbered(10)
    want = labels(batches(source, 4, seed=4), 9)
    np.testing.assert_array_equal(labels(batches(source, 4, seed=4, threads=2), 9), want)
    np.testing.assert_array_equal(labels(batches(Plain(source), 4, seed=4), 9), want)
    assert (labels(batches(source, 4, seed=5), 9) != want).any()


def test_augmentations_apply_in_order_and_their_draws_follow_seed_and_batch():
    double = lambda batch, rng: {**batch, "image": batch["image"] * 2}
    noise = lambda batch, rng: {**batch, "image": batch["image"] + rng.random()}
    run = lambda seed, *fns: [next_["image"] for next_, _ in zip(batches(numbered(6), 6, seed=seed, augment=fns),
                                                                 range(3), strict=False)]  # fmt: skip
    plain, once = run(0), run(0, double, noise)
    offsets = [(b - 2 * a).ravel() for a, b in zip(plain, once, strict=True)]
    for offset in offsets:
        np.testing.assert_allclose(offset, offset[0], atol=1e-6)  # One draw a batch; float32 rounding of values to 10.
        assert 0 < offset[0] < 1
    assert len({round(float(offset[0]), 5) for offset in offsets}) == 3
    for a, b in zip(once, run(0, double, noise), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_batch_may_be_written_to_without_changing_the_data():
    source = numbered(4)
    batch = next(batches(source, 4, seed=0))
    batch["image"][:] = -5
    assert source.images.min() == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 11, "seed": 0}, "batch_size=11 with 10 items; expected 1 .. 10"),
        ({"batch_size": 0, "seed": 0}, "batch_size=0"),
        ({"batch_size": 2, "seed": -1}, "seed=-1"),
        ({"batch_size": 2, "seed": 0, "augment": "shfit"}, "did you mean 'shift'"),
        ({"batch_size": 2, "seed": 0, "augment": "shift(pixel=2)"}, "pixels"),
        ({"batch_size": 2, "seed": 0, "augment": "shift(pixels=0.5)"}, "affine"),
        ({"batch_size": 2, "seed": 0, "augment": "affine(scale=-1)"}, "scale=-1"),
        ({"batch_size": 2, "seed": 0, "augment": "flip(p=2)"}, "probability"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_batch(settings, message):
    with pytest.raises(ValueError, match=message):
        batches(numbered(10), **settings)
