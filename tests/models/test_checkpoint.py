"""Networks of checkpoints in a training run: from a folder, trained, and back into one."""

import io
import json

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from diffjax.convert import load, save
from diffjax.core.types import Model
from diffjax.folders.convert import convert
from diffjax.models import checkpoint, from_config
from diffjax.nn.functional import names_of
from diffjax.train import loop
from diffjax.train.errors import ConfigError
from diffjax.train.parts import prepare
from diffjax.train.state import load_run

DIT = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2}
UNET = {
    "_class_name": "UNet2DModel", "block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1,
    "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def config(network=DIT, **changes):
    base = dict(
        data="digits()", batch_size=8, num_steps=2, log_every=1, checkpoint_every=2, ema=("decay(0.5)",),
        model=dict(name="checkpoint", network=dict(network)), optim=dict(name="adam", lr=1e-3),
    )  # fmt: skip
    return ConfigDict(base | changes)


@pytest.mark.often("dit of more classes")
@pytest.mark.parametrize(
    "network, null",
    [(DIT, 3), (UNET, 3), (DIT | {"num_embeds_ada_norm": 7}, 7), (UNET | {"num_class_embeds": 8}, 7)],
    ids=["dit", "unet", "dit of more classes", "unet of more classes"],
)
def test_the_call_is_that_of_the_network(network, null):
    """The label behind those of the data, and no label, are the last row of the table, however long that is."""
    model = checkpoint(shape=(8, 8, 1), num_classes=3, network=network)
    params = jax.tree.map(lambda a: a + 0.1, jax.jit(model.init)(jax.random.key(0)))
    x, t = np.ones((2, 8, 8, 1), np.float32), np.float32([0.1, 0.5])
    ours = jax.jit(lambda y: model.apply(params, x, t, y))
    theirs = jax.jit(lambda y: from_config(model.config["network"]).apply(params, x, 1000 * t, y))
    found, none = ours(np.int32([1, 3])), theirs(np.int32([null, null]))
    np.testing.assert_array_equal(found, theirs(np.int32([1, null])))
    assert np.abs(found[0] - none[0]).max() > 1e-4
    if "num_layers" in network:  # one program more, of the cheaper network
        np.testing.assert_array_equal(ours(None), none)


def test_its_repr_is_a_line():
    assert repr(from_config(DIT)).startswith("Model('DiTTransformer2DModel', ")
    assert repr(checkpoint(shape=(8, 8, 1), network=DIT)).startswith("Model('DiTTransformer2DModel', ")
    assert repr(Model(None, None, dict(name="dit", depth=1), rules=(("a" * 99, ()),))) == "Model('dit', 2 settings)"


def test_its_settings_are_told():
    how = dict(dtype="bfloat16", attention_impl="chunked", scan=False, remat="full", extra_in=1, extra_out=2)
    told = checkpoint(shape=(8, 8, 1), network=DIT, **how).config
    assert {name: told[name] for name in how} == how
    assert (told["network"]["in_channels"], told["network"]["out_channels"]) == (2, 3)


def test_constants_of_a_checkpoint_do_not_decay():
    """The frequencies of NCSN++ have no gradient, and a decay of all weights would shrink them."""
    optim = dict(name="adamw", lr=0.1, weight_decay=0.1)
    parts = prepare(config(UNET | {"time_embedding_type": "fourier"}, optim=optim))[1]
    shapes = drawn.shapes_of(parts.model)
    some = {name: shapes[name] for name in ("time_proj", "conv_in")}
    params = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), some)

    @jax.jit
    def moved(params):
        still = jax.tree.map(jnp.zeros_like, params)
        return optax.apply_updates(params, parts.optimizer.update(still, parts.optimizer.init(params), params)[0])

    leaves = names_of(moved(params))
    assert parts.model.fixed == ("time_proj/weight",)
    np.testing.assert_array_equal(leaves.pop("time_proj/weight"), 1)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(leaf, 0.99, rtol=1e-6, err_msg=name)


def test_a_published_network_is_tuned_and_written_back(tmp_path):
    """From a folder into a run, and from the run into a folder that `load` reads."""
    model = checkpoint(shape=(8, 8, 1), num_classes=10, network=DIT)
    net = from_config(model.config["network"])
    start = jax.jit(net.init)(jax.random.key(5))
    save(net, start, tmp_path / "published")
    tuned = config(init_from=str(tmp_path / "published"), ema=("decay(0.5)",))
    loop.train(tuned, str(tmp_path / "run"), stream=(shown := io.StringIO()))
    assert f"beginning with the parameters of {tmp_path / 'published'}" in shown.getvalue()
    run = load_run(str(tmp_path / "run"), items=False)
    convert(str(tmp_path / "run"), str(tmp_path / "tuned"))
    again, params = load(tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["_class_name"] == DIT["_class_name"]
    assert again.config["num_embeds_ada_norm"] == 10
    for a, b, first in zip(*map(jax.tree.leaves, (params, run.params, start)), strict=True):
        np.testing.assert_array_equal(a, b)
        # Two steps of Adam with the rate 1e-3.
        assert np.abs(np.asarray(a) - np.asarray(first)).max() < 3e-3


def test_a_folder_of_another_network_is_refused(tmp_path):
    net = from_config(DIT | {"in_channels": 1, "num_embeds_ada_norm": 10, "sample_size": 8, "num_layers": 3})
    save(net, jax.jit(net.init)(jax.random.key(0)), tmp_path / "published")
    with pytest.raises(ConfigError, match="transformer_blocks/0:2/attn1/to_q/kernel"):
        loop.train(config(init_from=str(tmp_path / "published")), str(tmp_path / "run"), stream=io.StringIO())


@pytest.mark.parametrize(
    "network, words",
    [
        ({"_class_name": "UNet2DConditionModel"}, "init_from.md. A config trains: DiTTransformer2DModel, UNet2DModel$"),
        ({"_class_name": "UNet2D"}, "did you mean 'UNet2DModel'"),
        ({}, "known: DiTTransformer2DModel"),
        (DIT | {"in_channels": 3}, r"need 1 .*so change --config.data \(or --config.loss\)$"),
        (DIT | {"num_embeds_ada_norm": 9}, "the data have 10 classes"),
        (UNET | {"num_class_embeds": 10}, "at least 11"),
        (UNET | {"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported; supported: None"),
        (UNET | {"time_embedding_type": "learned"}, "time_embedding_type='learned' is not supported"),
        (DIT | {"heads": 3}, "unknown setting 'heads'"),
    ],
)
def test_settings_that_do_not_fit(network, words):
    with pytest.raises(ConfigError, match=words):
        prepare(config(network))
