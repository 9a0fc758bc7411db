"""Both U-ViTs beyond their comparison with PyTorch: published sizes, and what is refused."""

import jax
import jax.numpy as jnp
import pytest

from diffjax.models import from_config


@pytest.mark.parametrize(
    "config, millions",
    [
        # As Bao et al. (arXiv:2209.12152) and the card of aMUSEd (arXiv:2401.01808) give them.
        (dict(_class_name="UViT", img_size=32, patch_size=2, embed_dim=512, depth=12, num_heads=8), 44),
        (dict(_class_name="UVit2DModel"), 603),
    ],
    ids=["uvit-small", "amused-256"],
)
def test_published_sizes(config, millions):
    shapes = jax.eval_shape(from_config(config).init, jax.random.key(0))
    # Some tables round, some cut.
    assert int(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 + 0.5) in (millions, millions + 1)


TINY = dict(_class_name="UViT", img_size=4, patch_size=2, embed_dim=8, depth=2, num_heads=1)


@pytest.mark.parametrize(
    "settings, change, message",
    [
        ({"qk_scale": 0.5}, {}, "qk_scale=0.5 is not supported; supported: None"),
        ({"patch_size": 3}, {}, "patch_size=3 does not divide img_size 4"),
        ({"num_heads": 3}, {}, "num_heads=3 does not divide embed_dim 8"),
        ({}, {"x": (2, 6, 6, 3)}, r"x has shape \(2, 6, 6, 3\); expected \[any, 4, 4, 3\]"),
        ({}, {"y": (2,)}, "does not take y"),
        ({"num_classes": 3}, {}, "needs y"),
        ({"clip_dim": 5, "num_clip_token": 2}, {}, "needs context"),
        ({"clip_dim": 5, "num_clip_token": 2}, {"context": (2, 3, 5)}, "context has shape"),
    ],
)
def test_what_is_refused(settings, change, message):
    given = dict(x=(2, 4, 4, 3), t=(2,)) | change
    given = {k: jax.ShapeDtypeStruct(v, jnp.int32 if k == "y" else jnp.float32) for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        model = from_config(TINY | settings)
        params = jax.eval_shape(model.init, jax.random.key(0))
        jax.eval_shape(model.apply, params, given.pop("x"), given.pop("t"), given.pop("y", None), **given)
