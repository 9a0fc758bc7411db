"""Text encoders inside of original checkpoints: OpenCLIP's under its own names, CLIP's and T5's under those of
transformers; their configs from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffjax.convert.weights.originals.tables.naming import Naming, table
from diffjax.models import kind_of

HEAD = 64  # channels of a head in all of them


def naming(config: Mapping[str, Any]) -> Naming:
    """OpenCLIP's names of a `CLIPTextModel`, or one with a projection."""
    projected = kind_of(config) == "CLIPTextModelWithProjection"
    tower = "text_model." if projected else ""
    ours, theirs = f"{tower}encoder.layers.#", "transformer.resblocks.#"
    attention = [f"{ours}.self_attn.{name}_proj" for name in "qkv"]
    return table((
        ("positional_embedding", f"{tower}embeddings.position_embedding.weight"),
        ("token_embedding.weight", f"{tower}embeddings.token_embedding.weight"),
        ("ln_final.*", f"{tower}final_layer_norm.*"),
        *((f"{theirs}.attn.in_proj_{leaf}", " ".join(f"{n}.{leaf}" for n in attention)) for leaf in ("weight", "bias")),
        (f"{theirs}.attn.out_proj.*", f"{ours}.self_attn.out_proj.*"),
        (f"{theirs}.ln_1.*", f"{ours}.layer_norm1.*"),
        (f"{theirs}.ln_2.*", f"{ours}.layer_norm2.*"),
        (f"{theirs}.mlp.c_fc.*", f"{ours}.mlp.fc1.*"),
        (f"{theirs}.mlp.c_proj.*", f"{ours}.mlp.fc2.*"),
        ("text_projection", "text_projection.weight", "turn"),
    ))  # fmt: skip


def openclip_config(shapes: Mapping[str, tuple[int, ...]], kind: str) -> dict[str, Any]:
    """The config of OpenCLIP's tower; without a projection it lacks its last layer, as Stable Diffusion 2 uses it."""
    projected = kind == "CLIPTextModelWithProjection"
    hidden = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
    layers = len({name.split(".")[2] for name in shapes if name.startswith("transformer.resblocks.")})
    projection = shapes.get("text_projection", shapes["ln_final.weight"])[-1]
    return _clip(
        kind, shapes["token_embedding.weight"], shapes["positional_embedding"], hidden, layers - (not projected),
        projection, "gelu",
    )  # fmt: skip


def clip_config(shapes: Mapping[str, tuple[int, ...]], kind: str) -> dict[str, Any]:
    """The config of a CLIP tower under transformers' names: ViT-L/14 by its width, else one of OpenCLIP."""
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    hidden = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    layers = len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")})
    tokens = shapes["embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight", tokens[1:])[0]
    act = "quick_gelu" if tokens[1] <= 768 else "gelu"
    return _clip(kind, tokens, shapes["embeddings.position_embedding.weight"], hidden, layers, projection, act)


def _clip(kind, tokens, positions, hidden, layers, projection, act):
    # 2, which older files of transformers say, for the greatest id: that of the end of the text.
    return {
        "architectures": [kind], "model_type": "clip_text_model", "vocab_size": tokens[0], "hidden_size": tokens[1],
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": max(1, tokens[1] // HEAD),
        "max_position_embeddings": positions[0], "projection_dim": projection, "hidden_act": act, "eos_token_id": 2,
        "bos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip


def t5_config(shapes: Mapping[str, tuple[int, ...]], kind: str) -> dict[str, Any]:
    """The config of a T5 encoder under transformers' names."""
    layer = "encoder.block.0.layer"
    buckets, heads = shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"]
    gated = f"{layer}.1.DenseReluDense.wi_0.weight"
    vocabulary, width = shapes["shared.weight"]
    return {
        "architectures": [kind], "model_type": "t5", "vocab_size": vocabulary, "d_model": width,
        "d_kv": shapes[f"{layer}.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes[gated if gated in shapes else f"{layer}.1.DenseReluDense.wi.weight"][0],
        "num_layers": len({name.split(".")[2] for name in shapes if name.startswith("encoder.block.")}),
        "num_heads": heads, "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated in shapes else "relu",
    }  # fmt: skip
