"""SD3ControlNetModel."""

from networks import Case, nchw

KIND = "SD3ControlNetModel"


def _case(batch=2, height=4, width=4, tokens=3, **config):
    heads, head = config.setdefault("num_attention_heads", 2), config.setdefault("attention_head_dim", 4)
    config |= dict(caption_projection_dim=heads * head)
    channels, patch = config.setdefault("in_channels", 2), config.setdefault("patch_size", 2)
    text, pooled = config.setdefault("joint_attention_dim", 6), config.setdefault("pooled_projection_dim", 5)
    count = (height // patch) * (width // patch)
    tokens_only = not config.get("use_pos_embed", True)
    x = (batch, count, heads * head) if tokens_only else (batch, height, width, channels)
    wide = channels + config.get("extra_conditioning_channels", 0)
    inputs = {
        "x": ("normal", x),
        "t": ("times", batch),
        "pooled": ("normal", (batch, pooled)),
        "control": ("normal", (batch, height, width, wide)),
    }
    if text is not None:
        inputs["context"] = ("normal", (batch, tokens, text))
    return Case(KIND, config, inputs, gradients=True)


CASES = {
    "sd3_controlnet": _case(
        num_layers=2, sample_size=8, pos_embed_max_size=6, extra_conditioning_channels=1,
        dual_attention_layers=(0,), qk_norm="rms_norm",
    ),
    "sd35_controlnet": _case(num_layers=2, sample_size=8, joint_attention_dim=None, use_pos_embed=False),
}  # fmt: skip


def theirs(module, given):
    x = given["x"]
    out = module(
        x if x.ndim == 3 else nchw(x),
        controlnet_cond=nchw(given["control"]),
        conditioning_scale=0.7,
        timestep=given["t"].long(),
        encoder_hidden_states=given.get("context"),
        pooled_projections=given["pooled"],
    )
    return {str(i): residual for i, residual in enumerate(out.controlnet_block_samples)}


def ours(model, params, given):
    inputs = (given.get(name) for name in ("x", "t", "context", "pooled", "control"))
    return {str(i): residual for i, residual in enumerate(model.apply(params, *inputs, scale=0.7))}


def random_case(rng):
    patch, layers = int(rng.choice([1, 2])), int(rng.integers(1, 5))
    return _case(
        batch=int(rng.integers(1, 4)),
        height=patch * int(rng.integers(1, 9)),
        width=patch * int(rng.integers(1, 9)),
        tokens=int(rng.integers(1, 9)),
        num_layers=layers,
        sample_size=int(rng.choice([8, 12, 16])),
        patch_size=patch,
        in_channels=int(rng.integers(1, 5)),
        num_attention_heads=int(rng.integers(1, 4)),
        attention_head_dim=int(rng.choice([4, 8, 12])),
        joint_attention_dim=[None, 6][rng.integers(2)],
        pooled_projection_dim=int(rng.integers(1, 12)),
        pos_embed_max_size=[None, 8, 9][rng.integers(3)],
        extra_conditioning_channels=int(rng.integers(3)),
        dual_attention_layers=tuple(range(rng.integers(layers + 1))),
        qk_norm=[None, "rms_norm", "layer_norm", "fp32_layer_norm"][rng.integers(4)],
        pos_embed_type=["sincos", None][rng.integers(2)],
        use_pos_embed=bool(rng.integers(2)),
    )
