"""Computing in bfloat16 with parameters in float32."""

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict

from diffjax.train.parts import prepare
from diffjax.train.setup import abstract_batch
from diffjax.train.state import abstract_state
from diffjax.train.step import make_train_step

MODELS = {
    "dit": dict(name="dit", patch=4, width=16, depth=1, heads=2, mlp_ratio=2.0),
    "unet": dict(name="unet", width=8, mults=(1,), blocks=1, attention=(), head_width=8, groups=4),
    "mlp": dict(name="mlp", width=16, depth=1),
}


def prepared(name, dtype):
    return prepare(ConfigDict(dict(batch_size=16, model=MODELS[name] | dict(dtype=dtype))))


def loss_and_gradient(model, params):
    """The mean square of the output on fixed inputs, and its gradient by every parameter, each as a vector."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, t = jax.random.normal(keys[0], (16, 8, 8, 1)), jax.random.uniform(keys[1], (16,))
    y = jax.random.randint(keys[2], (16,), 0, 10)
    loss, grads = jax.jit(jax.value_and_grad(lambda p: (model.apply(p, x, t, y) ** 2).mean()))(params)
    assert {str(a.dtype) for a in jax.tree.leaves(grads)} == {"float32"}
    return float(loss), [np.ravel(a) for a in jax.tree.leaves(grads)]


def operands(jaxpr, primitives):
    """The dtypes of the first operands of all such operations, inside loops and calls as well."""
    found = {str(e.invars[0].aval.dtype) for e in jaxpr.eqns if e.primitive.name in primitives}
    return found.union(*(operands(sub, primitives) for e in jaxpr.eqns for sub in jaxprs_in_params(e.params)))


@pytest.mark.often("mlp")
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_its_gradient_are_close(name):
    models = {dtype: prepared(name, dtype)[1].model for dtype in ("float32", "bfloat16")}
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(models["float32"].init, jax.random.key(0))
    # Every layer keeps the size of its input, so that no rounding is amplified more than in a trained network.
    size = lambda a: 0.1 if a.ndim == 1 else np.prod(a.shape[:-1]) ** -0.5
    params = jax.tree.map(lambda a: (size(a) * rng.normal(size=a.shape)).astype(np.float32), shapes)
    (exact, wanted), (rounded, got) = (loss_and_gradient(model, params) for model in models.values())
    # bfloat16 has 8 bits: relative errors of 2**-9 an operation, of some ten operations in a row.
    assert rounded == pytest.approx(exact, rel=0.05)
    whole = np.linalg.norm(np.concatenate(wanted))
    apart = [np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-2 * whole) for a, b in zip(got, wanted, strict=True)]
    assert 1e-6 < max(apart) < 0.1


@pytest.mark.parametrize("name", MODELS)
def test_only_the_network_computes_in_bfloat16(name):
    config, parts = prepared(name, "bfloat16")
    step, state = make_train_step(parts, config), abstract_state(parts)
    after, metrics = jax.eval_shape(step, state, abstract_batch(config, parts))
    kept = {str(a.dtype) for a in jax.tree.leaves((after.params, after.ema, after.opt_state, metrics.loss))}
    assert kept <= {"float32", "int32"}
    jaxpr = jax.make_jaxpr(step)(state, abstract_batch(config, parts)).jaxpr
    # Its products are in bfloat16; softmax and normalisations are not.
    assert "bfloat16" in operands(jaxpr, ("dot_general", "conv_general_dilated"))
    assert operands(jaxpr, ("exp", "rsqrt")) == {"float32"}
