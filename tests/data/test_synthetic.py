"""Noise in the shape of data is a function of its index, and standard normal."""

import numpy as np
import pytest

from diffjax.data import batches
from diffjax.data.synthetic import synthetic


def test_items_are_functions_of_their_index():
    data = synthetic((4, 6, 2), 10, size=50)
    assert len(data.train) == len(data.heldout) == 50 and data.shape == (4, 6, 2) and data.num_classes == 10
    first, other = data.train[3], data.heldout[3]
    np.testing.assert_array_equal(first["image"], synthetic((4, 6, 2), 10, size=50).train[3]["image"])
    assert first["image"].shape == (4, 6, 2) and first["image"].dtype == np.float32
    assert not np.array_equal(first["image"], other["image"]) and not np.array_equal(
        first["image"], data.train[4]["image"]
    )
    with pytest.raises(IndexError, match="item 50 of 50"):
        data.train[50]


def test_batches_of_noise_are_standard_normal():
    batch = next(batches(synthetic((8, 8, 4), 3, size=200).train, 100, seed=0))
    assert batch["image"].shape == (100, 8, 8, 4) and set(batch["label"].tolist()) == {0, 1, 2}
    # 25600 draws: standard errors of 0.0063 (mean) and 0.0044 (standard deviation); four of them.
    assert abs(batch["image"].mean()) < 0.025 and abs(batch["image"].std() - 1) < 0.018


@pytest.mark.parametrize("wrong", [dict(shape=(4, 4)), dict(shape=(0, 4, 1)), dict(num_classes=-1), dict(size=0)])
def test_what_makes_no_data_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        synthetic(**wrong)
