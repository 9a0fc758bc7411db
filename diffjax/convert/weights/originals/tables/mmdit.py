"""The transformers of Stable Diffusion 3 and 3.5, as Stability wrote them; their configs from shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffjax.convert.weights.originals.tables.naming import Naming, table
from diffjax.models import settings
from diffjax.models.transformers import mmdit as model

FIRST = "joint_blocks.0.x_block.attn.qkv.weight"
HEAD = 64  # channels of a head in all of them
ENDS = (
    ("pos_embed", "pos_embed.pos_embed"),
    ("x_embedder.proj.*", "pos_embed.proj.*"),
    ("t_embedder.mlp.0.*", "time_text_embed.timestep_embedder.linear_1.*"),
    ("t_embedder.mlp.2.*", "time_text_embed.timestep_embedder.linear_2.*"),
    ("y_embedder.mlp.0.*", "time_text_embed.text_embedder.linear_1.*"),
    ("y_embedder.mlp.2.*", "time_text_embed.text_embedder.linear_2.*"),
    ("context_embedder.*", "context_embedder.*"),
    # A shift and then a scale there, the scale first here.
    ("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", "swap"),
    ("final_layer.linear.*", "proj_out.*"),
)
X, CONTEXT, OURS = "joint_blocks.#.x_block", "joint_blocks.#.context_block", "transformer_blocks.#"
BLOCKS = (
    (f"{X}.attn.qkv.*", f"{OURS}.attn.to_q.* {OURS}.attn.to_k.* {OURS}.attn.to_v.*"),
    (f"{CONTEXT}.attn.qkv.*", f"{OURS}.attn.add_q_proj.* {OURS}.attn.add_k_proj.* {OURS}.attn.add_v_proj.*"),
    (f"{X}.attn2.qkv.*", f"{OURS}.attn2.to_q.* {OURS}.attn2.to_k.* {OURS}.attn2.to_v.*"),
    (f"{X}.attn.ln_q.*", f"{OURS}.attn.norm_q.*"),
    (f"{X}.attn.ln_k.*", f"{OURS}.attn.norm_k.*"),
    (f"{CONTEXT}.attn.ln_q.*", f"{OURS}.attn.norm_added_q.*"),
    (f"{CONTEXT}.attn.ln_k.*", f"{OURS}.attn.norm_added_k.*"),
    (f"{X}.attn2.ln_q.*", f"{OURS}.attn2.norm_q.*"),
    (f"{X}.attn2.ln_k.*", f"{OURS}.attn2.norm_k.*"),
    (f"{X}.attn.proj.*", f"{OURS}.attn.to_out.0.*"),
    (f"{CONTEXT}.attn.proj.*", f"{OURS}.attn.to_add_out.*"),
    (f"{X}.attn2.proj.*", f"{OURS}.attn2.to_out.0.*"),
    (f"{X}.adaLN_modulation.1.*", f"{OURS}.norm1.linear.*"),
    (f"{CONTEXT}.adaLN_modulation.1.*", f"{OURS}.norm1_context.linear.*"),
    (f"{X}.mlp.fc1.*", f"{OURS}.ff.net.0.proj.*"),
    (f"{X}.mlp.fc2.*", f"{OURS}.ff.net.2.*"),
    (f"{CONTEXT}.mlp.fc1.*", f"{OURS}.ff_context.net.0.proj.*"),
    (f"{CONTEXT}.mlp.fc2.*", f"{OURS}.ff_context.net.2.*"),
)


def naming(config: Mapping[str, Any]) -> Naming:
    """The names of an `SD3Transformer2DModel` with this config."""
    last = settings.read(model.KIND, model.Settings, config).num_layers - 1
    ours, theirs = (name.replace("#", str(last)) for name in (OURS, CONTEXT))
    # The last block has for its text what the end has for the image.
    return table(((f"{theirs}.adaLN_modulation.1.*", f"{ours}.norm1_context.linear.*", "swap"), *ENDS, *BLOCKS))


def config(shapes: Mapping[str, tuple[int, ...]], family: str) -> dict[str, Any]:
    """The config of an `SD3Transformer2DModel` from the shapes of its tensors."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    numbers = lambda part: sorted({int(n.split(".")[1]) for n in shapes if n.startswith("joint_blocks.") and part in n})
    head = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (HEAD,))[0]
    return {
        "_class_name": "SD3Transformer2DModel", "sample_size": 128, "patch_size": patch, "in_channels": channels,
        "num_layers": len(numbers(".x_block.")), "attention_head_dim": head, "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1], "caption_projection_dim": width,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]) if "pos_embed" in shapes else None,
        "dual_attention_layers": numbers(".attn2."),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
    }  # fmt: skip
