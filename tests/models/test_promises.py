"""What every class of `NETWORKS` promises of the ways to compute it: `scan`, `remat`, `attention`, types, taps."""

import functools
import re

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from diffjax.models import NETWORKS, from_config
from diffjax.nn import POLICIES, attention, tapped
from diffjax.nn.functional import names_of

# Those whose compilation is cheap are in the fast tests.
CHEAP = ("CLIPTextModel", "DiTTransformer2DModel", "T2IAdapter", "T5EncoderModel")
WITHOUT_ATTENTION = {"AutoencoderTiny", "T2IAdapter"}
# Without layers of one shape, or with each level another: nothing to scan over.
UNSCANNED = {"AutoencoderKL", "AutoencoderTiny", "EDM2UNet", "T2IAdapter", "UNet2DModel", "VQModel"}


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def traced(kind, **how):
    """Whether there is a loop over layers, and whether layers are computed again from their inputs."""
    case = drawn.small(kind)
    shapes = drawn.shapes_of(from_config(case.config))
    found = list(equations(jax.make_jaxpr(drawn.total_of(case, **how))(shapes, case.inputs).jaxpr))
    # The gradient of a convolution has a rematerialisation of its own, with another policy.
    policies = [equation.params["policy"] for equation in found if "policy" in equation.params]
    return any(e.primitive.name == "scan" for e in found), POLICIES["full"] in policies


@functools.lru_cache(maxsize=2)
def run(kind, **how):
    """`(outputs, gradients)` by name."""
    case = drawn.small(kind)
    params = drawn.params_of(from_config(case.config))
    (_, out), grads = jax.jit(jax.value_and_grad(drawn.total_of(case, **how), has_aux=True))(params, case.inputs)
    named = {jax.tree_util.keystr(path): a for path, a in jax.tree_util.tree_leaves_with_path(grads)}
    return {k: np.asarray(a) for k, a in out.items()}, {k: np.asarray(a) for k, a in named.items()}


def compare(a, b):
    """Sums in another order: some roundings of float32, of the largest of each array and of all of them."""
    for truth, found in zip(a, b, strict=True):
        most = max(np.abs(value).max() for value in truth.values())
        for name, value in truth.items():
            atol = 1e-5 * np.abs(value).max() + 1e-6 * most
            np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.often(*CHEAP)
@pytest.mark.parametrize("kind", NETWORKS)
def test_scan_and_remat_are_heard(kind):
    assert traced(kind) == (kind not in UNSCANNED, False)
    scanned, again = traced(kind, scan=False, remat="full")
    # The call that is compared with PyTorch's has the steered transformer behind it, which scans.
    assert again and scanned == (kind == "FluxControlNetModel")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["EDM2UNet", "SD3Transformer2DModel", "StableDiffusionSafetyChecker"])
def test_no_gradient_reaches_what_is_fixed(kind):
    fixed = from_config(drawn.small(kind).config).fixed
    grads = run(kind)[1]
    assert fixed and not any(grads["".join(f"['{part}']" for part in name.split("/"))].any() for name in fixed)


@pytest.mark.often("DiTTransformer2DModel")
@pytest.mark.parametrize("kind", NETWORKS)
def test_scanned_and_unrolled_layers_are_the_same(kind):
    compare(run(kind), run(kind, scan=False))


@pytest.mark.often("DiTTransformer2DModel-full")
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_computed_again_is_the_same(kind, policy):
    compare(run(kind), run(kind, remat=policy))


@pytest.mark.often(*CHEAP, "AutoencoderKL", "SD3Transformer2DModel", "UNet2DModel", "UViT")
@pytest.mark.parametrize("kind", NETWORKS)
def test_attention_is_heard_everywhere(kind, monkeypatch):
    """By what each product of queries and keys is computed, counted while the network is traced."""
    case, calls = drawn.small(kind), {"_plain": 0, "_chunked": 0}

    def count(name, fn):
        def counted(*given):
            calls[name] += 1
            return fn(*given)

        monkeypatch.setattr(attention, name, counted)

    for name in calls:
        count(name, getattr(attention, name))
    found = {}
    for choice in ("xla", "chunked"):
        calls.update(_plain=0, _chunked=0)
        model = from_config(case.config, attention=choice)
        jax.eval_shape(lambda params, model=model: case.ours(model, params, case.inputs), drawn.shapes_of(model))
        found[choice] = dict(calls)
    plain, chunked = found["xla"]["_plain"], found["chunked"]["_chunked"]
    assert found["xla"]["_chunked"] == 0 and (plain > 0) == (kind not in WITHOUT_ATTENTION)
    # The call that is compared with PyTorch's has the steered transformer behind it, in which nothing is chosen.
    assert chunked == plain or (kind == "FluxControlNetModel" and 0 < chunked < plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(NETWORKS) - WITHOUT_ATTENTION))
def test_attention_by_chunks_is_the_same(kind, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 3)
    compare(run(kind), run(kind, attention="chunked"))


@pytest.mark.often("T2IAdapter")
@pytest.mark.parametrize("kind", NETWORKS)
def test_bfloat16_is_near_and_its_gradients_are_float32(kind):
    (wide, _), (half, grads) = run(kind), run(kind, dtype="bfloat16")
    assert all(np.isfinite(a).all() and a.dtype == np.float32 for a in grads.values())
    size = lambda a: np.sqrt(np.mean(np.square(a)))
    errors = {name: size(np.float32(half[name]) - value) / size(value) for name, value in wide.items()}
    if kind == "VQModel":
        # What becomes the nearest row of a table, where another may be nearest.
        errors = {name: error for name, error in errors.items() if name in ("latents", "raw", "loss")}
    assert max(errors.values()) > 0
    # Each layer rounds to 2^-9; a dozen or two of them add up to a few per cent, a wrong cast would be all of it.
    assert max(errors.values()) < 0.1, errors


@pytest.mark.often(*CHEAP)
@pytest.mark.parametrize("kind", NETWORKS)
def test_parameters_are_made_in_the_type_that_is_asked_for(kind):
    config = drawn.small(kind).config
    for dtype in ("float32", "bfloat16"):
        found = {str(a.dtype) for a in jax.tree.leaves(drawn.shapes_of(from_config(config, param_dtype=dtype)))}
        assert found == {dtype}


def heard(kind, change=lambda name, x: x, **how):
    """The names of the activations of a class, and the outputs' shapes."""
    case, names = drawn.small(kind), []
    model = from_config(case.config, **how)

    def function(name, x):
        assert isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating), name
        names.append(name)
        return change(name, x)

    with tapped(function):
        out = jax.eval_shape(lambda params: case.ours(model, params, case.inputs), drawn.shapes_of(model))
    return names, out


@pytest.mark.often(*CHEAP, "BertForMaskedLM", "CLIPModel", "GPT2LMHeadModel", "*SafetyChecker")
@pytest.mark.parametrize("kind", NETWORKS)
def test_activations_have_names(kind):
    names, out = heard(kind)
    assert len(set(names)) >= 3, names
    # In front of the last word there is a place in the checkpoint; layers of a stack have one name for all of them.
    shapes = drawn.shapes_of(from_config(drawn.small(kind).config))
    places = {re.sub(r"(^|/)\d+:\d+(?=/)", "", name) for name in names_of(shapes)}
    scopes = {name.rpartition("/")[0] for name in names} - {""}
    assert not {scope for scope in scopes if not any(place.startswith(scope + "/") for place in places)}
    if kind == "DiTTransformer2DModel":
        again, same = heard(kind, scan=False, remat="full")
        assert set(again) == set(names) and jax.tree.all(jax.tree.map(lambda a, b: a == b, out, same))


@pytest.mark.often("T2IAdapter", "CLIPTextModel")
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_changed_activation_changes_the_output(kind):
    case = drawn.small(kind)
    model = from_config(case.config)
    params = drawn.params_of(model)
    apply = lambda params: case.ours(model, params, case.inputs)
    plain = jax.jit(apply)(params)
    with tapped(lambda name, x: 2 * x):
        doubled = jax.jit(apply)(params)
    assert any(not np.allclose(plain[k], doubled[k], rtol=1e-2) for k in plain)
