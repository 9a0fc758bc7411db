"""The transformer's patches, positions and loop over blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models import dit, from_config
from diffjax.models.dit import patchify, unpatchify

SETTINGS = dict(shape=(4, 8, 2), num_classes=3, patch=2, width=16, depth=3, heads=2, mlp_ratio=2.0, dropout=0.2)


def test_patches_hold_neighbouring_pixels():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[1, 4], x[1, 2:4, 2:4].ravel())
    np.testing.assert_array_equal(unpatchify(tokens, 2, (4, 6, 3)), x)


@pytest.fixture(scope="module")
def case():
    params = jax.jit(dit(**SETTINGS).init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: np.asarray(a) + 0.2 * rng.normal(size=a.shape).astype(np.float32), params)
    x = jax.random.normal(jax.random.key(1), (2, 4, 8, 2))
    return params, x, jnp.array([0.2, 0.8]), jnp.array([1, 3])


@pytest.mark.slow
@pytest.mark.parametrize("loop", [dict(scan=False), dict(remat=True)], ids=["unrolled", "remat"])
def test_scan_unrolled_and_rematerialised_are_one_function(case, loop):
    params, x, t, y = case
    key = jax.random.key(2)

    def value_and_gradient(**settings):
        model = dit(**SETTINGS, **settings)
        return jax.jit(jax.value_and_grad(lambda p: (model.apply(p, x, t, y, key=key) ** 2).mean()))(params)

    ours, expected = value_and_gradient(**loop), value_and_gradient()
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        # The same sums in another order.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_stacked_blocks_start_different():
    params = jax.jit(dit(**SETTINGS).init)(jax.random.key(0))
    kernels = np.asarray(params["blocks"]["attention"]["qkv"]["kernel"])
    assert kernels.shape == (3, 16, 48)
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    # Xavier uniform of a 16 x 48 matrix has the variance 2 / (16 + 48); 768 draws know it to 4 x 3.2 %.
    np.testing.assert_allclose(kernels.var((1, 2)), 2 / 64, rtol=0.13)


def test_tokens_know_where_they_are(case):
    params, x, t, y = case
    model = dit(**SETTINGS)
    same = np.ones(x.shape, np.float32)
    tokens = np.asarray(jax.jit(lambda *given: patchify(model.apply(*given), 2))(params, same, t, y))[0]
    gaps = np.abs(tokens[:, None] - tokens[None]).max(-1) + np.eye(8)
    assert gaps.min() > 1e-3


CHECKPOINT = dict(
    _class_name="DiTTransformer2DModel", num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4,
    num_embeds_ada_norm=3,
)  # fmt: skip


@pytest.mark.parametrize(
    "x, y, message",
    [
        ((2, 4, 5, 4), (2,), "patch_size=2 does not divide the sides of x, 4, 5"),
        ((2, 4, 4, 4), None, "this network needs y; the label 3 is no class"),
        ((2, 4, 4, 4), (1,), r"y has shape \(1,\); expected \[2\]"),
    ],
)
def test_inputs_that_do_not_fit_one_of_a_checkpoint(x, y, message):
    model = from_config(CHECKPOINT)
    params = jax.eval_shape(model.init, jax.random.key(0))
    y = y if y is None else jax.ShapeDtypeStruct(y, jnp.int32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct(x, jnp.float32), jnp.zeros(2), y)
