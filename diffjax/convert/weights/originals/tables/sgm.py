"""Names of the modules of UNet2DConditionModel in the code of its authors (CompVis' latent-diffusion, Stability's
generative-models), which original checkpoints have, and kohya's scripts for SDXL."""

from __future__ import annotations

import re
from collections.abc import Sequence

ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
INNER = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
# The numbers of both kinds of layers among those of a block.
KINDS = {"resnets": 0, "attentions": 1}
BLOCK = re.compile(r"(down_blocks\.(\d+)|mid_block|up_blocks\.(\d+))\.(\w+)\.(\d+)\.(.+)")


def sgm_name(module: str, layers_per_block: int, attended: Sequence[bool]) -> str | None:
    """The name there of a module such as "down_blocks.1.attentions.0.proj_in"; None for one that has none.

    Blocks are numbered through there: the first convolution, then the layers of each block, then its change of
    resolution. An upsampler follows the attention of its layer.

    Args:
      attended: of each of `up_blocks`, whether it has attention.
    """
    if module in ENDS:
        return ENDS[module]
    match = BLOCK.fullmatch(module)
    if match is None or not isinstance(layers_per_block, int):
        return None
    _, down, up, kind, layer, rest = match.groups()
    layer = int(layer)
    if down is not None:
        first = 1 + int(down) * (layers_per_block + 1)
        if kind == "downsamplers" and rest == "conv":
            return f"input_blocks.{first + layers_per_block}.0.op"
        place = f"input_blocks.{first + layer}"
    elif up is not None:
        first = int(up) * (layers_per_block + 1)
        if kind == "upsamplers" and rest == "conv":
            number = 2 if attended[int(up)] else 1
            return f"output_blocks.{first + layers_per_block}.{number}.conv"
        place = f"output_blocks.{first + layer}"
    else:
        place = "middle_block"
    if kind not in KINDS:
        return None
    number = 2 * layer + KINDS[kind] if place == "middle_block" else KINDS[kind]
    head, _, tail = rest.partition(".")
    return f"{place}.{number}.{'.'.join(filter(None, (INNER.get(head, head), tail)))}"
