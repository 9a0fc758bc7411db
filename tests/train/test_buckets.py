"""Training on batches of several image shapes."""

import io

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diffjax.data import batches
from diffjax.train import loop
from diffjax.train.errors import ConfigError
from diffjax.train.parts import prepare
from diffjax.train.state import load_run

MODULE = "user_of_test_buckets"
USER = """
import jax.numpy as jnp
from diffjax.core import Model

def bias(*, shape, num_classes):
    # Cheap to compile, and of any image shape.
    apply = lambda p, x, t, y=None, key=None: p["b"] * x + p["c"]
    return Model(lambda key: {"b": jnp.zeros(()), "c": jnp.zeros(())}, apply, {})
"""


@pytest.fixture
def pictures(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    for i in range(24):
        size = (16, 8) if i % 3 else (8, 8)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


def config(pictures, model, **changes):
    data = f"folder(path={str(pictures)!r}, size=8, buckets=((8, 8), (8, 16)), heldout=2)"
    base = dict(data=data, model=model, batch_size=4, num_steps=8, log_every=4, checkpoint_every=4, ema=("decay(0.9)",))
    return ConfigDict(base | changes)


MODELS = {
    "dit": dict(name="dit", patch=2, width=16, depth=1, heads=2, scan=False),
    "unet": dict(name="unet", width=8, mults=(1, 1), blocks=1, attention=(4,), head_width=8, groups=4),
}


@pytest.mark.parametrize("name", ["dit", pytest.param("unet", marks=pytest.mark.slow)])
def test_a_network_on_one_of_its_shapes_is_the_network_of_that_shape(pictures, name):
    _, parts = prepare(config(pictures, MODELS[name]))
    assert parts.dataset.shapes == ((8, 16, 3), (8, 8, 3))
    # Its last layer starts at zero.
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1, jax.jit(parts.model.init)(jax.random.key(0)))
    wide, square = (jax.random.normal(jax.random.key(1), (2, *shape)) for shape in parts.dataset.shapes)
    t = np.array([0.3, -0.2], np.float32)
    from diffjax.models import MODELS as known
    from diffjax.registry import build

    alone = build(MODELS[name], known, "model", shape=(8, 8, 3), num_classes=0)
    # Parameters of the U-Net are named after the sizes of the first shape; they belong to the same layers.
    leaves = jax.tree.leaves(params)
    same = jax.tree.unflatten(jax.tree.structure(jax.eval_shape(alone.init, jax.random.key(0))), leaves)
    # Each runs once, so that compiling them optimised would take longer than running them.
    fast = dict(compiler_options={"xla_backend_optimization_level": 0})
    run = lambda apply, *given: jax.jit(apply).lower(*given).compile(**fast)(*given)
    np.testing.assert_array_equal(run(parts.model.apply, params, square, t), run(alone.apply, same, square, t))
    assert jax.eval_shape(parts.model.apply, params, wide, t).shape == wide.shape
    with pytest.raises(ValueError, match=r"built for \[B, 8, 16, 3\] or \[B, 8, 8, 3\]"):
        parts.model.apply(params, jax.numpy.zeros((2, 16, 16, 3)), t)


def test_a_run_on_buckets_stops_and_goes_on_to_the_same_bits(pictures, tmp_path, monkeypatch):
    (tmp_path / f"{MODULE}.py").write_text(USER)
    monkeypatch.syspath_prepend(tmp_path)
    model = f"{MODULE}:bias"
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    settings = config(pictures, model)
    _, parts = prepare(settings)
    stream = batches(parts.dataset.train, 4, seed=0)
    assert {next(stream)["image"].shape[1:] for _ in range(8)} == set(parts.dataset.shapes)
    loop.train(settings, whole, stream=io.StringIO())
    loop.train(config(pictures, model, stop_at=4), halves, stream=io.StringIO())
    loop.train(settings, halves, stream=io.StringIO())
    a, b = (jax.tree.leaves(load_run(folder).params) for folder in (whole, halves))
    for x, y in zip(a, b, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_network_that_cannot_take_the_shapes_is_refused_before_anything_is_allocated(pictures):
    with pytest.raises(
        ConfigError, match=r"batches of 2 shapes, and config\.model cannot take \(8, 8, 3\).*no buckets"
    ):
        prepare(config(pictures, dict(name="mlp", width=8, depth=1)))
    with pytest.raises(ConfigError, match="divide"):
        prepare(config(pictures, MODELS["dit"] | dict(patch=16)))
