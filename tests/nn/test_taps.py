import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models import dit, mlp, unet
from diffjax.nn import scope, tap, tapped


def doubled(name, x):
    return 2 * x if name.endswith("mid") else x


def test_a_tap_is_the_identity_until_someone_listens():
    x = jnp.arange(3.0)
    assert tap("mid", x) is x
    with tapped(doubled):
        assert tap("mid", x).tolist() == [0, 2, 4] and tap("other", x) is x
    assert tap("mid", x) is x


def test_a_function_may_look_on_and_must_keep_the_shape():
    x, heard = jnp.arange(3.0), []
    with tapped(lambda name, x: heard.append(name)):
        assert tap("mid", x) is x and heard == ["mid"]
    with scope("a"), tapped(lambda name, x: x[:2]), pytest.raises(ValueError, match="float32 .2,. for 'mid', .*.3,."):
        tap("mid", x)


def test_functions_nest_and_scopes_name():
    heard = []

    def listen(name, x):
        heard.append((name, float(x)))
        return x

    with tapped(listen), scope("a"), tapped(doubled), scope("b"):
        assert tap("mid", 3.0) == 6.0  # the inner function comes first
    assert heard == [("a/b/mid", 6.0)]


def test_a_jitted_function_notices_what_is_installed():
    f = jax.jit(lambda x: tap("mid", x) + 1)
    assert f(1.0) == 2
    with tapped(doubled):
        assert f(1.0) == 3
    assert f(1.0) == 2


def test_taps_reach_into_scans_checkpoints_and_gradients():
    def f(x):
        body = jax.checkpoint(lambda c, _: (tap("mid", c), None))
        return jax.lax.scan(body, x, None, length=3)[0]

    with tapped(doubled):
        assert f(1.0) == 8 and jax.grad(f)(1.0) == 8
    assert jax.grad(f)(1.0) == 1


SETTINGS = dict(shape=(8, 8, 1), num_classes=3)
CASES = {
    "dit": (
        dit(**SETTINGS, patch=4, width=16, depth=2, heads=2),
        {"cond", "tokens", "blocks/attention/q", "blocks/mlp/out"},
    ),
    "mlp": (mlp(**SETTINGS, width=16, depth=1), {"cond", "tokens", "blocks/block0/hidden", "modulation"}),
    "unet": (
        unet(**SETTINGS, width=8, mults=(1, 2), blocks=1, attention=(4,), head_width=4, groups=2, remat="full"),
        {"cond", "features", "enc/4x4_down/hidden", "mid/attention/attention/mixed", "dec/8x8_block1/out"},
    ),
}


@pytest.mark.parametrize("model, some", CASES.values(), ids=CASES)
def test_networks_name_their_activations_and_their_rules_know_them(model, some):
    import re

    heard = {}

    def listen(name, x):
        heard[name] = x.ndim
        return x

    inputs = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    with tapped(listen):
        jax.eval_shape(lambda key: model.apply(model.init(key), *inputs), jax.random.key(0))
    assert some <= set(heard)
    for name, rank in heard.items():
        axes = next((axes for regex, axes in model.activations if re.search(regex, name)), None)
        assert axes is not None and len(axes) <= rank, name


def test_a_tap_that_changes_a_feature_changes_the_output():
    model = CASES["mlp"][0]
    inputs = jnp.ones((2, 8, 8, 1)), jnp.ones(2), jnp.zeros(2, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: np.float32(0.3 * rng.normal(size=a.shape)), shapes)
    apply = jax.jit(model.apply)
    plain = apply(params, *inputs)
    with tapped(lambda name, x: jnp.zeros_like(x) if name == "tokens" else x):
        changed = apply(params, *inputs)
    assert np.abs(plain - changed).max() > 1e-3
