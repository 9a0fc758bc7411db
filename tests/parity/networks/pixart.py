"""PixArtTransformer2DModel."""

from networks import Case, nchw, nhwc

KIND = "PixArtTransformer2DModel"


def _case(batch=2, height=4, width=4, tokens=3, masked=True, **config):
    heads, head = config.setdefault("num_attention_heads", 2), config.setdefault("attention_head_dim", 6)
    captions = config.setdefault("caption_channels", 5)
    inner = config.setdefault("cross_attention_dim", heads * head)
    inputs = {
        "x": ("normal", (batch, height, width, config.setdefault("in_channels", 2))),
        "t": ("times", batch),
        "context": ("normal", (batch, tokens, captions or inner)),
    }
    if masked:
        inputs["mask"] = ("mask", (batch, tokens))
    sized = config.get("use_additional_conditions")
    if config.setdefault("sample_size", 8) == 128 if sized is None else sized:
        inputs["resolution"] = ("integers", (batch, 2), 1024)
        inputs["aspect_ratio"] = ("normal", (batch, 1))
    return Case(KIND, config, inputs, gradients=True)


CASES = {
    "pixart_alpha": _case(num_layers=2, sample_size=128, out_channels=4, interpolation_scale=2),
    "pixart_sigma": _case(
        num_layers=2, sample_size=16, height=8, masked=False, caption_channels=None, cross_attention_dim=5
    ),
}


def theirs(module, given):
    sizes = {name: given.get(name) for name in ("resolution", "aspect_ratio")}
    out = module(
        nchw(given["x"]),
        timestep=given["t"].long(),
        encoder_hidden_states=given["context"],
        encoder_attention_mask=given.get("mask"),
        added_cond_kwargs=sizes,
    )
    return {"out": nhwc(out.sample)}


def ours(model, params, given):
    return {"out": model.apply(params, **given)}


def random_case(rng):
    patch, heads, head = int(rng.choice([1, 2])), int(rng.integers(1, 4)), int(rng.choice([12, 24]))
    projected = bool(rng.integers(2))
    return _case(
        batch=int(rng.integers(1, 4)),
        height=patch * int(rng.integers(1, 9)),
        width=patch * int(rng.integers(1, 9)),
        tokens=int(rng.integers(1, 9)),
        masked=bool(rng.integers(2)),
        num_attention_heads=heads,
        attention_head_dim=head,
        in_channels=int(rng.integers(1, 5)),
        out_channels=[None, 6][rng.integers(2)],
        num_layers=int(rng.integers(1, 6)),
        dropout=float(rng.choice([0.0, 0.1])),
        cross_attention_dim=heads * head if projected else int(rng.integers(1, 12)),
        caption_channels=int(rng.integers(1, 12)) if projected else None,
        attention_bias=bool(rng.integers(2)),
        sample_size=int(rng.choice([8, 16, 128])),
        patch_size=patch,
        activation_fn=str(
            rng.choice(["gelu-approximate", "gelu", "geglu", "geglu-approximate", "swiglu", "linear-silu"])
        ),
        norm_elementwise_affine=bool(rng.integers(2)),
        norm_eps=float(rng.choice([1e-5, 1e-6])),
        interpolation_scale=[None, 1, 2, 0.5][rng.integers(4)],
        use_additional_conditions=[None, True, False][rng.integers(3)],
    )
