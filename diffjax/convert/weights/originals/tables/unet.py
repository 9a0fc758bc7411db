"""The U-Nets of Stable Diffusion 1, 2 and XL, as CompVis and Stability wrote them; their configs from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.originals.tables.naming import Cut, Naming
from diffjax.convert.weights.originals.tables.sgm import sgm_name
from diffjax.models import settings
from diffjax.models.unets import unet_cond

# The first tensor of each, to recognise one by.
FIRST = "input_blocks.0.0.weight"
# Channels of the first level of the published ones, whose heads and groups are known: all but SDXL's refiner, and that.
WIDTHS = (320, 384)
HEAD = 64  # channels of a head of attention in Stable Diffusion 2 and XL; 1 has eight heads
# Pixels of the latents that they were trained at.
SIDES = {"sd": 64, "sd2": 96, "sdxl": 128, "refiner": 128}


def naming(config: Mapping[str, Any]) -> Naming:
    """The names of a `UNet2DConditionModel` with this config."""
    c = settings.read(unet_cond.KIND, unet_cond.Settings, config)
    attended = ["CrossAttn" in kind for kind in c.up_block_types]
    label = "class_embedding" if c.class_embed_type else "add_embedding"

    def where(name: str) -> Cut | None:
        module, _, leaf = name.rpartition(".")
        if name == "class_embedding.weight":
            return Cut("label_emb.weight")
        theirs = sgm_name(module.replace(label, "add_embedding", 1), c.layers_per_block, attended)
        return None if theirs is None else Cut(f"{theirs}.{leaf}")

    return where


def family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which of `SIDES` a U-Net is."""
    width = _context(shapes)
    if "label_emb.0.0.weight" in shapes and width in (1280, 2048):
        return "sdxl" if width == 2048 else "refiner"
    return "sd" if len(shapes.get(_first(shapes, ".proj_in.weight"), ())) == 4 else "sd2"


def config(shapes: Mapping[str, tuple[int, ...]], family: str) -> dict[str, Any]:
    """The config of a `UNet2DConditionModel` from the shapes of its tensors.

    Raises:
      WeightsError: for what the shapes do not tell.
    """
    levels, mid = _levels(shapes, "input_blocks"), _depth(shapes, "middle_block.1")
    widths = [level["width"] for level in levels]
    layers = {level["layers"] for level in levels}
    if len(layers) != 1 or "label_emb.weight" in shapes or not mid:
        raise WeightsError("its shapes are none of a U-Net of Stable Diffusion 1, 2 or XL: give its config")
    # Without attention of its own, a level's number counts for nothing but the last's, which is that of the middle.
    depths = [level["depth"] or 1 for level in levels[:-1]] + [levels[-1]["depth"] or mid]
    depths = [mid] if {level["depth"] for level in levels} <= {0, mid} else depths
    down = ["CrossAttnDownBlock2D" if level["depth"] else "DownBlock2D" for level in levels]
    if widths[0] not in WIDTHS:
        told = f"no published one is {widths[0]} channels wide, and no shape tells its heads"
        raise WeightsError(f"{told}: give its config")
    linear = len(shapes[_first(shapes, ".proj_in.weight")]) == 2
    out = {
        "_class_name": "UNet2DConditionModel", "sample_size": SIDES[family], "in_channels": shapes[FIRST][1],
        "out_channels": shapes["out.2.weight"][0], "block_out_channels": widths, "layers_per_block": layers.pop(),
        "down_block_types": down, "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "cross_attention_dim": _context(shapes), "use_linear_projection": linear,
        "transformer_layers_per_block": depths if len(depths) > 1 else mid,
        "attention_head_dim": [width // HEAD for width in widths] if linear else 8,
    }  # fmt: skip
    if "label_emb.0.0.weight" in shapes:
        width = shapes["label_emb.0.0.weight"][1]
        named = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        out |= named if family in ("sdxl", "refiner") else {"class_embed_type": "projection"}
        out["projection_class_embeddings_input_dim"] = width
    return out


def _levels(shapes, blocks):
    """Width, layers and depth of the transformers of each level: blocks up to a downsampler, the first one left out."""
    levels: list[dict[str, int]] = [{"width": 0, "layers": 0, "depth": 0}]
    numbers = sorted({int(name.split(".")[1]) for name in shapes if name.startswith(f"{blocks}.")})
    if numbers != list(range(len(numbers))):
        raise WeightsError(f"{blocks} are not numbered through from 0")
    for i in numbers[1:]:
        convolution = shapes.get(f"{blocks}.{i}.0.in_layers.2.weight")
        if convolution:
            level = levels[-1]
            level["width"], level["layers"] = convolution[0], level["layers"] + 1
            level["depth"] = max(level["depth"], _depth(shapes, f"{blocks}.{i}.1"))
        else:
            levels.append({"width": 0, "layers": 0, "depth": 0})
    return levels


def _depth(shapes, prefix):
    start = f"{prefix}.transformer_blocks."
    return len({name[len(start) :].split(".")[0] for name in shapes if name.startswith(start)})


def _first(shapes, end):
    return next((name for name in shapes if name.endswith(end)), "")


def _context(shapes):
    return (*shapes.get(_first(shapes, ".attn2.to_k.weight"), ()), 0, 0)[1]
