"""Safety checkers: decisions near the thresholds, and the names in older files."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks.safety import CASES

from diffjax.convert import load, save
from diffjax.convert.weights.tensors import Source, read_header, write
from diffjax.models import from_config
from diffjax.models.text import blacken, safety
from diffjax.nn.functional import names_of

VISION = lambda embeds: SimpleNamespace(image_embeds=embeds)
GOLDEN = Path(__file__).parent.parent / "parity" / "golden" / "safety.npz"


def model_of(name):
    return from_config({"architectures": [CASES[name].kind], **CASES[name].config})


def test_concepts_near_their_thresholds():
    run = {k.partition("/")[2]: v for k, v in np.load(GOLDEN).items() if k.startswith("concepts/")}

    @jax.jit
    @jax.vmap
    def decide(embeds, concepts, special, thresholds, special_thresholds):
        near, near_special = safety.cosines(embeds, concepts), safety.cosines(embeds, special)
        return safety.judge(near, thresholds, near_special, special_thresholds)

    found = decide(*(run[n] for n in ("embeds", "concepts", "special", "thresholds", "special_thresholds")))
    np.testing.assert_array_equal(found.nsfw, run["nsfw"])
    # The recorded thresholds leave half a thousandth here and there, so both decisions are near ones.
    highest = np.asarray(found.scores).max(-1)
    for flag in (True, False):
        assert np.sum((np.abs(highest - 0.0005) < 0.0002) & (run["nsfw"] == flag)) > 5


def test_heads_at_their_thresholds():
    run = {k.partition("/")[2]: v for k, v in np.load(GOLDEN).items() if k.startswith("heads/")}
    for name, thresholds in (("default", (0.5, 0.5)), ("other", (0.7, -1.0))):
        # The checker itself, on embeddings whose first two numbers are what the heads would say.
        column = lambda i: lambda embeds: embeds[:, i : i + 1]
        parts = SimpleNamespace(vision_model=VISION, p_head=column(0), w_head=column(1))
        given = dict(zip(("nsfw_threshold", "watermark_threshold"), thresholds, strict=True))
        *scores, nsfw, watermark = safety.HeadChecker.__call__(parts, jnp.asarray(run["embeds"]), **given)
        np.testing.assert_array_equal(jnp.stack(scores, 1), run["embeds"])
        np.testing.assert_array_equal(nsfw, run[f"{name}/nsfw"])
        np.testing.assert_array_equal(watermark, run[f"{name}/watermark"])
        images = blacken(blacken(jnp.ones((30, 1)), nsfw), watermark)
        np.testing.assert_array_equal(images, run[f"{name}/images"])


def test_thresholds_of_the_heads_are_arguments():
    model = model_of("safety-if")
    params = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    apply = jax.jit(lambda *to: model.apply(params, x, nsfw_threshold=to[0], watermark_threshold=to[1]))
    out = apply(0.5, 0.5)
    found = apply(out.nsfw_score.min(), out.watermark_score.max())
    assert found.nsfw.sum() == 1 and not found.watermark.any() and found.nsfw.dtype == bool


def test_images_that_are_found_are_black():
    images = jnp.ones((3, 2, 2, 3), jnp.bfloat16)
    found = blacken(images, jnp.array([True, False, True]))
    assert found.dtype == images.dtype and not found[0].any() and not found[2].any()
    np.testing.assert_array_equal(found[1], images[1])


@pytest.mark.parametrize("name, depth", [("safety", 1), ("safety-if", 2)])
def test_names_of_older_and_newer_files(name, depth, tmp_path):
    model = model_of(name)
    params = jax.jit(model.init)(jax.random.key(0))
    save(model, params, tmp_path)
    tensors = read_header(tmp_path / "model.safetensors")[0]
    today = "vision_model." * depth
    assert any(key.startswith(f"{today}embeddings") for key in tensors)
    for other in {1, 2, 3} - {depth}:
        renamed = {}
        for key, tensor in tensors.items():
            inner = key.startswith(today) and "visual_projection" not in key
            renamed["vision_model." * other + key.removeprefix(today) if inner else key] = tensor.part()
        renamed["vision_model." * other + "embeddings.position_ids"] = np.arange(5)[None]
        folder = tmp_path / str(other)
        folder.mkdir()
        (folder / "config.json").write_text((tmp_path / "config.json").read_text())
        sources = {k: Source(v.dtype, v.shape, lambda v=v: v) for k, v in renamed.items()}
        write(folder / "model.safetensors", sources, {})
        jax.tree.map(np.testing.assert_array_equal, load(folder)[1], params)


def test_the_thresholds_do_not_learn():
    model = model_of("safety")
    params = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    gradients = names_of(jax.jit(jax.grad(lambda p: model.apply(p, x).scores.sum()))(params))
    assert gradients["visual_projection/kernel"].any()
    assert not any(leaf.any() for name, leaf in gradients.items() if "embeds" in name)
