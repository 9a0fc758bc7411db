"""Settings that make no network are refused with the nearest that do, before anything is allocated."""

import re

import pytest

from diffjax.models import MODELS, from_config, preset
from diffjax.registry import build

WRONG = [
    ("dit(patch=3)", "patch=3 does not divide the image sides 16, 24; the nearest that does is patch=2"),
    ("dit(width=30, heads=4)", "heads=4 does not divide the width 30; the nearest that does is heads=3"),
    ("dit(width=30, heads=3)", "the nearest is width=32"),
    ("dit(depth=-1)", "depth=-1: expected an integer >= 1"),
    ("dit(depth=1.5)", "depth=1.5: expected an integer >= 1"),
    ("dit(patch=0)", "patch=0: expected an integer >= 1"),
    ("dit(mlp_ratio=0)", "mlp_ratio=0: expected a positive number"),
    ("dit(mlp_ratio=float)", "literals"),
    ("dit(dtype='bf16')", "dtype='bf16': known: float32, bfloat16, float16, float64; did you mean 'bfloat16'"),
    ("dit(dropout=1.0)", r"dropout=1.0: expected a rate in \[0, 1\)"),
    ("dit(time_embed='sinusoid')", "did you mean 'sinusoidal'"),
    ("dit(head=4)", "did you mean 'heads'"),
    ("mlp(width=15)", "15 channels for the time embedding"),
    ("mlp(depth=-2)", "depth=-2: expected an integer >= 0"),
    ("mlp(expand=0)", "expand=0: expected an integer >= 1"),
    (
        "unet(width=20, mults=(1, 2), groups=8, attention=())",
        "groups=8 does not divide the channels 20, 40; .*groups=10",
    ),
    ("unet(width=32, head_width=48, attention=())", "head_width=48 does not divide the channels 64; .*head_width=32"),
    ("unet(attention=(12,))", r"attention at 12, but the feature maps have heights \[16, 8, 4, 2\]; did you mean 16"),
    ("unet(mults=(1, 1, 1, 1, 1))", "5 levels need sides divisible by 16, got 16x24; use at most 4 mults"),
    ("unet(mults=())", r"mults=\(\): expected a factor"),
    ("unet(mults=(1, 0.5))", "mults=0.5: expected an integer >= 1"),
    ("unet(blocks=0)", "blocks=0: expected an integer >= 1"),
    ("vit()", "unknown model 'vit'.*did you mean 'dit'"),
]


@pytest.mark.parametrize("spec, message", WRONG)
def test_wrong_settings(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec, MODELS, "model", shape=(16, 24, 3), num_classes=10)


@pytest.mark.parametrize(
    "kind, name, value, wanted",
    [
        ("DiTTransformer2DModel", "num_layers", None, "int, such as 28"),
        ("DiTTransformer2DModel", "num_layers", True, "int, such as 28"),
        ("DiTTransformer2DModel", "norm_eps", "1e-5", "float, such as 1e-05"),
        ("DiTTransformer2DModel", "out_channels", "8", "int | None, such as None"),
        ("UNet2DModel", "block_out_channels", 64, "tuple[int, ...], such as"),
        ("UNet2DModel", "block_out_channels", [64, None], "tuple[int, ...], such as"),
        ("UNet2DModel", "sample_size", [64, 64, 3], "int | tuple[int, int] | None, such as None"),
        ("UNet2DModel", "act_fn", ["silu"], "str, such as 'silu'"),
        ("UNet2DConditionModel", "transformer_layers_per_block", [1, [2, "3"]], "int | tuple[int | tuple[int, ...], "),
    ],
)
def test_a_value_of_another_type_is_refused(kind, name, value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"{kind}: {name}=") + ".*" + re.escape(f"expected {wanted}")):
        from_config({"_class_name": kind, name: value})


# The length is a prime: to try all numbers below it would take days.
@pytest.mark.parametrize("value, best", [(0, 1), (-2, 1), (10**18, 10**12 + 39), (10, 1)])
def test_what_does_not_divide_a_length_is_told_at_once(value, best):
    with pytest.raises(ValueError, match=f"num_heads={value} does not divide embed_dim .* is num_heads={best}$"):
        from_config({"_class_name": "UViT", "embed_dim": 10**12 + 39, "num_heads": value})


def test_a_path_is_no_config():
    with pytest.raises(ValueError, match="the config is .sd/unet.: expected .*; `diffjax.convert.load` reads a folder"):
        from_config("sd/unet")


def test_an_unknown_keyword_is_refused():
    config = {"_class_name": "DiTTransformer2DModel"}
    with pytest.raises(ValueError, match="unknown keyword attention_impl='cudnn'; known: .*did you mean 'attention'"):
        from_config(config, attention_impl="cudnn")
    with pytest.raises(ValueError, match="unknown keyword num_layers=2; .*goes into its config"):
        from_config(config, num_layers=2)


@pytest.mark.parametrize("name", MODELS)
def test_wrong_shape_and_classes(name):
    given = {"network": {"_class_name": "UNet2DModel"}} if name == "checkpoint" else {}
    with pytest.raises(ValueError, match=r"shape=\(8, 8\): expected \(height, width, channels\)"):
        MODELS[name](shape=(8, 8), **given)
    with pytest.raises(ValueError, match="num_classes=-1: expected an integer >= 0"):
        MODELS[name](shape=(8, 8, 1), num_classes=-1, **given)


def test_unknown_preset():
    with pytest.raises(ValueError, match="unknown preset 'dit_xl2'.*did you mean 'dit_xl_2'"):
        preset("dit_xl2")
    assert preset("dit_s_4", dropout=0.1) == preset("dit_s_4") | {"dropout": 0.1}
