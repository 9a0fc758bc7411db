"""Networks of published checkpoints, by shape alone: the quoted numbers, every name and shape that PyTorch has, and
that their call runs through at their full depth."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import jax
import networks
import pytest

from diffjax.convert.weights.places.layout import layout
from diffjax.models import NETWORKS, from_config, kind_of, settings
from diffjax.models.published import PUBLISHED, published
from diffjax.nn.functional import names_of

HERE = Path(__file__).parent
THEIRS = json.loads((HERE.parent / "parity" / "golden" / "published.json").read_text())
# Files as they were published, with what versions of diffusers and transformers added, lacked and left in them.
FILES = {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "configs").glob("*.json"))}
# Millions of parameters, and who tells them; where that is a rounder number, the rest is PyTorch's count.
DDPM, UVIT, EDM2 = "arXiv:2006.11239, Appendix B", "arXiv:2209.12152, Table 1", "arXiv:2312.02696, Table 2"
COUNT = "PyTorch's count"
QUOTED = {
    "sd15/unet": (859.52, "the authors' README: 860 M"),
    "sd15/vae": (83.65, COUNT),
    "sd15/text_encoder": (123.06, "the authors' README: 123 M"),
    "sd15/controlnet": (361, COUNT),
    "sd15/t2i_adapter": (77, "arXiv:2302.08453"),
    "sd21/unet": (865.91, COUNT),
    "sd21/text_encoder": (340.39, COUNT),
    "sdxl/unet": (2567, "arXiv:2307.01952, Table 1: 2.6 B"),
    "sdxl/text_encoder_2": (694.66, "arXiv:2307.01952, Table 1: 817 M with the other encoder"),
    "sdxl/controlnet": (1251, COUNT),
    "sd_x4_upscaler/unet": (473.4, COUNT),
    "if_i_xl/unet": (4305, "the authors' README: 4.3 B"),
    "ddpm_cifar10/unet": (35.7, DDPM),
    "ddpm_celebahq_256/unet": (114, DDPM),
    "consistency_imagenet64/unet": (295.9, "ADM's, arXiv:2206.00364, Table 7"),
    "sd3_medium/transformer": (2084.95, "the model card: 2 B; 56.62 M are fixed positions, 192 x 192 x 1536"),
    "sd35_large/transformer": (8146.28, "the model card: 8.1 B; 89.65 M are fixed positions"),
    "flux_dev/transformer": (11901, "the model card: 12 B"),
    "flux_schnell/transformer": (11891, "the model card: 12 B"),
    "flux/vae": (83.82, COUNT),
    "pixart_alpha_512/transformer": (611, "arXiv:2310.00426: 0.6 B"),
    "t5_xxl/text_encoder": (4762, COUNT),
    "clip_h/vision": (632.08, COUNT),
    "bert_base/text": (109.5, "arXiv:1810.04805, Section 3: 110 M"),
    "gpt2/text": (124.4, "the authors' README: 124 M"),
    "taesd/vae": (2.45, COUNT),
    "kandinsky22/movq": (67.83, COUNT),
    "uvit_mid_2/transformer": (131, UVIT),
    "uvit_large_2/transformer": (287, UVIT),
    "uvit_huge_2/transformer": (501, UVIT),
    "edm2_xs/unet": (125, EDM2),
    "edm2_s/unet": (280, EDM2),
    "edm2_m/unet": (498, EDM2),
    "edm2_l/unet": (777, EDM2),
    "edm2_xl/unet": (1119, EDM2),
    "edm2_xxl/unet": (1523, EDM2),
}
# Files whose settings go by another name in the table; None for those that it lacks.
SAME = {
    "clip_l": None, "flux-text_encoder_2": "t5_xxl/text_encoder", "geowizard-unet": None,
    "sd15-inpainting-unet": "sd15_inpainting/unet", "sd15-unet-again": "sd15/unet",
}  # fmt: skip




def table_name(file):
    return SAME.get(file, file.replace("-", "/", 1))


# Where a file says something else than the table, and why both are right.
EXCEPT = {
    # What `feed_forward_proj` says, once more.
    "flux-text_encoder_2": {"dense_act_fn": (None, "gelu_new"), "is_gated_act": (None, True)},
    # The file was written when 32 was the default; diffusers' pipelines read 64 in its place, with a warning.
    "sd15-inpainting-unet": {"sample_size": (64, 32)},
    "ncsnpp_celebahq_256-unet": {"mid_block_scale_factor": (2**0.5, 1.41421356237)},  # twelve digits of the root
}


def check(config, name):
    model = from_config(config)
    places = layout(names_of(jax.eval_shape(model.init, jax.random.key(0)))).values()
    shapes = {key: place.shape for place in places for key in place.keys}
    count = sum(map(math.prod, shapes.values()))
    if name is not None:
        theirs = THEIRS[name]
        assert (count, len(shapes), networks.digest(shapes)) == (theirs["count"], theirs["tensors"], theirs["digest"])
    if name in QUOTED:
        millions, _ = QUOTED[name]
        digits = len(str(millions).partition(".")[2])
        assert round(count / 1e6, digits) == millions


class Seen(Exception):
    """Carries settings out of a constructor, which takes seconds for the rest."""


def read(config, monkeypatch):
    """The settings of a network, defaults and all."""

    def seen(*given, original=settings.read, **more):
        raise Seen(original(*given, **more))

    with monkeypatch.context() as patch, pytest.raises(Seen) as caught:
        patch.setattr(settings, "read", seen)
        from_config(config)
    return dataclasses.asdict(caught.value.args[0])


@pytest.mark.parametrize("file", [file for file in FILES if SAME.get(file, file) is not None])
def test_the_table_has_the_settings_of_the_published_file(file, monkeypatch):
    ours, theirs = read(published(table_name(file)), monkeypatch), read(FILES[file], monkeypatch)
    assert ours.keys() == theirs.keys()
    # Some files say null for false.
    differ = {key: (ours[key], theirs[key]) for key in ours if (ours[key] or None) != (theirs[key] or None)}
    assert differ == EXCEPT.get(file, {})


@pytest.mark.often(
    "sd15/t2i_adapter", "t5_xxl/text_encoder", "clip_h/vision", "bert_base/text", "edm2_s/unet", "uvit_mid_2/*"
)
@pytest.mark.parametrize("name", PUBLISHED, ids=str)
def test_shapes_are_those_of_pytorch(name):
    check(published(name), name)


@pytest.mark.often(
    "sd15-unet", "sd15-vae", "sd15-text_encoder", "sd15-controlnet", "sdxl-unet", "sdxl-text_encoder_2", "clip_l",
    "sd3_medium-transformer", "flux_dev-transformer", "dit_xl_2_256-transformer", "pixart_alpha_1024-transformer",
    "ddpm_cifar10-unet", "kandinsky21-prior", "taesd-vae",
)  # fmt: skip
@pytest.mark.parametrize("name", FILES, ids=str)
def test_a_published_file_is_taken_as_it_is(name):
    check(FILES[name], table_name(name))


def call_of(config):
    """The inputs of a class, of one sample and few pixels, by position and by name."""
    kind = kind_of(config)
    module = importlib.import_module(NETWORKS[kind].partition(":")[0])
    c = {} if "architectures" in config else {**vars(module.Settings()), **config}
    array = lambda *shape, dtype="float32": jax.ShapeDtypeStruct((1, *shape), dtype)
    whole = lambda *shape: array(*shape, dtype="int32")
    if kind == "VQModel" or kind.startswith("Autoencoder"):
        return (array(32, 32, c["in_channels"]),), {}
    if "architectures" in config:
        return (array(224, 224, 3) if "Vision" in kind else whole(7),), {}
    if kind == "T2IAdapter":
        return (array(64, 64, 3),), {}
    side = c.get("img_size") or c.get("img_resolution") or 64
    x, t = array(side, side, c.get("in_channels") or c.get("in_chans") or c.get("img_channels")), whole()
    text = array(7, c.get("encoder_hid_dim") or c.get("cross_attention_dim") or c.get("joint_attention_dim", 0))
    if kind.startswith(("UNet2DCond", "ControlNet")):
        sizes = ((c["projection_class_embeddings_input_dim"] or 2816) - 1280) // 256  # 6, and 5 of the refiner
        projection, added = c["encoder_hid_dim_type"], c["addition_embed_type"]
        named = dict(
            context=None if projection == "image_proj" else text,
            pooled=array(1280) if added == "text_time" else None,
            time_ids=array(sizes) if added == "text_time" else None,
            y=whole() if c["num_class_embeds"] else None,
        )
        if kind == "ControlNetModel":
            return (x, t), named | dict(picture=array(8 * side, 8 * side, 3))
        return (x, t), named | dict(image=array(1280) if projection == "image_proj" else None)
    if kind == "SD3Transformer2DModel":
        return (x, t, text, array(c["pooled_projection_dim"])), {}
    if kind == "FluxTransformer2DModel":
        places = jax.ShapeDtypeStruct((9, 3), "float32")
        guidance = array() if c["guidance_embeds"] else None
        tokens = array(9, c["in_channels"]), t, text, array(c["pooled_projection_dim"])
        return tokens, dict(positions=places, guidance=guidance)
    if kind == "PixArtTransformer2DModel":
        sizes = dict(resolution=array(2), aspect_ratio=array(1))
        alone = c["sample_size"] != 128 or c["use_additional_conditions"] is False
        return (x, t, array(7, c["caption_channels"])), {} if alone else sizes
    if kind == "PriorTransformer":
        width = c["embedding_dim"]
        return (array(width), t, array(width), array(77, width)), {}
    labels = c.get("num_class_embeds", True)
    return (x, t, whole() if labels else None), {}


@pytest.mark.often("sd15/t2i_adapter", "t5_xxl/text_encoder", "taesd/vae", "gpt2/text", "dit_xl_2_256/transformer")
@pytest.mark.parametrize("name", PUBLISHED, ids=str)
def test_the_call_runs_through(name):
    config = published(name)
    model = from_config(config)
    inputs, named = call_of(config)
    out = jax.eval_shape(
        lambda params, inputs, named: model.apply(params, *inputs, **named),
        jax.eval_shape(model.init, jax.random.key(0)), inputs, named,
    )  # fmt: skip
    assert jax.tree.leaves(out) and all(leaf.dtype == "float32" for leaf in jax.tree.leaves(out))


def test_settings_are_copies_and_names_are_checked():
    published("sd15/vae")["block_out_channels"].append(1)
    assert published("sd15/vae", sample_size=8)["block_out_channels"] == [128, 256, 512, 512]
    assert PUBLISHED["sd15/vae"]["sample_size"] == 512
    with pytest.raises(ValueError, match="unknown checkpoint 'sdxl/unte'; did you mean 'sdxl/unet'.; known: "):
        published("sdxl/unte")
