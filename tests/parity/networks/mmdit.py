"""SD3Transformer2DModel.

The layers that are skipped are static, so that the length of an input tells how many: those from the second on.
"""

import numpy as np

from networks import Case, nchw, nhwc

KIND = "SD3Transformer2DModel"


def _case(batch=2, height=4, width=4, tokens=3, residuals=0, skipped=0, **config):
    heads, head = config.setdefault("num_attention_heads", 2), config.setdefault("attention_head_dim", 4)
    config |= dict(caption_projection_dim=heads * head)
    channels = config.setdefault("in_channels", 2)
    patch = config.setdefault("patch_size", 2)
    text, pooled = config.setdefault("joint_attention_dim", 6), config.setdefault("pooled_projection_dim", 5)
    inputs = {
        "x": ("normal", (batch, height, width, channels)),
        "t": ("times", batch),
        "context": ("normal", (batch, tokens, text)),
        "pooled": ("normal", (batch, pooled)),
    }
    if residuals:
        count = (height // patch) * (width // patch)
        inputs["residuals"] = ("normal", (residuals, batch, count, heads * head))
    if skipped:
        inputs["skipped"] = ("value", np.zeros(skipped, np.int32))
    return Case(KIND, config, inputs, gradients=True)


CASES = {
    "sd3": _case(num_layers=3, sample_size=8, out_channels=3, pos_embed_max_size=6, height=8, residuals=2, skipped=1),
    "sd35": _case(
        num_layers=4, sample_size=8, pos_embed_max_size=5, dual_attention_layers=(0, 1), qk_norm="rms_norm"
    ),
}


def _skipped(given):
    return range(1, 1 + len(given["skipped"])) if "skipped" in given else None


def theirs(module, given):
    residuals = given.get("residuals")
    out = module(
        nchw(given["x"]),
        timestep=given["t"].long(),
        encoder_hidden_states=given["context"],
        pooled_projections=given["pooled"],
        block_controlnet_hidden_states=None if residuals is None else list(residuals),
        skip_layers=_skipped(given),
    )
    return {"out": nhwc(out.sample)}


def ours(model, params, given):
    inputs = {name: value for name, value in given.items() if name != "skipped"}
    return {"out": model.apply(params, **inputs, skip_layers=_skipped(given))}


def random_case(rng):
    patch, largest = int(rng.choice([1, 2])), [None, 8, 9][rng.integers(3)]
    layers = int(rng.integers(1, 8))
    dual = [(), tuple(range(rng.integers(layers + 1))), tuple(map(int, rng.choice(8, 3, replace=False)))]
    return _case(
        batch=int(rng.integers(1, 4)),
        height=patch * int(rng.integers(1, 9)),
        width=patch * int(rng.integers(1, 9)),
        tokens=int(rng.integers(1, 9)),
        residuals=int(rng.integers(layers + 2)),
        skipped=int(rng.choice([0, 0, layers - 1])),
        num_layers=layers,
        sample_size=int(rng.choice([8, 12, 16])),
        patch_size=patch,
        in_channels=int(rng.integers(1, 5)),
        out_channels=[None, 6][rng.integers(2)],
        num_attention_heads=int(rng.integers(1, 4)),
        attention_head_dim=int(rng.choice([4, 8, 12])),
        joint_attention_dim=int(rng.integers(1, 12)),
        pooled_projection_dim=int(rng.integers(1, 12)),
        pos_embed_max_size=largest,
        dual_attention_layers=dual[rng.integers(3)],
        qk_norm=[None, "rms_norm", "layer_norm", "fp32_layer_norm"][rng.integers(4)],
    )
