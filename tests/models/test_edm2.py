"""EDM2's U-Net: published sizes, forced normalisation, labels, the official names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.convert import load, save
from diffjax.convert.weights.tensors import Source, read_header, write
from diffjax.models import from_config
from diffjax.models.unets.edm2 import mp_cat, mp_sum, normalize
from diffjax.nn import tapped
from diffjax.nn.functional import names_of

TINY = {
    "_class_name": "EDM2UNet", "img_resolution": 4, "img_channels": 1, "label_dim": 3, "model_channels": 8,
    "channel_mult": [1], "num_blocks": 1, "logvar_channels": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def net():
    model, rng = from_config(TINY), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    # Gains of one: a new network has zeros.
    draw = lambda leaf: np.float32(rng.standard_normal(leaf.shape)) if leaf.ndim else np.float32(1)
    return model, jax.tree.map(draw, shapes)


def test_forced_normalisation_changes_weights_and_hardly_the_output(net):
    model, params = net
    x, t = jax.random.normal(jax.random.key(1), (2, 4, 4, 1)), jnp.zeros(2)
    run = jax.jit(model.apply)
    grown = jax.tree.map(lambda a: 3 * a if a.ndim > 1 else a, params)
    held = normalize(grown)
    for name, leaf in names_of(held).items():
        if name.endswith("kernel"):
            np.testing.assert_allclose(np.square(leaf).mean(tuple(range(leaf.ndim - 1))), 1, rtol=1e-3)
        else:
            np.testing.assert_array_equal(leaf, names_of(params)[name])
    # The 1e-4 beside the norm is what is left of the weights' size.
    np.testing.assert_allclose(run(grown, x, t), run(held, x, t), atol=2e-3)


def test_no_class_by_number_by_row_and_by_default(net):
    model, params = net
    embed = lambda y: model.apply(params, jnp.zeros(2), y, method="_embed")
    none = embed(None)
    np.testing.assert_array_equal(embed(jnp.full(2, 3)), none)
    np.testing.assert_array_equal(embed(jnp.eye(3)[:2]), embed(jnp.arange(2)))
    assert np.abs(embed(jnp.arange(2)) - none).max() > 1e-2
    with pytest.raises(ValueError, match=r"y has shape \(3,\); expected \[2\]"):
        embed(jnp.arange(3))


def test_labels_without_a_table_are_refused():
    model = from_config(TINY | {"label_dim": 0})
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"y is given, but the network has no use for it \(label_dim=0\)"):
        jax.eval_shape(model.apply, shapes, jnp.zeros((2, 4, 4, 1)), jnp.zeros(2), jnp.zeros(2, jnp.int32))


def test_magnitudes_of_sums_and_concatenations():
    a, b = (jax.random.normal(jax.random.key(i), (100, 1000 * (i + 1))) for i in range(2))
    for out in (mp_sum(a, b[:, :1000], 0.3), mp_cat(a, b, 0.3)):
        np.testing.assert_allclose(jnp.std(out), 1, rtol=0.02)  # of 1e5 values: four standard errors are 0.009


def test_a_fresh_network_keeps_magnitudes():
    # Without attention, which takes means of values that are independent here, and so makes them smaller.
    change = dict(img_resolution=16, img_channels=8, label_dim=0, model_channels=64, attn_resolutions=[])
    model = from_config(TINY | change | dict(channels_per_head=128))
    sizes = {}

    def keep(name, a):
        sizes[name] = jnp.sqrt(jnp.mean(jnp.square(a)))
        return a

    @jax.jit
    def run(key, x, t):
        with tapped(keep):
            model.apply(model.init(key), x, t)
        return sizes

    x = jax.random.normal(jax.random.key(1), (2, 16, 16, 8))
    out = run(jax.random.key(0), x, jnp.array([-0.5, 0.5]))
    blocks = {name: float(size) for name, size in out.items() if name.endswith("/out")}
    assert len(blocks) == 5
    # Zeros beside the image take some per cent from convolutions at its edges; eight seeds lay in 0.93 to 1.02.
    assert all(abs(size - 1) < 0.1 for size in blocks.values()), blocks


def test_official_files_have_the_network_under_unet(net, tmp_path):
    model, params = net
    save(model, params, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {
        (name if name.startswith("logvar") else f"unet.{name}"): tensor.part()
        for name, tensor in read_header(file)[0].items()
    }
    assert {"unet.enc.4x4_conv.weight", "unet.dec.4x4_in0.emb_gain", "unet.emb_fourier.freqs"} < tensors.keys()
    write(file, {k: Source(v.dtype, v.shape, lambda v=v: v) for k, v in tensors.items()}, {})
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], params)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_channels": None}, "img_channels=None: expected a whole number"),
        ({"resample_filter": [1, 2, 1]}, "expected an even number of values"),
        ({"num_block": 1}, "unknown setting 'num_block'"),
        ({"model_channels": 30, "channels_per_head": 7}, "30 channels with channels_per_head=7: 4 heads"),
    ],
)
def test_what_makes_no_network(change, message):
    with pytest.raises(ValueError, match=message):
        from_config(TINY | change)
