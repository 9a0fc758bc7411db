"""Autoencoders of checkpoints: what they promise besides the numbers of PyTorch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.convert import load, save
from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.tensors import Source, write
from diffjax.models import from_config
from diffjax.models.autoencoders import (
    Tiles,
    from_bytes,
    from_latents,
    kl_divergence,
    posterior,
    sliced,
    tiled_decode,
    tiled_encode,
    tiles_of,
    to_bytes,
    to_latents,
)
from diffjax.nn import tapped

SMALL = {
    "_class_name": "AutoencoderKL", "block_out_channels": [4, 4], "norm_num_groups": 2, "sample_size": 8,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
MOVQ = {
    "_class_name": "VQModel", "block_out_channels": [128, 256, 256, 512], "layers_per_block": 2, "norm_type": "spatial",
    "down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"], "num_vq_embeddings": 16384,
    "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3, "latent_channels": 4, "vq_embed_dim": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def net():
    model = from_config(SMALL)
    return model, jax.jit(model.init)(jax.random.key(0))


def test_layers_run_in_the_order_of_their_numbers():
    """Flax sorts names as text: "10" before "2"."""
    model = from_config(SMALL | {"layers_per_block": 11})
    seen = []

    def function(name, x):
        place, _, number = name.removesuffix("/out").partition("/resnets/")
        seen.extend([(place, int(number))] if number.isdigit() else [])
        return x

    x = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
    with tapped(function):
        jax.eval_shape(model.apply, jax.eval_shape(model.init, jax.random.key(0)), x)
    for part, count in (("encoder/down_blocks/0", 11), ("decoder/up_blocks/1", 12)):
        assert [number for place, number in seen if place == part] == list(range(count))


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        {"scaling_factor": 0.5, "latents_mean": [1.0, -2.0, 0.5, 0.0], "latents_std": [1.0, 8.0, 4.0, 2.0]},
        {"_class_name": "AutoencoderTiny", "scaling_factor": 2},
        {"_class_name": "VQModel"},
        {},
    ],
)
def test_latents_there_and_back(config):
    z = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    config = {"_class_name": "AutoencoderKL", **config}
    x = to_latents(config, z)
    np.testing.assert_allclose(from_latents(config, x), z, atol=1e-6)
    if "shift_factor" in config:
        np.testing.assert_allclose(x, (z - 0.1159) * 0.3611, atol=1e-6)
    if "latents_mean" in config:
        np.testing.assert_allclose(x[..., 1], (z[..., 1] + 2.0) * 0.5 / 8.0, atol=1e-6)
    if len(config) == 1:
        np.testing.assert_allclose(x, z * 0.18215, atol=1e-6)


@pytest.mark.parametrize("config", [{}, {"_class_name": "UNet2DModel", "sample_size": 8}])
def test_other_classes_have_no_latents(config):
    with pytest.raises(ValueError, match="known of AutoencoderKL, AutoencoderTiny, VQModel"):
        to_latents(config, jnp.ones((1, 1, 1, 4)))
    with pytest.raises(ValueError, match="known of AutoencoderKL and AutoencoderTiny; take `sliced`"):
        tiles_of(config)


def test_samples_of_the_posterior_have_its_moments():
    n = 40_000
    mean, logvar = np.float32([0.5, -1.0]), np.float32([-2.0, 1.0])
    moments = jnp.broadcast_to(jnp.concatenate([mean, logvar]), (1, n, 1, 4))
    np.testing.assert_array_equal(posterior(moments)[0, 0, 0], mean)
    drawn = np.asarray(posterior(moments, key=jax.random.key(0)))[0, :, 0]
    std = np.exp(logvar / 2)
    # Five standard errors.
    assert np.all(np.abs(drawn.mean(0) - mean) < 5 * std / np.sqrt(n))
    assert np.all(np.abs(drawn.std(0) / std - 1) < 5 / np.sqrt(2 * n))
    extreme = jnp.array([[0.0, 100.0], [0.0, -100.0]]).reshape(2, 1, 1, 2)
    out = np.abs(np.asarray(posterior(extreme, key=jax.random.key(1)))).ravel()
    noise = np.abs(np.asarray(jax.random.normal(jax.random.key(1), (2, 1, 1, 1)))).ravel()
    np.testing.assert_allclose(out, noise * np.exp([10.0, -15.0]), rtol=1e-5)


def test_divergence_is_that_of_its_integral():
    mean, logvar = 0.7, -0.9
    found = kl_divergence(jnp.array([mean, logvar]).reshape(1, 1, 1, 2))[0]
    x = np.linspace(-12, 12, 20_001)
    log_p = -0.5 * ((x - mean) ** 2 / np.exp(logvar) + logvar + np.log(2 * np.pi))
    log_q = -0.5 * (x**2 + np.log(2 * np.pi))
    assert abs(found - np.trapezoid(np.exp(log_p) * (log_p - log_q), x)) < 1e-5
    assert kl_divergence(jnp.zeros((1, 2, 2, 4)))[0] == 0


def test_one_at_a_time_is_the_batch(net):
    model, params = net
    z = jax.random.normal(jax.random.key(1), (3, 2, 3, 4))
    decode = lambda z: model.apply(params, z, method="decode")
    np.testing.assert_allclose(jax.jit(sliced(decode))(z), jax.jit(decode)(z), atol=1e-5)


def test_tiles_need_less_memory(net):
    model, params = net
    z = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
    whole = lambda params, z: model.apply(params, z, method="decode")
    cut = lambda params, z: tiled_decode(model, params, z, tiles=Tiles(32, 16, 0.0))
    plan = lambda f: jax.jit(f).lower(params, z).compile().memory_analysis().temp_size_in_bytes
    # Of 16 tiles one is worked on at a time; the image is there as tiles and joined.
    image = 4 * 128 * 128 * 3
    assert plan(cut) - 2 * image < plan(whole) / 4


def test_what_fits_a_tile_is_not_cut(net):
    model, params = net
    assert tiles_of(model.config) == Tiles(8, 4)
    x = jax.random.normal(jax.random.key(1), (1, 8, 6, 3))
    both = jax.jit(
        lambda x, key: (tiled_encode(model, params, x, key=key), model.apply(params, x, method="encode", key=key))
    )
    np.testing.assert_array_equal(*both(x, jax.random.key(2)))
    with pytest.raises(ValueError, match="no tile moves on"):
        tiled_decode(model, params, jnp.zeros((1, 9, 9, 4)), tiles=Tiles(8, 4, 0.9))
    with pytest.raises(ValueError, match=r"Tiles\(sample=20, latent=8.*: sample = 2 latent"):
        tiled_decode(model, params, jnp.zeros((1, 9, 9, 4)), tiles=Tiles(20, 8))
    with pytest.raises(ValueError, match=r"overlap=1.5\): .*, in \[0, 1\)"):
        tiled_decode(model, params, jnp.zeros((1, 9, 9, 4)), tiles=Tiles(8, 4, 1.5))
    with pytest.raises(ValueError, match="at least 2 pixels"):
        tiled_encode(model, params, jnp.zeros((1, 13, 8, 3)))


def test_tiles_of_others(net):
    tiny = {"_class_name": "AutoencoderTiny"}
    assert tiles_of(tiny) == Tiles(512, 64, 0.125)
    model = from_config(tiny)
    with pytest.raises(ValueError, match="multiples of 8"):
        tiled_encode(model, {}, jnp.zeros((1, 516, 512, 3)))
    with pytest.raises(ValueError, match="leave the key out"):
        tiled_encode(model, {}, jnp.zeros((1, 512, 512, 3)), key=jax.random.key(0))
    with pytest.raises(ValueError, match="tiles of VQModel"):
        tiled_decode(net[0]._replace(config=MOVQ), {}, jnp.zeros((1, 64, 64, 4)))


def test_whole_tiles_are_compiled_once(net):
    model, params = net

    def convolutions(rows):
        trace = jax.make_jaxpr(lambda z: tiled_decode(model, params, z))(jnp.zeros((1, rows, 3, 4)))
        return str(trace).count("conv_general_dilated[")

    # Two tiles with one at the edge, three and four.
    assert convolutions(7) == convolutions(10) == convolutions(13)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types names 1 blocks, block_out_channels 2"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "known: DownEncoderBlock2D"),
        ({"act_fn": "tanh"}, "act_fn='tanh'"),
        ({"norm_num_groups": 3}, "norm_num_groups=3"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"use_quant_convs": True}, "did you mean 'use_quant_conv'"),
    ],
)
def test_settings_that_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        from_config(SMALL | change)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"_class_name": "AutoencoderTiny", "upsample_fn": "bilinear"}, "upsample_fn='bilinear'"),
        ({"_class_name": "AutoencoderTiny", "num_encoder_blocks": [1]}, "4 widths|1 times"),
        (MOVQ | {"norm_type": "layer"}, "norm_type='layer'"),
        (MOVQ | {"vq_embed_dim": 8}, "vq_embed_dim=8"),
        (MOVQ | {"block_out_channels": [16] * 4, "norm_num_groups": 8}, "32 groups"),
    ],
)
def test_settings_of_others_that_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        from_config(config)


def test_bytes_are_near_and_a_network_decodes_them():
    config = {
        "_class_name": "AutoencoderTiny", "encoder_block_out_channels": [4, 4], "decoder_block_out_channels": [4],
        "num_encoder_blocks": [1, 1], "num_decoder_blocks": [1],
    }  # fmt: skip
    model = from_config(config)
    params = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 3))
    apply = jax.jit(model.apply, static_argnames="method")
    z = apply(params, x, method="encode")
    stored = to_bytes(config, z)
    assert stored.dtype == jnp.uint8
    near = from_bytes(config, stored)
    assert np.abs(near - z).max() <= 3 / 255 + 1e-6 and np.abs(near - z).max() > 0
    np.testing.assert_allclose(apply(params, x), apply(params, near, method="decode"), atol=1e-5)
    assert to_bytes(config, jnp.array([-9.0, -3.0, 3.0, 9.0])).tolist() == [0, 0, 255, 255]


def test_codebook_takes_the_nearest_row_and_passes_the_gradient_on():
    config = {"_class_name": "VQModel", "block_out_channels": [4], "norm_num_groups": 2, "num_vq_embeddings": 5}
    model = from_config(config)
    params = jax.jit(model.init)(jax.random.key(0))
    apply = jax.jit(model.apply, static_argnames="method")
    table = np.asarray(params["quantize"]["embedding"]["embedding"])
    assert np.abs(table).max() <= 1 / 5
    z = np.random.default_rng(0).normal(0, 0.2, (2, 3, 2, 3)).astype(np.float32)
    found = apply(params, z, method="quantize")
    nearest = ((z[..., None, :] - table) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(found.indices, nearest)
    np.testing.assert_allclose(found.latents, table[nearest], atol=1e-6)
    np.testing.assert_allclose(found.loss, 1.25 * ((z - table[nearest]) ** 2).mean(), rtol=1e-5)
    through = jax.grad(lambda z: (apply(params, z, method="quantize").latents * z).sum())(z)
    np.testing.assert_allclose(through, z + table[nearest], atol=1e-6)
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 3))
    image, loss = apply(params, x)
    latents = apply(params, x, method="encode")
    np.testing.assert_allclose(image, apply(params, latents, method="decode"), atol=1e-5)
    np.testing.assert_allclose(loss, apply(params, latents, method="quantize").loss, rtol=1e-4)


def test_older_files_have_other_names_and_shapes(net, tmp_path):
    model, params = net
    save(model, params, tmp_path / "new")
    tensors = {name: tensor.part() for name, tensor in find(tmp_path / "new").items()}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in tensors.items():
        for new, before in old.items():
            if f".{new}." in name:
                name = name.replace(new, before)
                value = value[..., None, None] if value.ndim == 2 else value
        renamed[name] = value
    assert sum(value.ndim == 4 and ".attentions." in name for name, value in renamed.items()) == 8
    (tmp_path / "old").mkdir()
    sources = {name: Source(value.dtype, value.shape, lambda value=value: value) for name, value in renamed.items()}
    write(tmp_path / "old" / "diffusion_pytorch_model.safetensors", sources, {})
    (tmp_path / "old" / "config.json").write_text(json.dumps(SMALL))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "old")[1], params)
