"""Sharding rules of every class of network: they cover its parameters, split nearly all bytes, and change nothing."""

import json
import math
import subprocess
import sys
from pathlib import Path

import drawn
import networks
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from diffjax.models import NETWORKS, from_config, kind_of
from diffjax.train import paths
from diffjax.train.parallel.sharding import param_sharding

MESH = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
CASES = drawn.configs()
LEVELS = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
VIT_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
XXL = dict(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
# Published sizes, where the defaults of a class are none.
PUBLISHED = {
    "AutoencoderKL": dict(LEVELS, block_out_channels=(128, 256, 512, 512), layers_per_block=2),
    "CLIPTextModel": CLIP_L,
    "CLIPTextModelWithProjection": dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    ),
    "CLIPVisionModel": VIT_L,
    "CLIPVisionModelWithProjection": VIT_L | dict(projection_dim=768),
    "ControlNetModel": dict(cross_attention_dim=768),
    "EDM2UNet": dict(img_resolution=64, img_channels=4, label_dim=1000, model_channels=192),
    "FluxControlNetModel": dict(num_layers=5, num_single_layers=10),
    "T5EncoderModel": XXL,
    "Transformer2DModel": dict(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
        patch_size=2, norm_type="ada_norm_zero", num_embeds_ada_norm=1000, activation_fn="gelu-approximate",
        attention_bias=True, norm_elementwise_affine=False,
    ),
    "UMT5EncoderModel": XXL | dict(vocab_size=256384),
    "UNet2DConditionModel": dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "UNet2DModel": dict(
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    ),
    "VQModel": dict(
        block_out_channels=(128, 256, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ),
}  # fmt: skip
# Those that the fast tests compare on 8 devices: matrices in a scan, and convolutions.
FAST = ("DiTTransformer2DModel",)
# One configuration of each class.
FIRST = {kind_of(config): name for name, config in reversed(CASES.items())}


def split_of(model):
    """`{parameter: (its size, into how many parts its rule splits it)}`."""
    shapes = drawn.shapes_of(model)
    where = paths.named_leaves(param_sharding(MESH, shapes, model.rules, "rules"))
    flat = lambda entry: (entry,) if isinstance(entry, str) else entry or ()
    parts = lambda spec: math.prod(MESH.shape[axis] for entry in spec for axis in flat(entry))
    leaves = paths.named_leaves(shapes)
    return {name: (math.prod(leaf.shape), parts(where[name].spec)) for name, leaf in leaves.items()}


@pytest.mark.often(*FIRST.values())
@pytest.mark.parametrize("name", CASES)
def test_rules_cover_every_parameter(name):
    split_of(from_config(CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("family", networks.families())
def test_rules_cover_random_configurations(family):
    rng = np.random.default_rng(0)
    for _ in range(20):
        case = networks.families()[family].random_case(rng)
        split_of(from_config(case.config | {"_class_name": case.kind}))


@pytest.mark.often("AutoencoderKL", "CLIPTextModel", "FluxTransformer2DModel", "T2IAdapter")
@pytest.mark.parametrize("kind", NETWORKS)
def test_nearly_all_bytes_are_split_at_published_sizes(kind):
    model = from_config({"_class_name": kind} | PUBLISHED.get(kind, {}))
    split = split_of(model)
    total = sum(size for size, _ in split.values())
    whole = {name: size / total for name, (size, parts) in split.items() if parts == 1}
    # Biases and norms are left; at 4 parts a device has 0.25 of what is split over both axes.
    assert sum(whole.values()) < 2e-3, dict(sorted(whole.items(), key=lambda item: -item[1])[:5])
    assert sum(size / parts for size, parts in split.values()) / total < 0.36


def on_8_devices(*kinds):
    script = Path(__file__).with_name("sharded.py")
    done = subprocess.run([sys.executable, str(script), *kinds], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def check(kind, run):
    assert run["apart"] < 1, run
    # Devices hold the parts that the rules say, and talk.
    split = split_of(from_config(drawn.small(kind).config)).values()
    assert run["share"] == pytest.approx(sum(size / parts for size, parts in split) / sum(size for size, _ in split))
    assert run["share"] < 0.75 and "all-reduce" in run["collectives"], run


def test_a_split_network_equals_the_whole():
    runs = on_8_devices(*FAST)
    for kind in FAST:
        check(kind, runs[kind])


@pytest.mark.slow
def test_every_split_network_equals_the_whole():
    runs = on_8_devices(*(kind for kind in NETWORKS if kind not in FAST))
    assert {kind: run for kind, run in runs.items() if run["apart"] >= 1} == {}
    for kind, run in runs.items():
        check(kind, run)


def test_a_wrong_sum_would_be_noticed():
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import sharded
    finally:
        sys.path.pop(0)
    truth = {"a": np.array([1.0, -2.0]), "b": np.array([1e-3])}
    assert max(sharded.worst(truth, truth).values()) == 0
    assert sharded.worst(truth, truth | {"b": np.array([2e-3])})["b"] > 100
    assert sharded.worst(truth, truth | {"a": np.array([np.nan, -2.0])})["a"] == math.inf
