"""PriorTransformer."""

from networks import Case

KIND = "PriorTransformer"


def _case(batch=2, tokens=None, masked=True, text=True, **config):
    """With `tokens` x is that many vectors, else one."""
    inner = config["num_attention_heads"] * config["attention_head_dim"]
    width = config.setdefault("embedding_dim", 10)
    length = config.setdefault("num_embeddings", 5)
    prd = config.get("added_emb_type", "prd") is not None
    if not text:  # positions for x alone
        config |= {"num_embeddings": tokens or 1, "additional_embeddings": 0, "encoder_hid_proj_type": None}
    else:
        config["additional_embeddings"] = 2 + (tokens or 1) + prd
    inputs = {
        "x": ("normal", (batch, tokens, width) if tokens else (batch, width)),
        "t": ("times", batch),
        "pooled": ("normal", (batch, config.get("embedding_proj_dim") or width)),
    }
    if text:
        projected = config.get("encoder_hid_proj_type", "linear")
        inputs["context"] = ("normal", (batch, length, width if projected else inner))
        if masked:
            inputs["mask"] = ("mask", (batch, length))
    return Case(KIND, config, inputs, gradients=True)


TINY = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2)
CASES = {
    "prior-kandinsky": _case(**TINY),
    "prior-shap-e": _case(
        **TINY, tokens=4, text=False, added_emb_type=None, norm_in_type="layer", embedding_proj_norm_type="layer",
        embedding_proj_dim=6, clip_embed_dim=12, time_embed_dim=20, time_embed_act_fn="gelu",
    ),
}  # fmt: skip


def theirs(module, given):
    mask = given["mask"].bool() if "mask" in given else None
    out = module(given["x"], given["t"].long(), given["pooled"], given.get("context"), mask)
    return {"out": out.predicted_image_embedding, "unscaled": module.post_process_latents(given["x"][..., :1])}


def ours(model, params, given):
    out = model.apply(
        params, given["x"], given["t"], given["pooled"], given.get("context"), mask=given.get("mask")
    )  # fmt: skip
    return {"out": out, "unscaled": model.apply(params, given["x"][..., :1], method="unscale")}


def random_case(rng):
    text = bool(rng.integers(3))
    tokens = [None, int(rng.integers(1, 6))][rng.integers(2)]
    pick = lambda *values: values[rng.integers(len(values))]
    return _case(
        batch=int(rng.integers(1, 4)),
        tokens=tokens,
        text=text,
        masked=bool(rng.integers(2)),
        num_attention_heads=int(rng.integers(1, 4)),
        attention_head_dim=int(rng.choice([4, 8])),
        num_layers=int(rng.integers(1, 4)),
        embedding_dim=int(rng.integers(2, 12)),
        num_embeddings=int(rng.integers(1, 8)),
        dropout=pick(0.0, 0.1),
        time_embed_act_fn=pick("silu", "swish", "mish", "gelu", "relu"),
        norm_in_type=pick(None, "layer"),
        embedding_proj_norm_type=pick(None, "layer"),
        encoder_hid_proj_type=pick("linear", None),
        added_emb_type=pick("prd", None),
        time_embed_dim=pick(None, 12),
        embedding_proj_dim=pick(None, 6),
        clip_embed_dim=pick(None, 14),
    )
