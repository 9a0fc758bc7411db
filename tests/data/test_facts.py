"""What is known of a data set without its items."""

import json
import sys

import numpy as np
import pytest

from diffjax.data import Dataset, Pixels, digits, facts_of, without_items
from diffjax.data.latents import LatentPixels


def double(latents):
    """A decoder: `[N, h, w, c]` to images of twice the side."""
    return np.repeat(np.repeat(latents, 2, 1), 2, 2)


def through_json(dataset):
    return without_items(json.loads(json.dumps(facts_of(dataset))))


def test_digits_are_described_without_an_image():
    whole, known = digits(), through_json(digits())
    assert known.train is None and known.heldout is None
    assert known[2:4] == whole[2:4] == ((8, 8, 1), 10) and known.shapes == ((8, 8, 1),)
    assert known.to_pixels == Pixels(16)


@pytest.mark.parametrize("decode", ["", f"{__name__}:double"])
def test_latents_are_shown_as_the_data_set_itself_shows_them(decode):
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=(2, 4)).astype(np.float32)
    shapes = ((4, 4, 4), (2, 8, 4))
    whole = Dataset(None, None, shapes[0], 0, LatentPixels(decode, mean, scale, 1.7), shapes)
    known, x = through_json(whole), rng.normal(size=(3, 4, 4, 4)).astype(np.float32)
    assert known.shapes == shapes
    assert known.to_pixels(x).shape == ((3, 8, 8, 4) if decode else (3, 4, 4, 3))
    assert np.array_equal(known.to_pixels(x), whole.to_pixels(x))


def test_integers_of_numpy_are_described_as_well():
    whole = digits()
    odd = whole._replace(shape=tuple(np.array(whole.shape)), num_classes=np.int64(10), to_pixels=Pixels(np.uint8(16)))
    assert through_json(odd)[2:5] == whole[2:5]


def test_a_decoder_that_fails_says_so_itself(monkeypatch):
    monkeypatch.setattr(sys.modules["diffjax.data.latents"], "callable_of", lambda *_: {}["MY_WEIGHTS"])
    known = facts_of(digits()._replace(to_pixels=LatentPixels("", np.zeros(4), np.ones(4), 1.0)))
    known["pixels"]["decode"] = "my_vae:decode"
    with pytest.raises(KeyError, match="MY_WEIGHTS"):
        without_items(known)


def test_a_function_of_the_users_own_has_no_such_form():
    assert facts_of(digits()._replace(to_pixels=lambda x: x)) is None


@pytest.mark.parametrize("change", [{"shape": None}, {"pixels": {"span": 1.0}}, {"num_classes": None}])
def test_facts_of_another_form_are_refused(change):
    with pytest.raises(ValueError, match="facts of a data set of another form"):
        without_items(facts_of(digits()) | change)
