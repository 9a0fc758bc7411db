"""The autoencoders of Stable Diffusion and FLUX.1, as their authors wrote them; their configs from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.originals.tables.naming import Naming, table
from diffjax.models import settings
from diffjax.models.autoencoders import kl

FIRST = "encoder.down.0.block.0.conv1.weight"
GROUPS = 32  # of channels, in every level
# By family: the factor on latents and what is taken off before; pixels that it was trained at.
LATENTS = {
    "sd": (0.18215, None, 512), "sd2": (0.18215, None, 768), "sdxl": (0.13025, None, 1024),
    "refiner": (0.13025, None, 1024), "sd3": (1.5305, 0.0609, 1024), "flux": (0.3611, 0.1159, 1024),
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def naming(config: Mapping[str, Any]) -> Naming:
    """The names of an `AutoencoderKL` with this config."""
    levels = len(settings.read(kl.KIND, kl.Settings, config).block_out_channels)
    lines: list[tuple] = []
    for side in ("encoder", "decoder"):
        lines.append((f"{side}.norm_out.*", f"{side}.conv_norm_out.*"))
        for ours, theirs in ATTENTION.items():
            way = "" if ours == "group_norm" else "pixels"
            lines.append((f"{side}.mid.attn_1.{theirs}.weight", f"{side}.mid_block.attentions.0.{ours}.weight", way))
            lines.append((f"{side}.mid.attn_1.{theirs}.bias", f"{side}.mid_block.attentions.0.{ours}.bias"))
        lines += [(f"{side}.mid.block_{i + 1}.~", f"{side}.mid_block.resnets.{i}.~") for i in range(2)]
    for i in range(levels):
        # The decoder's levels are counted from the finest there, from the coarsest here.
        for way, side, place in (("down", "encoder", i), ("up", "decoder", levels - 1 - i)):
            theirs, ours = f"{side}.{way}.{place}", f"{side}.{way}_blocks.{i}"
            lines += [
                (f"{theirs}.block.#.nin_shortcut.*", f"{ours}.resnets.#.conv_shortcut.*"),
                (f"{theirs}.block.#.~", f"{ours}.resnets.#.~"),
                (f"{theirs}.{way}sample.conv.*", f"{ours}.{way}samplers.0.conv.*"),
            ]
    ends = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
    lines += [(f"{name}.*", f"{name}.*") for name in (*ends, "quant_conv", "post_quant_conv")]
    return table(lines)


def config(shapes: Mapping[str, tuple[int, ...]], family: str) -> dict[str, Any]:
    """The config of an `AutoencoderKL` from the shapes of its tensors.

    Raises:
      WeightsError: for an unknown family, whose factor on latents no shape tells.
    """
    if family not in LATENTS:
        raise WeightsError(
            f"the file does not tell whose autoencoder it is, and so how latents are scaled: give family=, one of "
            f"{', '.join(LATENTS)}, or a config"
        )
    levels = len({name.split(".")[2] for name in shapes if name.startswith("encoder.down.")})
    first = lambda i: shapes[f"encoder.down.{i}.block.0.conv1.weight"]
    layers = len({name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")})
    if first(0)[0] % GROUPS:
        raise WeightsError(f"{first(0)[0]} channels are no multiple of the authors' {GROUPS} groups: give its config")
    scale, shift, side = LATENTS[family]
    return {
        "_class_name": "AutoencoderKL", "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0], "latent_channels": shapes["decoder.conv_in.weight"][1],
        "block_out_channels": [first(i)[0] for i in range(levels)], "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in shapes, "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "sample_size": side, "scaling_factor": scale, "shift_factor": shift,
    }  # fmt: skip
