"""Counted operations, against hand counts and against XLA where XLA counts right."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from diffjax import registry
from diffjax.core.types import Model
from diffjax.models import MODELS, from_config
from diffjax.models.presets import preset
from diffjax.models.published import published
from diffjax.train.parallel import flops
from diffjax.train.parallel.flops import step_flops
from diffjax.train.parallel.sharding import make_mesh, state_sharding
from diffjax.train.parts import prepare
from diffjax.train.setup import abstract_batch, trace_step
from diffjax.train.state import abstract_state
from diffjax.train.step import make_train_step


def count(f, *shapes):
    return flops.count_flops(f, *(jnp.zeros(s) for s in shapes))


def test_flops_of_products_scans_and_branches():
    matmul = 2 * 3 * 5 * 7
    assert count(jnp.matmul, (3, 5), (5, 7)) == matmul
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * matmul
    assert count(jax.jit(jnp.matmul), (3, 5), (5, 7)) == matmul
    repeat = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=6)[0]
    assert count(repeat, (3, 5), (5, 5)) == 6 * 2 * 3 * 5 * 5
    branch = lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)
    assert count(branch, (3, 5), (5, 5)) == 2 * 2 * 3 * 5 * 5


@pytest.mark.parametrize("groups", [1, 4])
def test_flops_of_a_convolution_and_its_gradients(groups):
    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    # Each of the 2 x 6 x 6 x 12 outputs is a sum of 3 x 3 x 8 / groups products.
    once = 2 * (2 * 6 * 6 * 12) * 9 * 8 // groups
    shapes = (2, 8, 8, 8), (3, 3, 8 // groups, 12)
    assert count(conv, *shapes) == once
    if groups == 1:
        # Forward, the weights' gradient with as many products, the input's with the zeros of its padding, at 8 x 8.
        grads = jax.grad(lambda x, w: conv(x, w).sum(), argnums=(0, 1))
        assert count(grads, *shapes) == pytest.approx(2 * once + once * 8 * 8 / (6 * 6))


def test_flops_agree_with_xla_on_a_network_without_loops():
    config, parts = prepare(ConfigDict(dict(batch_size=64, model=dict(name="mlp", width=128, depth=2))))
    xla = jax.jit(make_train_step(parts, config)).lower(abstract_state(parts), abstract_batch(config, parts))
    # XLA counts the elementwise operations as well, of which random numbers and Adam have many.
    assert 0.5 * xla.cost_analysis()["flops"] < step_flops(config, parts).model < xla.cost_analysis()["flops"]


def test_dit_xl_2_has_its_published_size_and_cost():
    # Peebles & Xie 2023, arXiv:2212.09748, Table 4: 675 M parameters and 118.64 Gflops at 32 x 32 x 4, where they count
    # a multiply and an add as one.
    model = registry.build(preset("dit_xl_2"), MODELS, "model", shape=(32, 32, 4), num_classes=1000)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(675e6, rel=1e-3)
    abstract = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    found = flops.count_flops(model.apply, params, *abstract, jax.ShapeDtypeStruct((1,), jnp.int32))
    assert found / 2e9 == pytest.approx(118.64, rel=1e-3)


def test_dit_xl_2_of_diffusers_has_the_published_cost():
    model = from_config(published("dit_xl_2_256/transformer"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    given = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), *[jax.ShapeDtypeStruct((1,), jnp.int32)] * 2
    found = flops.count_flops(model.apply, params, *given)
    # Each block there embeds the time anew, as the paper's does once.
    again = 27 * (256 * 1152 + 1152 * 1152)
    assert found / 2 - again == pytest.approx(118.64e9, rel=1e-3)


def test_flops_of_a_dit_step_are_its_closed_form_and_remat_repeats_the_blocks():
    width, depth, tokens, batch, classes, patch = 32, 3, 16, 8, 10, 4
    blocks = depth * (24 * tokens * width**2 + 4 * tokens**2 * width + 12 * width**2)
    pixels = 2 * (16 // patch**2 * patch**2) * width  # per token, into the tokens; the same out of them
    cond = 2 * (256 * width + width**2)
    rest = cond + tokens * 2 * pixels + 2 * 2 * width**2
    model = dict(name="dit", patch=patch, width=width, depth=depth, heads=2)
    given = dict(data=f"synthetic(shape=(16, 16, 1), num_classes={classes})", batch_size=batch, model=model)
    kept = step_flops(*prepare(ConfigDict(given)))
    # The gradients take two products for each of the forward pass, but the images' own gradient and that of the
    # sinusoids are not wanted.
    expected = 3 * (blocks + rest) - tokens * pixels - 2 * 256 * width
    # Two means of a layer norm, and their gradients, are products with a vector; so are the 8 bins of the loss.
    mean = 2 * tokens * width
    expected = batch * (expected + (2 * depth + 1) * 4 * mean + 2 * 8)
    assert kept.model == kept.hardware == pytest.approx(expected, rel=1e-12)
    model["remat"] = True
    again = step_flops(*prepare(ConfigDict(given)))
    assert again.model == kept.model
    # Every block is computed once more, its last product too: the gradient of the gate needs it.
    assert again.hardware - again.model == pytest.approx(batch * (blocks + 2 * depth * 2 * mean), rel=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{}, dict(microbatch=2, accumulate_loop="scan"), dict(guard=dict(on_bad="skip"), loss=dict(self_condition=0.25))],
    ids=str,
)
def test_the_step_that_was_traced_to_be_compiled_tells_its_flops_without_another_trace(settings, monkeypatch):
    model = dict(name="dit", patch=4, width=16, depth=1, heads=2)
    data = "synthetic(shape=(8, 8, 1), num_classes=3)"
    config, parts = prepare(ConfigDict(dict(data=data, batch_size=4, model=model) | settings))
    mesh = make_mesh(devices=jax.devices()[:1])
    places = state_sharding(mesh, abstract_state(parts), parts.model.rules, config.sharding)
    alone = step_flops(config, parts)
    jaxpr = trace_step(config, parts, mesh, places).jaxpr
    monkeypatch.delattr(jax, "make_jaxpr")
    assert step_flops(config, parts, jaxpr) == alone


def test_an_estimate_of_x0_costs_a_forward_pass_in_its_share_of_the_steps():
    def step(rate):
        model = dict(name="dit", patch=4, width=16, depth=1, heads=2)
        given = dict(data="synthetic(shape=(8, 8, 1), num_classes=3)", batch_size=4, model=model)
        config, parts = prepare(ConfigDict(given | dict(loss=dict(self_condition=rate))))
        return step_flops(config, parts).model, parts.model

    always, model = step(1.0)
    x, t, y = (jax.ShapeDtypeStruct((4, *tail), dtype) for tail, dtype in (((8, 8, 1), "f4"), ((), "f4"), ((), "i4")))
    forward = flops.count_flops(model.apply, jax.eval_shape(model.init, jax.random.key(0)), x, t, y)
    assert always - step(0.25)[0] == pytest.approx(0.75 * forward, rel=1e-9)


def test_the_network_of_someone_else_is_built_again_by_the_name_in_the_config(monkeypatch):
    side, batch = 8, 4

    def sine(*, shape, num_classes, remat=False):
        body = lambda x, w: jnp.sin(x.reshape(len(x), -1) @ w).reshape(x.shape)
        apply = lambda p, x, t, y=None, *, key=None: (jax.checkpoint(body) if remat else body)(x, p["w"])
        return Model(lambda key: {"w": jnp.zeros((side**2, side**2))}, apply, {"remat": remat})

    module = types.ModuleType("user_of_flops")
    module.sine = sine
    monkeypatch.setitem(sys.modules, "user_of_flops", module)
    given = dict(data=f"synthetic(shape=({side}, {side}, 1))", batch_size=batch)
    kept, again = (
        step_flops(*prepare(ConfigDict(given | dict(model=dict(name="user_of_flops:sine", remat=remat)))))
        for remat in (False, True)
    )
    # The cosine, which is the sine's gradient, takes the product once more.
    assert again.model == kept.model == kept.hardware
    assert again.hardware - again.model == 2 * batch * side**4


def test_flops_of_a_shard_map_are_those_of_all_devices():
    mesh = make_mesh(devices=jax.devices()[:1])
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert count(split, (8, 5), (5, 7)) == 2 * 8 * 5 * 7
