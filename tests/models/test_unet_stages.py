"""Stages of U-Nets: what is computed again for the backward pass, and settings that make none."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from diffjax.models import from_config
from diffjax.models.unets.blocks import MidStage, Stage
from diffjax.nn import Compute, functional


def products(jaxpr, inside=False):
    """For each product of attention, with an axis for the samples, whether it is computed again."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.params["dimension_numbers"][1][0]:
            yield inside
        again = inside or "policy" in equation.params
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner, again)


def mid(kind, remat):
    stage = Stage(kind, 8, 1, 8, head_width=4, heads=2, depth=(1,), context_width=32, groups=4, attention_groups=4)
    compute = Compute(remat=remat)
    net = functional(lambda rngs: MidStage(stage, compute=compute, rngs=rngs))
    x, temb, context = jnp.zeros((2, 4, 4, 8)), jnp.zeros((2, 8)), jnp.zeros((2, 3, 32))
    return jax.make_jaxpr(net.apply)(net.shapes, x, temb, context)


def uvit(remat):
    config = dict(_class_name="UViT", img_size=4, patch_size=2, embed_dim=8, depth=2, num_heads=1)
    model = from_config(config, remat=remat)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.make_jaxpr(model.apply)(params, jnp.zeros((2, 4, 4, 3)), jnp.zeros(2))


@pytest.mark.parametrize(
    "trace, count",
    [
        (lambda remat: mid("UNetMidBlock2D", remat), 2),
        (lambda remat: mid("UNetMidBlock2DCrossAttn", remat), 4),
        (lambda remat: mid("UNetMidBlock2DSimpleCrossAttn", remat), 2),
        (uvit, 6),
    ],
    ids=["self", "cross", "added", "uvit"],
)
def test_every_attention_is_computed_again(trace, count):
    assert list(products(trace("full").jaxpr)) == [True] * count
    assert list(products(trace("none").jaxpr)) == [False] * count
