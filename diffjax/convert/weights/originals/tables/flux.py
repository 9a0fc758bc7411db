"""The transformers of FLUX.1, as Black Forest Labs wrote them; their configs from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.originals.tables.naming import Naming, table

FIRST = "double_blocks.0.img_attn.qkv.weight"
TWO, ONE = "transformer_blocks.#", "single_transformer_blocks.#"
EMBEDDED = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
SINGLE = f"{ONE}.attn.to_q.* {ONE}.attn.to_k.* {ONE}.attn.to_v.* {ONE}.proj_mlp.*"


def _stream(theirs: str, attention: str, added: str, out: str, context: str) -> list[tuple]:
    """The lines of the image's or the text's part of a block of two streams."""
    here = f"double_blocks.#.{theirs}"
    projections = " ".join(f"{TWO}.attn.{name}.*" for name in attention.split())
    return [
        (f"{here}_mod.lin.*", f"{TWO}.norm1{context}.linear.*"),
        (f"{here}_attn.qkv.*", projections),
        (f"{here}_attn.norm.query_norm.scale", f"{TWO}.attn.norm_{added}q.weight"),
        (f"{here}_attn.norm.key_norm.scale", f"{TWO}.attn.norm_{added}k.weight"),
        (f"{here}_attn.proj.*", f"{TWO}.attn.{out}.*"),
        (f"{here}_mlp.0.*", f"{TWO}.ff{context}.net.0.proj.*"),
        (f"{here}_mlp.2.*", f"{TWO}.ff{context}.net.2.*"),
    ]


LINES = (
    *((f"{theirs}.in_layer.*", f"time_text_embed.{ours}.linear_1.*") for theirs, ours in EMBEDDED.items()),
    *((f"{theirs}.out_layer.*", f"time_text_embed.{ours}.linear_2.*") for theirs, ours in EMBEDDED.items()),
    ("img_in.*", "x_embedder.*"),
    ("txt_in.*", "context_embedder.*"),
    *_stream("img", "to_q to_k to_v", "", "to_out.0", ""),
    *_stream("txt", "add_q_proj add_k_proj add_v_proj", "added_", "to_add_out", "_context"),
    ("single_blocks.#.modulation.lin.*", f"{ONE}.norm.linear.*"),
    ("single_blocks.#.linear1.*", SINGLE),
    ("single_blocks.#.norm.query_norm.scale", f"{ONE}.attn.norm_q.weight"),
    ("single_blocks.#.norm.key_norm.scale", f"{ONE}.attn.norm_k.weight"),
    ("single_blocks.#.linear2.*", f"{ONE}.proj_out.*"),
    # A shift and then a scale there, the scale first here.
    ("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", "swap"),
    ("final_layer.linear.*", "proj_out.*"),
)


def naming(config: Mapping[str, Any]) -> Naming:
    """The names of a `FluxTransformer2DModel` with this config."""
    return table(LINES)


def config(shapes: Mapping[str, tuple[int, ...]], family: str) -> dict[str, Any]:
    """The config of a `FluxTransformer2DModel` from the shapes of its tensors.

    Raises:
      WeightsError: for heads of other sizes than the published ones, whose rotations the shapes do not tell.
    """
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    if head != 128:
        told = f"heads of {head} channels: no shape tells how many of them turn with each axis"
        raise WeightsError(f"{told}: give its config")
    count = lambda start: len({name.split(".")[1] for name in shapes if name.startswith(start)})
    width, channels = shapes["img_in.weight"]
    out = shapes["final_layer.linear.weight"][0]
    return {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": channels,
        "out_channels": None if out == channels else out, "num_layers": count("double_blocks."),
        "num_single_layers": count("single_blocks."), "attention_head_dim": head, "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }  # fmt: skip
