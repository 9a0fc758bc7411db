"""muP: roles from shapes, initial sizes, learning rates, and movements that do not depend on the width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.types import Model
from diffjax.models import dit
from diffjax.nn import SelfAttention, functional
from diffjax.train import paths
from diffjax.train.optim import build_optimizer, mup, with_base
from diffjax.train.optim.coordinates import activations, movements, slopes


def network(**settings):
    return dit(shape=(4, 4, 1), **{"num_classes": 3, "depth": 2, **settings})


def shapes(model):
    return jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))


def test_roles_of_a_dit_come_from_two_widths():
    grown = mup.growth(shapes(network(width=64, heads=4)), shapes(network(width=16, heads=2)))
    roles = {name: value.role for name, value in grown.items()}
    hidden = {"blocks/attention/qkv", "blocks/attention/out", "blocks/mlp/up", "blocks/mlp/down", "blocks/modulation"}
    hidden |= {"blocks/mlp/modulation", "modulation", "cond/out"}
    assert {name for name, role in roles.items() if role == "hidden"} == {f"{name}/kernel" for name in hidden}
    assert {name for name, role in roles.items() if role == "output"} == {"out/kernel"}
    assert {name for name, role in roles.items() if role == "fixed"} == {"out/bias"}
    # Vectors, stacked ones too, the table of labels, and the layers that read pixels and the waves of the time.
    assert {"inp/kernel", "cond/hidden/kernel", "cond/label/embedding", "blocks/mlp/up/bias"} < {
        name for name, role in roles.items() if role == "input"
    }
    assert set(grown["blocks/mlp/up/kernel"]) == {4.0} and grown["inp/bias"] == mup.Growth(1.0, 4.0)


@pytest.mark.parametrize(
    "role, grown, init_var, adam, sgd",
    [
        # The rows of Table 3 of arXiv:2203.03466 at fan_in or fan_out 8 times the base's.
        ("input", mup.Growth(1, 8), 1, 1, 8),
        ("output", mup.Growth(8, 1), 1 / 64, 1 / 8, 1 / 8),
        ("hidden", mup.Growth(8, 8), 1 / 8, 1 / 8, 1),
        ("fixed", mup.Growth(1, 1), 1, 1, 1),
    ],
)
def test_table_3(role, grown, init_var, adam, sgd):
    assert grown.role == role
    assert mup.init_factor(grown) ** 2 == pytest.approx(init_var)
    assert mup.lr_factor(grown, "adam") == pytest.approx(adam)
    assert mup.lr_factor(grown, "sgd") == pytest.approx(sgd)


def test_initial_sizes_follow_the_base_whatever_the_initialiser():
    def plain(width):
        def init(key):
            keys = iter(jax.random.split(key, 5))
            draw = lambda *shape: jax.random.normal(next(keys), shape)
            return {
                "in": 0.5 * draw(4, width) / width**0.5,
                "hid": 3.0 * draw(width, width),
                "out": draw(width, 4) / width**0.5,
                "gate": jnp.zeros((width, width)),
                "fixed": draw(7),
            }

        return Model(init, None, {})

    wide, base = plain(256), plain(16)
    key = jax.random.key(1)
    params, own = jax.jit(lambda key: (mup.rescaled(wide, base.init).init(key), wide.init(key)))(key)
    rms = lambda x: float(np.sqrt(np.mean(np.square(x))))
    # The base's RMS is that of 16 draws of 64 numbers: 1 / sqrt(2 * 1024) is 2.2 %; four of them.
    assert rms(params["in"]) == pytest.approx(0.5 / 16**0.5, rel=0.09)
    assert rms(params["hid"]) == pytest.approx(3.0 / 16**0.5, rel=0.045)
    assert rms(params["out"]) == pytest.approx(1 / 16**0.5 / 16, rel=0.09)
    for name in ("gate", "fixed"):
        np.testing.assert_array_equal(params[name], own[name])


def test_at_the_width_of_the_base_nothing_changes():
    model = network(width=16, heads=2)
    spec = dict(name="dit", width=16, heads=2)
    build = lambda s: network(**{k: v for k, v in s.items() if k != "name"})
    scaled, base = with_base(model, "base(width=16)", spec, build)
    key = jax.random.key(0)
    params = jax.jit(model.init)(key)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(scaled.init)(key), params)
    grads = jax.tree.map(np.ones_like, params)
    plain, wide = (
        build_optimizer({"name": "adamw", "weight_decay": 0.1, "mup": m}, 9, base=base) for m in ("", "base(width=16)")
    )
    step = lambda optimizer: jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, grads)
    jax.tree.map(np.testing.assert_array_equal, step(plain), step(wide))


def test_weight_decay_does_not_depend_on_the_width():
    params, base = ({"kernel": np.ones((n, n), np.float32), "bias": np.ones(n, np.float32)} for n in (64, 16))
    config = {"name": "adamw", "lr": 0.1, "weight_decay": 0.5, "mup": "base(width=16)"}
    optimizer = build_optimizer(config, 9, base=base)
    update = jax.jit(lambda grad: optimizer.update(grad, optimizer.init(params), params)[0])
    decayed = update(jax.tree.map(np.zeros_like, params))
    np.testing.assert_allclose(decayed["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(decayed["bias"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(update(jax.tree.map(np.ones_like, params))["kernel"], -0.05 - 0.1 / 4, rtol=1e-5)


def perceptron(width, key_width=8):
    """Two hidden layers with the usual initialiser, and taps of its own."""
    from diffjax.nn.taps import tap

    def init(key):
        a, b, c = jax.random.split(key, 3)
        fan = lambda k, i, o: jax.random.normal(k, (i, o)) / i**0.5
        return {"a": fan(a, key_width, width), "b": fan(b, width, width), "c": fan(c, width, 2)}

    def apply(params, x):
        h = tap("first", jnp.tanh(x @ params["a"]))
        h = tap("second", jnp.tanh(h @ params["b"]))
        return h @ params["c"]

    return Model(init, apply, {})


def check(build, widths, name, mup_on, inputs, target, *, lr, steps, seeds=1):
    """Slopes of the movement after `steps` updates against the width."""
    rows = []
    for width in widths:
        spec = f"base(width={widths[0]})" if mup_on else ""
        model, base = with_base(build(width), spec, {"width": width}, lambda s: build(s["width"]))
        optimizer = build_optimizer({"name": name, "lr": lr, "mup": spec, "b1": 0.0}, steps, base=base)
        keys = [jax.random.key(seed) for seed in range(seeds)]
        rows.append(movements(model, optimizer, inputs, target, steps=steps, keys=keys))
    return slopes(widths, rows)


@pytest.mark.slow
@pytest.mark.parametrize("name, lr", [("adamw", 3e-3), ("sgd", 0.1)])
def test_coordinate_check_of_a_perceptron(name, lr):
    inputs = (jax.random.normal(jax.random.key(1), (32, 8)),)
    target = jax.random.normal(jax.random.key(2), (32, 2))
    run = lambda on: check(perceptron, (32, 512), name, on, inputs, target, lr=lr, steps=4, seeds=2)
    flat, standard = run(True), run(False)
    # Width 32 is far from the limit, and two seeds remain: a power of 0.25 over a factor of 16 is a factor of 2.
    assert all(abs(slope) < 0.25 for slope in flat.values()), flat
    # With one learning rate for all widths every sum over the width overshoots.
    assert standard["second"] > 0.3 and standard["output"] > 0.5, standard


@pytest.mark.slow
def test_coordinate_check_of_the_dit():
    x, target = jax.random.normal(jax.random.key(0), (2, 8, 4, 4, 1))
    inputs = (x, jnp.linspace(0, 1, 8), jnp.arange(8) % 3)
    build = lambda scale: lambda width: network(width=width, heads=4, depth=1, scan=False, attention_scale=scale)
    widths = (64, 128, 256)
    flat = check(build("mup"), widths, "adamw", True, inputs, target, lr=1e-3, steps=6)
    standard = check(build("sqrt"), widths, "adamw", False, inputs, target, lr=1e-3, steps=6)
    for name in ("tokens", "cond", "blocks/attention/out", "blocks/mlp/out", "output"):
        assert abs(flat[name]) < 0.25, (name, flat[name])
    for name in ("blocks/attention/out", "blocks/mlp/out", "output"):
        assert standard[name] > 0.25, (name, standard[name])


@pytest.mark.slow
def test_attention_scales_agree_at_heads_of_64_and_sharpen_by_8_over_root_d_elsewhere():
    x = jax.random.normal(jax.random.key(0), (2, 5, 128))

    def mixed(heads, scale, params=None):
        make = lambda rngs: SelfAttention(128, heads, scale=scale, dtype=jnp.float32, rngs=rngs)
        module = functional(make)
        params = module.init(jax.random.key(1)) if params is None else params
        return module.apply(params, x), params

    same, _ = mixed(2, "mup")
    np.testing.assert_allclose(same, mixed(2, "sqrt")[0], atol=1e-6)
    sharp, params = mixed(8, "mup")
    # Heads of 16 channels: 8 / 16 is twice 1 / sqrt(16), as if the queries were twice as large.
    queries = np.concatenate([np.full(128, 2.0), np.ones(256)])
    doubled = jax.tree_util.tree_map_with_path(
        lambda path, p: p * queries if paths.name(path).startswith("qkv") else p, params
    )
    np.testing.assert_allclose(sharp, mixed(8, "sqrt", doubled)[0], atol=1e-5)


def test_activations_are_those_of_the_taps_and_the_output():
    model = network(width=16, heads=2, scan=False)
    params = jax.jit(model.init)(jax.random.key(0))
    x, t, y = jnp.ones((2, 4, 4, 1)), jnp.ones(2), jnp.zeros(2, jnp.int32)
    both = jax.jit(lambda *given: (activations(model, *given), model.apply(*given)))
    seen, output = both(params, x, t, y)
    np.testing.assert_array_equal(seen["output"], output)
    # Gates start at zero: the residual stream is still what came in.
    np.testing.assert_array_equal(seen["blocks/mlp/out"], seen["tokens"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mup": "narrow(width=64)"}, "expected the settings of the base"),
        ({"mup": "base()"}, "expected the settings of the base"),
        ({"mup": "base(depth=1)"}, "same name and depth"),
        ({"mup": "base(wdith=16)"}, "did you mean 'width'"),
        ({"mup": "base(width=18)"}, "heads=4 does not divide"),
        ({"mup": "base(patch=1)"}, None),
        ({"mup": "base(width=16)", "name": "muon"}, "known for adam, adamw, lion, sgd"),
    ],
)
def test_wrong_bases_say_what_is_allowed(change, message):
    from diffjax.train.errors import ConfigError
    from diffjax.train.parts import resolve

    config = dict(data="digits()", batch_size=8, model=dict(name="dit", width=32, depth=1, heads=4), optim=change)
    if message is None:
        resolve(config)
    else:
        with pytest.raises(ConfigError, match=message):
            resolve(config)


def test_a_base_of_another_depth_or_structure_is_refused():
    wide = shapes(network(width=32, heads=2))
    with pytest.raises(ValueError, match="'blocks/attention/out/kernel' is .* and in the base network"):
        mup.growth({"blocks": {"attention": {"out": {"kernel": wide["blocks"]["attention"]["out"]["kernel"]}}}},
                   shapes(network(width=16, heads=2, depth=1)))  # fmt: skip
    with pytest.raises(ValueError, match="absent"):
        mup.growth({"w": jnp.ones(3)}, {})
