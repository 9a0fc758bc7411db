import numpy as np
import pytest
from scipy import ndimage

from diffjax.data import AUGMENTS
from diffjax.data.augment import warp


def images(n, shape=(5, 7, 2)):
    return np.random.default_rng(0).uniform(-1, 1, (n, *shape)).astype(np.float32)


def test_shift_gives_every_whole_move_of_scipy_and_no_other():
    x = images(1)
    out = AUGMENTS["shift"](pixels=1, fill=-1.0)({"image": np.repeat(x, 300, 0)}, np.random.default_rng(1))["image"]
    moves = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1)]
    allowed = np.stack([ndimage.shift(x[0], (*move, 0), order=0, cval=-1) for move in moves])
    matches = (out[:, None] == allowed[None]).all((2, 3, 4))
    np.testing.assert_array_equal(matches.sum(1), 1)
    assert matches.any(0).all()


@pytest.mark.parametrize("move", [(0, 0), (0.3, -1.2), (9, 0)])
def test_warp_is_scipys_affine_transform(move):
    rng = np.random.default_rng(2)
    x = images(4)
    matrix = np.eye(2) + rng.uniform(-0.4, 0.4, (4, 2, 2))
    out = warp(x, matrix, np.tile(move, (4, 1)), -1.0)
    centre = np.array([2.0, 3.0])
    for i in range(4):
        inverse = np.linalg.inv(matrix[i])
        offset = centre - inverse @ (centre + move)
        for c in range(2):
            want = ndimage.affine_transform(x[i, ..., c], inverse, offset, order=1, mode="grid-constant", cval=-1)
            np.testing.assert_allclose(out[i, ..., c], want, atol=1e-5)  # float32 coordinates up to 10.


def test_affine_within_its_bounds():
    """Of a round bump: a rotation leaves it, a move of half a pixel moves its centroid so, scales its spread."""
    row, col = np.mgrid[:21, :21] - 10.0
    disc = np.exp(-(row**2 + col**2) / 8).astype(np.float32)[None, :, :, None]
    batch = {"image": np.repeat(disc, 200, 0)}
    rng = np.random.default_rng(3)
    still = {"rotate": 0, "scale": 0, "shear": 0, "translate": 0}
    turned = AUGMENTS["affine"](**{**still, "rotate": 180}, fill=0)(batch, rng)["image"]
    # Bilinear error is at most f''/8 per axis, and f'' = 1/4 at the top of a bump of variance 4.
    np.testing.assert_allclose(turned, batch["image"], atol=1 / 16)
    moved = AUGMENTS["affine"](**{**still, "translate": 0.5}, fill=0)(batch, rng)["image"][..., 0]
    centroid = (moved * row).sum((1, 2)) / moved.sum((1, 2))
    assert 0.4 < np.abs(centroid).max() < 0.505
    scaled = AUGMENTS["affine"](**{**still, "scale": 0.2}, fill=0)(batch, rng)["image"][..., 0]
    spread = (scaled * row**2).sum((1, 2)) / scaled.sum((1, 2))
    # Variance 4 times exp(2u), |u| <= .2, plus at most 1/4 + 1/4 from the bilinear kernel in each axis.
    assert 3 * np.exp(-0.4) < spread.min() < 3.5 and 4.8 < spread.max() < 4 * np.exp(0.4) + 0.5
    np.testing.assert_array_equal(AUGMENTS["affine"](**still)(batch, rng)["image"], batch["image"])


def test_affine_leaves_the_share_it_was_told_to():
    batch = {"image": images(400), "label": np.arange(400)}
    out = AUGMENTS["affine"](p=0.25)(batch, np.random.default_rng(4))
    changed = (out["image"] != batch["image"]).any((1, 2, 3)).mean()
    assert abs(changed - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 400)
    assert out["label"] is batch["label"] and out["image"].dtype == np.float32


def test_flip_mirrors_columns():
    x = images(6)
    rng = np.random.default_rng(5)
    np.testing.assert_array_equal(AUGMENTS["flip"](p=1)({"image": x}, rng)["image"], np.flip(x, 2))
    np.testing.assert_array_equal(AUGMENTS["flip"](p=0)({"image": x}, rng)["image"], x)
