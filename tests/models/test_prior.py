"""What the prior of unCLIP refuses; its numbers are compared with PyTorch's."""

import jax
import jax.numpy as jnp
import pytest

from diffjax.models import from_config

TINY = {
    "_class_name": "PriorTransformer", "num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1,
    "embedding_dim": 6, "num_embeddings": 3,
}  # fmt: skip
SHAPES = dict(x=(2, 6), t=(2,), pooled=(2, 6), context=(2, 3, 6))


@pytest.mark.parametrize(
    "settings, change, message",
    [
        ({"added_emb_type": "sum"}, {}, "added_emb_type='sum' is not supported; supported: 'prd', None"),
        ({"encoder_hid_proj_type": "image"}, {}, "encoder_hid_proj_type='image' is not supported"),
        ({"time_embed_act_fn": "tanh"}, {}, "time_embed_act_fn='tanh' is not supported"),
        ({}, {"context": None}, "it needs context"),
        ({}, {"context": (2, 3, 5)}, "context has shape"),
        ({}, {"context": (2, 2, 6)}, r"6 tokens .* positions for 3 \+ 4"),
        ({}, {"mask": (2, 4)}, "mask has shape"),
        ({}, {"mask": (1, 3)}, r"mask has shape \(1, 3\); expected \[2, 3\]"),
        ({"num_embeddings": 4, "additional_embeddings": 3}, {"mask": (2, 3)}, "must be 3 tokens besides .*, not 4"),
    ],
)
def test_what_is_refused(settings, change, message):
    given = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in (SHAPES | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        model = from_config(TINY | settings)
        params = jax.eval_shape(model.init, jax.random.key(0))
        jax.eval_shape(model.apply, params, *(given.pop(name) for name in ("x", "t", "pooled")), **given)
