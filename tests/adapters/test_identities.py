"""What adapters leave alone, bit for bit: those that have learnt nothing, and those whose weight is zero.

LoRA changes parameters: equal parameters make equal outputs, so nothing is run. The others add to activations. There
the networks run one operation after the other (`scan=False`, no `jit`): within one program an added zero may change
what XLA fuses, and with that the rounding of the last bits, which `test_controlnet_of_sdxl_in_one_program` bounds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import params_of
from networks import clip, flux, mmdit, unet_cond
from networks.unet_chain import HINT, SHARED, XL

from diffjax.adapters import controlnet, ip_adapter, lora, textual_inversion
from diffjax.models import MODELS, from_config
from diffjax.nn.functional import names_of

FAMILIES = (unet_cond, mmdit, flux, clip)
CASES = {name: case for family in FAMILIES for name, case in family.CASES.items()}
# Kernels of some of the layers: a linear map, a convolution.
KEYS = {
    "unet_cond_sdxl": "mid_block/.*(attn2/to_[qk]|conv1)/", "sd35": "to_[qkv]/", "flux-dev": "to_[qkv]/",
    "clip-text": "_proj/",
}  # fmt: skip


NATIVE = dict(
    mlp=dict(width=8, depth=2), unet=dict(width=8, mults=(1,), attention=(4,), head_width=4, groups=2),
    dit=dict(width=8, depth=2, heads=2),
)  # fmt: skip


def network(name):
    if name in NATIVE:
        return MODELS[name](shape=(4, 4, 1), **NATIVE[name])
    case = CASES[name]
    named = {"architectures": [case.kind]} if case.kind.startswith("CLIP") else {"_class_name": case.kind}
    return from_config({**named, **case.config})


@pytest.mark.parametrize("name", [*KEYS, *NATIVE])
def test_lora_without_b_and_lora_without_weight(name):
    shapes = jax.eval_shape(network(name).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: np.float32(rng.standard_normal(a.shape)), shapes)
    fresh = lora.init(jax.random.key(0), params, [KEYS.get(name, "kernel$")], rank=2)
    learnt = jax.tree.map(lambda a: a + 1, fresh)
    assert len(fresh.pairs) >= 3
    for given in ([(fresh, 1.0)], [(learnt, 0.0)], [(fresh, -2.0), (learnt, jnp.float32(0))]):
        jax.tree.map(np.testing.assert_array_equal, lora.apply(params, given), params)
    changed = names_of(lora.apply(params, [(learnt, 1.0)]))
    assert all((changed[pair] != names_of(params)[pair]).any() for pair in fresh.pairs)


CONFIG = unet_cond.SD | dict(
    block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
)


@pytest.fixture(scope="module")
def unet():
    """The network with room for a picture, its parameters, and how it denoises."""
    net = ip_adapter.with_pictures(CONFIG, 1, scan=False)
    plain = from_config({"_class_name": "UNet2DConditionModel", **CONFIG}, scan=False)
    params = params_of(plain)
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    x, t, context = normal(0, 2, 4, 4, 4), jnp.array([3, 700]), normal(1, 2, 5, 12)
    adapter = ip_adapter.init(jax.random.key(2), params, 6)
    both = ip_adapter.join(params, [adapter])
    denoise = lambda **given: np.asarray(net.apply(both, x, t, context, **given))
    alone = np.asarray(plain.apply(params, x, t, context))
    return dict(given=(x, t, context), denoise=denoise, alone=alone, adapter=adapter)


def made(net, params, name):
    """`params` with the leaves whose name has `name` as `net.init` makes them."""
    leaves = names_of(params)
    fresh = jax.jit(lambda key: {k: leaf for k, leaf in names_of(net.init(key)).items() if name in k})
    leaves |= fresh(jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values())


def test_controlnet_at_first_and_at_scale_zero(unet):
    steering = {name: (CONFIG | {"in_channels": 4})[name] for name in SHARED if name in CONFIG or name == "in_channels"}
    net = controlnet.controlnet(steering | HINT, scan=False)
    x, t, context = unet["given"]
    picture = jax.random.normal(jax.random.key(3), (2, 8, 8, 3))
    say = lambda params, scale: net.apply(params, x, t, context, picture, scale=scale)
    learnt = params_of(net)
    for said in (say(made(net, learnt, "controlnet_"), 1.0), say(learnt, 0.0)):
        assert not any(a.any() for a in jax.tree.leaves(said))
    np.testing.assert_array_equal(unet["denoise"](residuals=said.down, mid_residual=said.mid), unet["alone"])
    said = say(learnt, 1.0)
    assert np.abs(unet["denoise"](residuals=said.down, mid_residual=said.mid) - unet["alone"]).max() > 0.01


def test_controlnet_of_sdxl_in_one_program():
    plain = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    config = unet_cond.SD | unet_cond.XL | XL | plain | {"in_channels": 4}
    net, steering = (
        from_config({"_class_name": kind, **settings})
        for kind, settings in (
            ("UNet2DConditionModel", config), ("ControlNetModel", {k: config[k] for k in SHARED if k in config} | HINT)
        )
    )  # fmt: skip
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    given = dict(pooled=normal(3, 2, 6), time_ids=jnp.arange(12.0).reshape(2, 6))
    x, t, context, picture = normal(0, 2, 4, 4, 4), jnp.array([3, 700]), normal(1, 2, 5, 12), normal(2, 2, 8, 8, 3)

    @jax.jit
    def steered(params, learnt, scale):
        said = steering.apply(learnt, x, t, context, picture, scale=scale, **given)
        return net.apply(params, x, t, context, residuals=said.down, mid_residual=said.mid, **given)

    params, learnt = params_of(net), params_of(steering)
    alone = np.asarray(jax.jit(lambda params: net.apply(params, x, t, context, **given))(params))
    # Some hundred roundings lie between an added zero and the output.
    bound = 32 * np.spacing(np.abs(alone).max())
    np.testing.assert_allclose(steered(params, learnt, 0.0), alone, rtol=0, atol=bound)
    assert np.abs(steered(params, learnt, 1.0) - alone).max() > 0.01


def test_a_controlnet_starts_from_its_own_unet():
    own = {"conv_in": {"kernel": np.zeros((3, 3, 4, 8))}, "controlnet_mid_block": {}}
    other = {"conv_in": {"kernel": np.zeros((3, 3, 4, 16))}}
    with pytest.raises(ValueError, match="params are none of a ControlNet"):
        controlnet.params_of_unet(other, own)
    with pytest.raises(ValueError, match=r"wrong shapes: conv_in/kernel \(3, 3, 4, 16\) instead of"):
        controlnet.params_of_unet(own, other)


def test_a_fresh_controlnet_learns():
    levels = dict(block_out_channels=(8,), down_block_types=("DownBlock2D",), mid_block_type="UNetMidBlock2D")
    config = levels | dict(layers_per_block=1, norm_num_groups=4, cross_attention_dim=6) | HINT
    net = controlnet.controlnet(config)
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    given = normal(0, 2, 4, 4, 4), jnp.array([3, 700]), normal(1, 2, 3, 6), normal(2, 2, 8, 8, 3)
    params = jax.jit(net.init)(jax.random.key(0))
    zeros = {name: params[name] for name in ("controlnet_down_blocks", "controlnet_mid_block")}
    assert not any(leaf.any() for leaf in jax.tree.leaves(zeros))
    loss = lambda zeros: sum(jnp.sum(a * (1 + a)) for a in jax.tree.leaves(net.apply(params | zeros, *given)))
    for name, leaf in names_of(jax.jit(jax.grad(loss))(zeros)).items():
        assert np.abs(leaf).max() > 0.01, name


def test_t2i_adapter_at_scale_zero(unet):
    net = from_config({"_class_name": "T2IAdapter", "channels": (8,), "num_res_blocks": 1})
    params, picture = params_of(net), jax.random.normal(jax.random.key(4), (2, 32, 32, 3))
    features = lambda scale: net.apply(params, picture, scale=scale)
    np.testing.assert_array_equal(unet["denoise"](adapter=features(0.0)), unet["alone"])
    assert np.abs(unet["denoise"](adapter=features(1.0)) - unet["alone"]).max() > 0.01


def test_ip_adapter_at_scale_zero(unet):
    tokens = ip_adapter.project(unet["adapter"], jax.random.normal(jax.random.key(5), (2, 6)))
    for scale in (0, jnp.float32(0)):
        np.testing.assert_array_equal(unet["denoise"](pictures=[(tokens, scale)]), unet["alone"])
    one = unet["denoise"](pictures=[(tokens, jnp.array([0.0, 0.6]))])
    np.testing.assert_array_equal(one[0], unet["alone"][0])
    assert np.abs(one[1] - unet["alone"][1]).max() > 0.01


def test_textual_inversion_without_the_word():
    case = CASES["clip-text"]
    config = {"architectures": ["CLIPTextModel"], **case.config}
    encoder, larger = from_config(config), from_config(textual_inversion.extended(config, 2))
    params, ids = params_of(encoder), jnp.array(case.inputs["ids"][1])
    rows = textual_inversion.init(params, "<cat>", like=5, count=2)
    more, found = textual_inversion.add(params, rows)
    encode = lambda net, params, ids: jax.jit(net.apply)(params, ids)
    alone = encode(encoder, params, ids)
    jax.tree.map(np.testing.assert_array_equal, encode(larger, more, ids), alone)
    used = encode(larger, more, ids.at[0, 1].set(found["<cat>"][0])).last
    assert np.abs(used - alone.last).max() > 0.01
