import numpy as np
import pytest

from diffjax import registry
from diffjax.data import SOURCES, Pixels, arrays, batches, mix


def constant(n, value, classes=2):
    """A data set of n images whose pixel is `value + i / 1000`, labels `i % classes`."""
    images = np.broadcast_to((value + np.arange(n) / 1000)[:, None, None, None], (n, 2, 2, 1))
    return arrays(images.astype(np.float32), np.arange(n) % classes, heldout=n // 5)


WEIGHTS = (0.7, 0.2, 0.1)


def mixed(**settings):
    return mix([constant(50, -0.9), constant(200, 0.0), constant(20, 0.6)], WEIGHTS, **settings)


def component(images):
    """Which data set each image is from."""
    return np.digitize(images[:, 0, 0, 0], [-0.5, 0.5])


def test_every_epoch_holds_each_part_in_its_share_and_batches_do_so_in_expectation():
    train = mixed().train
    sizes = [40, 160, 16]
    # The second part sets the length: 160 items are a fifth of 800.
    assert train.epoch_length == 800 and train.counts.tolist() == [560, 160, 80] and len(train) == sum(sizes)
    stream = np.concatenate(
        [component(b["image"]) for _, b in zip(range(400), batches(train, 20, seed=0), strict=False)]
    )
    for epoch in stream.reshape(10, 800):
        assert np.bincount(epoch).tolist() == [560, 160, 80]
    counts = np.array([np.bincount(b, minlength=3) for b in stream.reshape(400, 20)])
    for k, weight in enumerate(WEIGHTS):
        # A batch is 20 of an epoch's 800 without replacement, so the count is hypergeometric, of variance
        # 20 w (1 - w) (800 - 20) / 799. That of 400 batches has a relative standard error of sqrt(2 / 399) = 7.1 %.
        spread = 20 * weight * (1 - weight) * 780 / 799
        assert abs(counts[:, k].var() / spread - 1) < 4 * 0.071


def test_the_items_of_each_part_come_equally_often_in_the_long_run():
    train = mixed().train
    seen = np.zeros(len(train), int)
    for epoch in range(7):
        np.add.at(seen, train.order(5, epoch), 1)
    for k, (start, stop) in enumerate([(0, 40), (40, 200), (200, 216)]):
        part = seen[start:stop]
        assert part.sum() == 7 * train.counts[k] and part.max() - part.min() <= 1


def test_the_order_is_random_and_follows_seed_and_epoch():
    train = mixed().train
    assert (train.order(0, 0) == train.order(0, 0)).all()
    assert (train.order(0, 0) != train.order(0, 1)).any() and (train.order(0, 0) != train.order(1, 0)).any()
    first = np.array([train.order(seed, 0)[0] < 40 for seed in range(400)])
    assert abs(first.mean() - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 400)


def test_labels_shared_separate_and_none_and_the_held_out_half_has_the_shares():
    for labels, classes, offset in (("shared", 2, 0), ("separate", 6, 2), ("none", 0, 0)):
        data = mixed(labels=labels)
        assert data.num_classes == classes
        batch = next(batches(data.train, 100, seed=0))
        found = batch["label"] - offset * component(batch["image"])
        assert batch["label"].dtype == np.int32
        assert set(found) == ({0} if labels == "none" else {0, 1})
        held = component(np.stack([data.heldout[i]["image"] for i in range(len(data.heldout))]))
        # Of 10, 40 and 4 held-out images the first allow 14 in these proportions.
        assert np.bincount(held).tolist() == [10, 3, 1]


def test_as_a_spec_and_after_a_resume():
    spec = 'mixture(("digits()", 3), ("digits(split_seed=1)", 1))'
    data = registry.build(spec, SOURCES, "data")
    assert (data.shape, data.num_classes, data.to_pixels) == ((8, 8, 1), 10, Pixels(16))
    straight = batches(data.train, 16, seed=0)
    want = [next(straight) for _ in range(6)]
    resumed = batches(data.train, 16, seed=0, threads=2)
    resumed.set_state({"next_index": 4})
    for expected in want[4:]:
        got = next(resumed)
        np.testing.assert_array_equal(got["image"], expected["image"])
        np.testing.assert_array_equal(got["label"], expected["label"])


@pytest.mark.parametrize(
    "spec, message",
    [
        ("mixture()", "weights"),
        ('mixture("digits()")', "expected pairs such as"),
        ('mixture(("digits()", 0))', "expected a positive number for each"),
        ('mixture(("digits()", "much"))', "expected a number as the weight"),
        ('mixture(("digts()", 1))', "did you mean 'digits'"),
        ('mixture(("digits()", 1), labels="some")', "labels='some'"),
        ('mixture(("digits()", 1), ("synthetic(shape=(4, 4, 1))", 1))', "one image shape"),
    ],
)
def test_what_makes_no_mixture_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        registry.build(spec, SOURCES, "data")
