"""FluxTransformer2DModel."""

import numpy as np

from networks import Case

KIND = "FluxTransformer2DModel"


def _case(batch=2, tokens=6, length=3, residuals=(0, 0), text_places=False, **config):
    config = {"in_channels": 8, "joint_attention_dim": 12, "pooled_projection_dim": 10, **config}
    inputs = {
        "x": ("normal", (batch, tokens, config["in_channels"])),
        "t": ("value", np.float32([0.75, 0.125, 1.0][:batch])),
        "context": ("normal", (batch, length, config["joint_attention_dim"])),
        "pooled": ("normal", (batch, config["pooled_projection_dim"])),
        "positions": ("integers", (tokens, len(config["axes_dims_rope"])), 500),
    }
    if text_places:
        inputs["context_positions"] = ("integers", (length, len(config["axes_dims_rope"])), 9)
    if config.get("guidance_embeds"):
        inputs["guidance"] = ("value", np.float32([3.5, 1.25, 7.0][:batch]))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    for name, count in zip(("residuals", "single_residuals"), residuals, strict=True):
        if count:
            inputs[name] = ("normal", (count, batch, tokens, width))
    return Case(KIND, config, inputs, gradients=True)


TINY = dict(num_attention_heads=2, attention_head_dim=8, axes_dims_rope=(2, 4, 2))
CASES = {
    "flux-dev": _case(**TINY, guidance_embeds=True, num_layers=2, num_single_layers=3, residuals=(2, 2)),
    "flux-fill": _case(**TINY, in_channels=12, out_channels=4, num_layers=1, num_single_layers=1),
}


def theirs(module, given):
    import torch

    real = module.dtype
    residuals = {
        f"controlnet_{kind}block_samples": list(given[name].to(real)) if name in given else None
        for kind, name in (("", "residuals"), ("single_", "single_residuals"))
    }
    guidance = given["guidance"].to(real) if "guidance" in given else None
    places = given.get("context_positions", torch.zeros(given["context"].shape[1], given["positions"].shape[1]))
    given = {k: v.to(real) if v.is_floating_point() else v for k, v in given.items()}
    return {
        "out": module(
            given["x"], given["context"], given["pooled"], given["t"], given["positions"].float(),
            places.float(), guidance, **residuals,
        ).sample
    }  # fmt: skip


def ours(model, params, given):
    given = dict(given)
    return {"out": model.apply(params, *(given.pop(name) for name in ("x", "t", "context", "pooled")), **given)}


def random_case(rng):
    axes = tuple(int(n) for n in rng.choice([2, 4, 6, 8], int(rng.choice([2, 3, 4]))))
    return _case(
        batch=int(rng.integers(1, 4)),
        tokens=int(rng.integers(1, 20)),
        length=int(rng.integers(1, 9)),
        text_places=bool(rng.integers(2)),
        residuals=(int(rng.integers(0, 4)), int(rng.integers(0, 4))),
        num_attention_heads=int(rng.integers(1, 4)),
        attention_head_dim=sum(axes),
        axes_dims_rope=axes,
        num_layers=int(rng.integers(0, 4)),
        num_single_layers=int(rng.integers(0, 5)),
        patch_size=int(rng.integers(1, 3)),
        in_channels=int(rng.integers(1, 9)),
        out_channels=[None, 5][rng.integers(2)],
        joint_attention_dim=int(rng.integers(2, 20)),
        pooled_projection_dim=int(rng.integers(2, 20)),
        guidance_embeds=bool(rng.integers(2)),
    )
