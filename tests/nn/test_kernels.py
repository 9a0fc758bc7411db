"""All implementations of attention are one function."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.models import dit, from_config, unet
from diffjax.nn import IMPLEMENTATIONS, attend, kernels

# Odd lengths, more and fewer keys than queries, more than one block of 128 of either, heads that fill no lanes.
SHAPES = {"short": (7, 5, 8), "more queries": (150, 77, 40), "more keys": (130, 260, 64), "whole": (128, 256, 128)}


def drawn(shape, dtype, batch=2, heads=2):
    queries, keys, width = shape
    lengths = (queries, keys, keys)
    q, k, v = (jax.random.normal(jax.random.key(i), (batch, n, heads, width), dtype) for i, n in enumerate(lengths))
    return q, k, v


def value_and_gradients(fn, *given):
    """The output, and the gradients of a sum over it in which no two terms weigh the same."""

    def total(*given):
        out = fn(*given)
        assert out.shape == given[0].shape and out.dtype == given[0].dtype
        out = out.astype(jnp.float32)
        return jnp.sum(out * jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, tuple(range(len(given))), has_aux=True))(*given)
    return [np.asarray(a, np.float32) for a in (out, *gradients)]


def compare(fn, given, bias=None, **how):
    """`fn` beside "xla" in float32 from the same numbers."""
    more = () if bias is None else (bias,)
    at = lambda implementation: lambda q, k, v, bias=None: implementation(q, k, v, bias=bias, **how)
    found = value_and_gradients(at(fn), *given, *more)
    truth = value_and_gradients(at(attend), *(a.astype(jnp.float32) for a in given), *more)
    # float32: sums of up to 260 products in another order, scores of size 3. bfloat16: of scaled queries, weights and
    # gradients of scores, each rounded by 2^-9 of itself, the errors of which add up like noise: four of them at most.
    atol, rtol = (2e-6, 2e-5) if given[0].dtype == jnp.float32 else (0, 4 * 2**-9)
    for a, b in zip(found, truth, strict=True):
        size = np.abs(b).max()
        np.testing.assert_allclose(a, b, atol=atol + rtol * max(size, 1.0), rtol=0)


def splash(q, k, v, scale=None, *, bias=None, causal=False):
    assert bias is None
    return kernels.splash(q, k, v, scale, causal, interpret=True)


IMPLEMENTED = {name: functools.partial(attend, implementation=name) for name in IMPLEMENTATIONS} | {"splash": splash}


@pytest.fixture
def tokamax_or_skip(request):
    if "tokamax" in request.node.callspec.id:
        pytest.importorskip("tokamax")


@pytest.mark.often("True-more keys-chunked", "False-more queries-splash", "True-more keys-splash", "*short-tokamax")
@pytest.mark.parametrize("name", ["chunked", "tokamax", "splash"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_all_agree_with_xla_in_float32(name, shape, causal, tokamax_or_skip):
    compare(IMPLEMENTED[name], drawn(SHAPES[shape], jnp.float32), causal=causal, scale=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xla", "chunked", "cudnn", "tokamax", "splash"])
@pytest.mark.parametrize("causal", [False, True])
def test_all_agree_with_float32_in_bfloat16(name, causal, tokamax_or_skip):
    compare(IMPLEMENTED[name], drawn(SHAPES["more keys"], jnp.bfloat16), causal=causal)


@pytest.mark.often("part-chunked", "*tokamax")
@pytest.mark.parametrize("name", ["chunked", "tokamax", "splash"])
@pytest.mark.parametrize("bias", ["mask", "part", "full"])
def test_a_bias_is_heeded_by_all(name, bias, tokamax_or_skip):
    queries, keys, _ = SHAPES["more queries"]
    shape = {"mask": (2, 1, 1, keys), "part": (1, 2, queries, keys), "full": (2, 2, queries, keys)}[bias]
    added = jax.random.normal(jax.random.key(7), shape)
    if bias == "mask":
        added = jnp.where(added < 0.5, added, jnp.finfo(jnp.float32).min)
    # Splash has no bias: through `attend`, where another takes its place.
    compare(functools.partial(attend, implementation=name), drawn(SHAPES["more queries"], jnp.float32), added)


def test_splash_gives_way_where_it_is_not():
    given = drawn(SHAPES["short"], jnp.float32)
    bias = jax.random.normal(jax.random.key(7), (1, 2, 7, 5))
    for how in ({}, {"bias": bias}, {"causal": True}):
        chunked, other = (attend(*given, implementation=name, **how) for name in ("chunked", "splash"))
        np.testing.assert_array_equal(chunked, other)


def test_on_a_tpu_splash_is_called_without_a_bias_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="tpu", device_kind="TPU v5e")])
    monkeypatch.setattr(kernels, "splash", lambda q, *rest: calls.append(rest[2:]) or q)
    q, k, v = drawn(SHAPES["short"], jnp.float32)
    attend(q, k, v, 0.5, causal=True, implementation="splash")
    attend(q, k, v, bias=jnp.zeros((1, 1, 1, 5)), implementation="splash")
    assert calls == [(0.5, True)]


def test_what_tokamax_is_handed(monkeypatch):
    calls = []
    theirs = types.ModuleType("tokamax")
    theirs.dot_product_attention = lambda q, k, v, **how: calls.append(how) or q
    monkeypatch.setitem(sys.modules, "tokamax", theirs)
    q, k, v = drawn(SHAPES["short"], jnp.bfloat16)
    bias = jnp.array([0.0, 1.0, -2.0, -jnp.inf, jnp.finfo(jnp.float32).min], jnp.float32)[None, None, None]
    attend(q, k, v, 0.5, bias=bias, causal=True, implementation="tokamax")
    attend(q, k, v, implementation="tokamax")
    first, second = calls
    assert first["scale"] == 0.5 and first["is_causal"] and first["bias"].dtype == jnp.float32
    # Finite even times log2(e), and what is small is as it was.
    assert np.isfinite(np.float32(1.5) * np.asarray(first["bias"])).all()
    np.testing.assert_array_equal(first["bias"][..., :3], bias[..., :3])
    assert second == {"scale": None, "is_causal": False, "bias": None}


def test_without_tokamax_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    given = drawn(SHAPES["short"], jnp.float32)
    with pytest.raises(ImportError, match=r"needs the package: pip install 'diffjax\[kernels\]'"):
        attend(*given, implementation="tokamax")
    for make in (dit, unet):
        with pytest.raises(ImportError, match=r"diffjax\[kernels\]"):
            make(shape=(32, 32, 4), attention_impl="tokamax")


def test_unknown_names_and_types_are_refused(x64):
    given = drawn(SHAPES["short"], jnp.float64)
    with pytest.raises(ValueError, match="unknown attention 'flash'; known: xla, chunked, cudnn, tokamax, splash"):
        attend(*given, implementation="flash")
    for name in ("tokamax", "splash"):
        with pytest.raises(ValueError, match=f"attention by {name} is of float32 at most, here it is float64"):
            attend(*given, implementation=name)
        with pytest.raises(ValueError, match=f"dit: attention_impl='{name}' is of float32 at most"):
            dit(shape=(4, 4, 1), attention_impl=name, dtype="float64")
        with pytest.raises(ValueError, match=f"DiTTransformer2DModel: attention='{name}' is of float32 at most"):
            from_config({"_class_name": "DiTTransformer2DModel"}, attention=name, dtype="float64")
    with pytest.raises(ValueError, match="unet: attention_impl='flash': known: xla, chunked"):
        unet(shape=(32, 32, 4), attention_impl="flash")
    with pytest.raises(ValueError, match="unet: attention_impl='cudnn' needs dtype='bfloat16'"):
        unet(shape=(32, 32, 4), attention_impl="cudnn")
    with pytest.raises(ValueError, match="unet: .* multiple of 8 channels, .*; head_width=4; change"):
        unet(shape=(32, 32, 4), attention_impl="cudnn", dtype="bfloat16", head_width=4)


def test_chunks_need_less_memory():
    q, k, v = (jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32) for _ in range(3))

    def planned(name):
        total = lambda q, k, v: jnp.sum(attend(q, k, v, implementation=name) ** 2)
        return jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    weights = 4 * 2 * 512 * 512
    assert planned("chunked") < weights <= planned("xla")


@pytest.mark.parametrize("make", [dit, unet])
def test_native_networks_take_all_names(make):
    size = dict(width=16, depth=1, heads=2) if make is dit else dict(
        width=8, mults=(1,), blocks=1, attention=(12,), head_width=8, groups=4
    )  # fmt: skip
    # 144 tokens: two chunks.
    shape = (12, 12, 1) if make is unet else (24, 24, 1)
    models = [make(shape=shape, attention_impl=name, **size) for name in ("xla", "chunked", "splash")]
    rng = np.random.default_rng(0)
    normal = lambda shape: rng.normal(size=shape).astype(np.float32)
    params = jax.tree.map(lambda s: 0.3 * normal(s.shape), jax.eval_shape(models[0].init, jax.random.key(0)))
    x, t = normal((2, *shape)), np.array([0.1, 0.9], np.float32)
    truth, found = [jax.jit(model.apply)(params, x, t) for model in models[:2]]
    plain, chunked, splash = [str(jax.make_jaxpr(model.apply)(params, x, t)) for model in models]
    assert splash == chunked != plain  # one program on a CPU
    # Sums of 144 terms in another order.
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-5 * np.abs(truth).max())
