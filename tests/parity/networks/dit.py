"""DiTTransformer2DModel."""

from networks import Case, nchw, nhwc

KIND = "DiTTransformer2DModel"


def _case(batch=2, size=8, **config):
    channels = config.get("in_channels", 4)
    classes = config.setdefault("num_embeds_ada_norm", 7)
    inputs = {"x": ("normal", (batch, size, size, channels)), "t": ("times", batch)}
    return Case(KIND, config, inputs | {"y": ("integers", (batch,), classes + 1)}, gradients=True)


CASES = {
    "dit": _case(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=3, sample_size=8, norm_num_groups=4
    ),
}


def theirs(module, given):
    return {"out": nhwc(module(nchw(given["x"]), given["t"].long(), given["y"].long()).sample)}


def ours(model, params, given):
    return {"out": model.apply(params, given["x"], given["t"], given["y"])}


def random_case(rng):
    size = int(rng.choice([8, 16]))
    return _case(
        size=size,
        in_channels=int(rng.integers(1, 5)),
        out_channels=[None, 6][rng.integers(2)],
        num_attention_heads=int(rng.integers(1, 4)),
        attention_head_dim=int(rng.choice([8, 16])),
        num_layers=int(rng.integers(1, 12)),
        attention_bias=bool(rng.integers(2)),
        sample_size=int(rng.choice([size, 8])),
        patch_size=int(rng.choice([2, 4])),
        activation_fn=str(rng.choice(["gelu-approximate", "gelu", "geglu", "geglu-approximate", "swiglu"])),
        norm_elementwise_affine=bool(rng.integers(2)),
        norm_eps=float(rng.choice([1e-5, 1e-6])),
        dropout=float(rng.choice([0.0, 0.1])),
    )
