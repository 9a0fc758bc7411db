"""Checkpoints of DiT and PixArt that name the class before theirs."""

import jax
import numpy as np
import pytest

from diffjax.convert import load, save
from diffjax.models import from_config

COMMON = dict(
    activation_fn="gelu-approximate", attention_bias=True, attention_head_dim=4, double_self_attention=False,
    dropout=0.0, in_channels=2, norm_elementwise_affine=False, norm_num_groups=32, num_attention_heads=3,
    num_embeds_ada_norm=7, num_layers=2, num_vector_embeds=None, only_cross_attention=False, out_channels=4,
    patch_size=2, sample_size=8, upcast_attention=False, use_linear_projection=False,
)  # fmt: skip
DIT = dict(COMMON, norm_type="ada_norm_zero", cross_attention_dim=None)
PIXART = dict(
    COMMON, norm_type="ada_norm_single", norm_eps=1e-6, attention_type="default", caption_channels=5,
    cross_attention_dim=12,
)  # fmt: skip


@pytest.mark.often("*PixArt*")
@pytest.mark.parametrize("config, kind", [(DIT, "DiTTransformer2DModel"), (PIXART, "PixArtTransformer2DModel")])
def test_it_is_the_network_of_today(config, kind, tmp_path):
    model = from_config({"_class_name": "Transformer2DModel", **config})
    gone = {"double_self_attention", "num_vector_embeds", "only_cross_attention", "use_linear_projection"}
    gone |= {"cross_attention_dim"} if config is DIT else set()
    today = from_config({"_class_name": kind, **{k: v for k, v in config.items() if k not in gone}})
    params = jax.jit(model.init)(jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(today.init, jax.random.key(0)))
    save(model, params, tmp_path)
    again, found = load(tmp_path)
    assert again.config == model.config and again.config["_class_name"] == "Transformer2DModel"
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(norm_type="layer_norm"), "norm_type='layer_norm': known: ada_norm_zero, ada_norm_single"),
        (dict(only_cross_attention=True), "unknown setting 'only_cross_attention' .here True"),
        (dict(attention_type="gated"), "attention_type='gated' is not supported"),
        (dict(cross_attention_dim=9), "cross_attention_dim=9 is not that of the projected text"),
        (dict(attention_head_dim=5), "num_attention_heads . attention_head_dim = 15: positions need a multiple of 4"),
        (dict(DIT, sample_size=128), "sample_size=128 is not supported with norm_type='ada_norm_zero'"),
        (dict(sample_size=128, attention_head_dim=4, num_attention_heads=1, cross_attention_dim=4), "a multiple of 3"),
    ],
)
def test_what_is_no_network_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_config({"_class_name": "Transformer2DModel", **PIXART, **change})
