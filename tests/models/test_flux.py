"""FLUX.1 beyond its comparison with PyTorch: sizes, order of tokens, rotations, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models import from_config
from diffjax.models.transformers.flux import pack, positions, rotations, unpack

TINY = {
    "_class_name": "FluxTransformer2DModel", "num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1,
    "num_single_layers": 1, "axes_dims_rope": [2, 2, 4], "in_channels": 4, "joint_attention_dim": 6,
    "pooled_projection_dim": 5,
}  # fmt: skip


def test_tokens_hold_two_by_two_pixels_channel_by_channel():
    latents = jnp.arange(4 * 6 * 3).reshape(1, 4, 6, 3)
    tokens = pack(latents)
    row, column = positions(4, 6)[4, 1:]
    square = latents[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert tokens.shape == (1, 6, 12)
    np.testing.assert_array_equal(tokens[0, 4], np.moveaxis(square, -1, 0).reshape(-1))
    np.testing.assert_array_equal(unpack(tokens, 4, 6), latents)
    with pytest.raises(ValueError, match="3 x 4"):
        pack(jnp.zeros((1, 3, 4, 1)))
    with pytest.raises(ValueError, match="6 tokens.*4 x 4"):
        unpack(tokens, 4, 4)


def test_rotations_are_those_of_float64():
    places, axes = np.stack([np.arange(4096), np.arange(4096)[::-1]], axis=1), (16, 56)
    angles = [
        places[:, [i]] * 10_000.0 ** (-np.arange(0, dim, 2) / dim) for i, dim in enumerate(axes)
    ]  # fmt: skip
    angles = np.concatenate(angles, axis=1)
    found = jax.jit(lambda places: rotations(places, axes))(places)
    # Two roundings of numbers up to 1; the products alone would be off by 2e-4.
    for wave, exact in zip(found, (np.cos(angles), np.sin(angles)), strict=True):
        np.testing.assert_allclose(wave, exact, atol=2e-7)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"axes_dims_rope": [2, 2, 2]}, "axes_dims_rope=.*attention_head_dim=8"),
        ({"axes_dims_rope": [1, 3, 4]}, "expected even numbers"),
        ({"out_channels": 0}, "out_channels=0: expected an integer >= 1"),
        ({"guidance": True}, r"unknown setting 'guidance' \(here True\); did you mean 'guidance_embeds'\?; known: "),
    ],
)
def test_settings_that_make_no_network(change, message):
    with pytest.raises(ValueError, match=message):
        from_config(TINY | change)


def test_inputs_that_do_not_fit():
    model = from_config(TINY)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def call(**change):
        given = dict(x=(2, 4, 4), t=(2,), context=(2, 3, 6), pooled=(2, 5), positions=(4, 3)) | change
        given = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in given.items()}
        first = [given.pop(name) for name in ("x", "t", "context", "pooled")]
        return jax.eval_shape(model.apply, params, *first, **given)

    assert call().shape == (2, 4, 4)
    for change, message in [
        (dict(guidance=(2,)), "takes no guidance"),
        (dict(positions=(5, 3)), r"positions has shape \(5, 3\)"),
        (dict(pooled=(2, 4)), "pooled has shape"),
        (dict(context=(1, 3, 6)), "context has shape"),
        (dict(residuals=(1, 2, 4, 9)), "residuals has shape"),
        (dict(residuals=(0, 2, 4, 8)), "residuals are empty; pass None for none"),
        (dict(single_residuals=(0, 2, 4, 8)), "single_residuals are empty"),
        (dict(t=(3,)), r"t has shape \(3,\); expected one number, or one per sample, \[2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**change)
