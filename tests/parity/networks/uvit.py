"""U-ViT, whose PyTorch is in `uvit_torch.py`."""

from networks import Case, nchw, nhwc

KIND = "UViT"


def build(case):
    """PyTorch's module of a case."""
    import uvit_torch

    return uvit_torch.UViT(**case.config)


def _case(batch=2, **config):
    config = {"img_size": 4, "patch_size": 2, "embed_dim": 16, "num_heads": 2, "depth": 4} | config
    size, channels = config["img_size"], config.get("in_chans", 3)
    inputs = {"x": ("normal", (batch, size, size, channels)), "t": ("times", batch)}
    if config.get("num_classes", -1) > 0:
        inputs["y"] = ("integers", (batch,), config["num_classes"])
    if config.get("clip_dim") is not None:
        inputs["context"] = ("normal", (batch, config["num_clip_token"], config["clip_dim"]))
    return Case(KIND, config, inputs, gradients=True)


CASES = {
    "uvit-labels": _case(num_classes=5, mlp_time_embed=True, conv=False),
    "uvit-text": _case(clip_dim=6, num_clip_token=3, qkv_bias=True, depth=2),
}


def theirs(module, given):
    context = given["context"].to(module.dtype) if "context" in given else None
    y = given["y"].long() if "y" in given else None
    return {"out": nhwc(module(nchw(given["x"]), given["t"], y, context))}


def ours(model, params, given):
    return {"out": model.apply(params, given["x"], given["t"], given.get("y"), context=given.get("context"))}


def random_case(rng):
    pick = lambda *values: values[rng.integers(len(values))]
    patch, heads = pick(1, 2, 3), int(rng.integers(1, 4))
    text = pick({}, {"clip_dim": 5, "num_clip_token": int(rng.integers(1, 5))}, {"num_classes": 4})
    return _case(
        batch=int(rng.integers(2, 4)),  # of fewer numbers bfloat16 has no statistics
        img_size=patch * int(rng.integers(2, 5)),
        patch_size=patch,
        in_chans=int(rng.integers(2, 5)),
        embed_dim=heads * pick(5, 8, 11),
        depth=int(rng.integers(0, 8)),
        num_heads=heads,
        mlp_ratio=pick(4.0, 2.5, 3),
        qkv_bias=pick(True, False),
        mlp_time_embed=pick(True, False),
        conv=pick(True, False),
        skip=pick(True, False),
        use_checkpoint=pick(True, False),
        **text,
    )
