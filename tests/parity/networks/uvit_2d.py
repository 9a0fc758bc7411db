"""UVit2DModel."""

from networks import Case, nhwc

KIND = "UVit2DModel"


def _case(batch=2, height=4, width=4, length=3, micro=2, **config):
    config = {
        "hidden_size": 16, "num_attention_heads": 2, "block_out_channels": 12, "block_num_heads": 2, "in_channels": 6,
        "num_res_blocks": 1, "num_hidden_layers": 2, "intermediate_size": 10, "encoder_hidden_size": 7,
        "cond_embed_dim": 5, "micro_cond_encode_dim": 4, "vocab_size": 20, "codebook_size": 9,
    } | config  # fmt: skip
    config["micro_cond_embed_dim"] = micro * config["micro_cond_encode_dim"]
    inputs = {
        "x": ("integers", (batch, height, width), config["vocab_size"]),
        "context": ("normal", (batch, length, config["encoder_hidden_size"])),
        "pooled": ("normal", (batch, config["cond_embed_dim"])),
        "micro": ("integers", (batch, micro), 513),
    }
    return Case(KIND, config, inputs, gradients=True)


CASES = {
    "uvit-amused-512": _case(downsample=True, upsample=True),
}


def theirs(module, given):
    context, pooled = (given[name].to(module.dtype) for name in ("context", "pooled"))
    return {"out": nhwc(module(given["x"].long(), context, pooled, given["micro"].float()))}


def ours(model, params, given):
    x, context, pooled = (given[name] for name in ("x", "context", "pooled"))
    return {"out": model.apply(params, x, None, context, pooled, micro=given["micro"])}


def random_case(rng):
    pick = lambda *values: values[rng.integers(len(values))]
    return _case(
        batch=int(rng.integers(1, 4)),
        height=int(rng.integers(1, 8)),
        width=int(rng.integers(1, 8)),
        length=int(rng.integers(1, 6)),
        micro=int(rng.integers(1, 6)),
        hidden_size=pick(8, 12, 16),
        use_bias=pick(True, False),
        hidden_dropout=pick(0.0, 0.1),
        micro_cond_encode_dim=pick(4, 7),
        block_out_channels=pick(8, 12, 14),
        block_num_heads=int(rng.integers(1, 4)),
        num_attention_heads=int(rng.integers(1, 4)),
        num_res_blocks=int(rng.integers(0, 3)),
        downsample=pick(True, False),
        upsample=pick(True, False),
        num_hidden_layers=int(rng.integers(0, 4)),
        attention_dropout=pick(0.0, 0.1),
        intermediate_size=pick(10, 24),
        layer_norm_eps=pick(1e-6, 1e-5),
        ln_elementwise_affine=pick(True, False),
    )
