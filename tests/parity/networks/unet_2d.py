"""UNet2DModel."""

from networks import Case, nchw, nhwc

KIND = "UNet2DModel"
SMALL = dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=4, sample_size=8)


def _case(size=8, batch=2, **config):
    channels = config.get("in_channels", 3)
    inputs = {"x": ("normal", (batch, size, size, channels)), "t": ("times", batch)}
    if config.get("time_embedding_type") == "fourier":
        inputs["t"] = ("sigmas", batch)
    if config.get("class_embed_type") == "timestep":
        inputs["y"] = ("times", batch)
    elif config.get("class_embed_type") == "identity":
        inputs["y"] = ("normal", (batch, config["time_embedding_dim"]))
    elif config.get("num_class_embeds"):
        inputs["y"] = ("integers", (batch,), config["num_class_embeds"])
    return Case(KIND, config, inputs, gradients=True)


PLAIN = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
CASES = {
    "unet_2d_ddpm": _case(**SMALL, **PLAIN, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1),
    "unet_2d_adm": _case(
        **SMALL, down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
        num_class_embeds=5, downsample_type="resnet", upsample_type="resnet", attn_norm_num_groups=8,
    ),
    "unet_2d_ncsnpp": _case(
        **SMALL | dict(block_out_channels=(32, 32), norm_num_groups=None),
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier", mid_block_scale_factor=1.41421,
    ),
}  # fmt: skip


def theirs(module, given):
    t = given["t"] if given["t"].is_floating_point() else given["t"].long()
    y = given.get("y")
    if y is not None and not y.is_floating_point():
        y = y.long()
    return {"out": nhwc(module(nchw(given["x"]), t, y).sample)}


def ours(model, params, given):
    return {"out": model.apply(params, given["x"], given["t"], given.get("y"))}


def random_case(rng):
    pick = lambda *values: values[rng.integers(len(values))]
    levels = int(rng.integers(1, 4))
    config = dict(
        layers_per_block=int(rng.integers(1, 3)),
        mid_block_scale_factor=pick(1.0, 1.5),
        act_fn=pick("silu", "gelu", "mish", "swish", "relu"),
        norm_eps=pick(1e-5, 1e-6),
        flip_sin_to_cos=pick(True, False),
        freq_shift=pick(0, 1),
        dropout=pick(0.0, 0.1),
        center_input_sample=pick(True, False),
        mid_block_type=pick("UNetMidBlock2D", "UNetMidBlock2D", None),
        add_attention=pick(True, True, False),
        resnet_time_scale_shift=pick("default", "scale_shift"),
    )
    if rng.random() < 0.25:
        config |= dict(
            block_out_channels=tuple(int(rng.choice([32, 64])) for _ in range(levels)),
            down_block_types=tuple(pick("SkipDownBlock2D", "AttnSkipDownBlock2D") for _ in range(levels)),
            up_block_types=tuple(pick("SkipUpBlock2D", "AttnSkipUpBlock2D") for _ in range(levels)),
            time_embedding_type=pick("fourier", "positional"),
            norm_num_groups=pick(None, 8),
            attention_head_dim=pick(None, 8),
        )
    else:
        config |= dict(
            in_channels=int(rng.integers(1, 5)),
            out_channels=int(rng.integers(1, 7)),
            block_out_channels=tuple(int(rng.choice([8, 16, 24])) for _ in range(levels)),
            down_block_types=tuple(
                pick("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D") for _ in range(levels)
            ),
            up_block_types=tuple(pick("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D") for _ in range(levels)),
            time_embedding_type=pick("positional", "fourier", "learned"),
            num_train_timesteps=1000,
            norm_num_groups=pick(4, 8),
            attn_norm_num_groups=pick(None, 2),
            attention_head_dim=pick(None, 4, 8),
            downsample_padding=pick(0, 1),
            downsample_type=pick("conv", "resnet"),
            upsample_type=pick("conv", "resnet"),
        )
    kind = pick("none", "table", "timestep", "identity")
    width = 4 * config["block_out_channels"][0]
    config["time_embedding_dim"] = width if kind == "identity" else pick(None, 24)
    if kind == "table":
        config["num_class_embeds"] = 6
    elif kind != "none":
        config["class_embed_type"] = kind
        if config["time_embedding_type"] == "learned" and kind == "timestep":
            config["time_embedding_type"] = "positional"
    return _case(size=8, **config)
