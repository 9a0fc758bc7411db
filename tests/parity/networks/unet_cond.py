"""UNet2DConditionModel."""

from networks import Case, nchw, nhwc

KIND = "UNet2DConditionModel"
SMALL = dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=2)
SD = dict(
    SMALL, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=12,
)  # fmt: skip
IF = dict(
    SMALL, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), cross_attention_dim=32,
    up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=4,
    mid_block_type="UNetMidBlock2DSimpleCrossAttn", resnet_time_scale_shift="scale_shift", act_fn="gelu",
    encoder_hid_dim=12, encoder_hid_dim_type="text_proj", addition_embed_type="text", addition_embed_type_num_heads=2,
    cross_attention_norm="group_norm", timestep_post_act="gelu", time_embedding_act_fn="gelu",
)  # fmt: skip


def _case(size=(8, 8), batch=2, masked=False, **config):
    channels, length = config.get("in_channels", 4), 5
    hinted = config.get("addition_embed_type") == "image_hint"
    inputs = {"x": ("normal", (batch, *size, channels - 4 * hinted)), "t": ("times", batch)}
    cross = config["cross_attention_dim"]
    if config.get("encoder_hid_dim_type") != "image_proj":
        width = config.get("encoder_hid_dim") or (cross if isinstance(cross, int) else cross[0])
        inputs["context"] = ("normal", (batch, length, width))
        if masked:
            inputs["mask"] = ("mask", (batch, length))
    labels = config.get("class_embed_type")
    if labels in ("projection", "simple_projection"):
        inputs["y"] = ("normal", (batch, config["projection_class_embeddings_input_dim"]))
    elif labels == "identity":
        inputs["y"] = ("normal", (batch, config["time_embedding_dim"]))
    elif labels == "timestep":
        inputs["y"] = ("times", batch)
    elif config.get("num_class_embeds"):
        inputs["y"] = ("integers", (batch,), config["num_class_embeds"])
    added = config.get("addition_embed_type")
    if added == "text_time":
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs |= {"pooled": ("normal", (batch, width)), "time_ids": ("integers", (batch, 6), 1024)}
    if added == "text_image":
        inputs |= {"pooled": ("normal", (batch, cross)), "image": ("normal", (batch, cross))}
    if added in ("image", "image_hint") or config.get("encoder_hid_dim_type") == "image_proj":
        inputs["image"] = ("normal", (batch, config["encoder_hid_dim"]))
    if hinted:
        inputs["hint"] = ("normal", (batch, 8 * size[0], 8 * size[1], 3))
    if config.get("time_cond_proj_dim"):
        inputs["cond"] = ("normal", (batch, config["time_cond_proj_dim"]))
    return Case(KIND, config, inputs, gradients=True)


XL = dict(
    addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=30,
    use_linear_projection=True,
)  # fmt: skip
CONTROLLED = _case(**SD)
CONTROLLED.inputs.update(
    r0=("normal", (2, 8, 8, 8)), r1=("normal", (2, 8, 8, 8)), r2=("normal", (2, 4, 4, 8)), r3=("normal", (2, 4, 4, 16)),
    mid=("normal", (2, 4, 4, 16)), a0=("normal", (2, 8, 8, 8)), a1=("normal", (2, 4, 4, 16)),
    a2=("normal", (2, 4, 4, 16)),
)  # fmt: skip
CASES = {
    "unet_cond_controlled": CONTROLLED,
    "unet_cond_sd": _case(**SD, masked=True, size=(9, 7)),
    "unet_cond_lcm_inpaint": _case(
        **SD, in_channels=9, time_cond_proj_dim=6, upcast_attention=True, only_cross_attention=True, masked=True,
        conv_in_kernel=4, conv_out_kernel=2, size=(9, 8),
    ),
    "unet_cond_sdxl": _case(**SD | XL | dict(attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2))),
    "unet_cond_if": _case(**IF, masked=True),
    "unet_cond_if_super": _case(
        **IF, in_channels=6, class_embed_type="timestep", resnet_skip_time_act=True, resnet_out_scale_factor=1.4142,
    ),
    "unet_cond_kandinsky": _case(
        **IF | dict(
            encoder_hid_dim_type="image_proj", addition_embed_type="image_hint", cross_attention_norm=None,
            in_channels=8, out_channels=8,
        )
    ),
}  # fmt: skip


def theirs(module, given):
    longs = {k: v.long() if not v.is_floating_point() else v for k, v in given.items()}
    added = {"text_embeds": longs.get("pooled"), "time_ids": longs.get("time_ids"), "image_embeds": longs.get("image")}
    if "hint" in given:
        added["hint"] = nchw(given["hint"])
    added = {k: v for k, v in added.items() if v is not None}
    call = dict(class_labels=longs.get("y"), timestep_cond=given.get("cond"), added_cond_kwargs=added or None)
    if "mid" in given:
        call["down_block_additional_residuals"] = [nchw(a) for a in extra("r", given)]
        call["mid_block_additional_residual"] = nchw(given["mid"])
        # PyTorch's U-Net takes them off the list and adds in place.
        call["down_intrablock_additional_residuals"] = [nchw(a).clone() for a in extra("a", given)]
    mask = longs.get("mask")
    out = module(nchw(given["x"]), longs["t"], given.get("context"), encoder_attention_mask=mask, **call).sample
    return {"out": nhwc(out)}


def extra(letter, given):
    """Residuals `r0, r1, ...` of a ControlNet or features `a0, ...` of a T2I-Adapter."""
    return [given[key] for key in sorted(given) if key[0] == letter and key[1:].isdigit()]


def ours(model, params, given):
    residuals, adapter = extra("r", given), extra("a", given)
    given = {k: v for k, v in given.items() if not k[1:].isdigit()}
    if "mid" in given:
        given |= dict(mid_residual=given.pop("mid"), residuals=residuals, adapter=adapter)
    return {"out": model.apply(params, given.pop("x"), given.pop("t"), **given)}


def random_case(rng):
    pick = lambda *values: values[rng.integers(len(values))]
    count = int(rng.integers(1, 4))
    config = dict(
        block_out_channels=tuple(int(rng.choice([8, 16, 24])) for _ in range(count)),
        norm_num_groups=pick(4, 8),
        layers_per_block=pick(1, 2, tuple(int(rng.integers(1, 3)) for _ in range(count))),
        attention_head_dim=pick(2, 4, tuple(int(rng.choice([2, 4])) for _ in range(count))),
        transformer_layers_per_block=pick(1, 2, tuple(int(rng.integers(0, 3)) for _ in range(count))),
        down_block_types=tuple(
            pick("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "SimpleCrossAttnDownBlock2D",
                 "ResnetDownsampleBlock2D", "AttnDownBlock2D") for _ in range(count)
        ),
        up_block_types=tuple(
            pick("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "SimpleCrossAttnUpBlock2D",
                 "ResnetUpsampleBlock2D", "AttnUpBlock2D") for _ in range(count)
        ),
        mid_block_type=pick(
            *("UNetMidBlock2DCrossAttn",) * 2, "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None
        ),
        in_channels=pick(4, 8, 9),
        out_channels=pick(4, 8),
        center_input_sample=pick(False, True),
        flip_sin_to_cos=pick(True, False),
        freq_shift=pick(0, 1),
        downsample_padding=pick(0, 1),
        mid_block_scale_factor=pick(1, 1.5),
        act_fn=pick("silu", "gelu", "mish"),
        norm_eps=pick(1e-5, 1e-6),
        cross_attention_dim=pick(12, 32),
        use_linear_projection=pick(False, True),
        resnet_time_scale_shift=pick("default", "scale_shift"),
        resnet_skip_time_act=pick(False, True),
        resnet_out_scale_factor=pick(1.0, 1.4),
        time_embedding_type=pick("positional", "positional", "fourier"),
        time_embedding_dim=32,
        time_embedding_act_fn=pick(None, "gelu"),
        timestep_post_act=pick(None, "silu"),
        time_cond_proj_dim=pick(None, 6),
        conv_in_kernel=pick(3, 1, 5),
        conv_out_kernel=pick(3, 1, 2),
        only_cross_attention=pick(False, False, True),
        dropout=pick(0.0, 0.1),
        addition_embed_type_num_heads=2,
    )  # fmt: skip
    labels = pick(None, "table", "timestep", "identity", "projection", "simple_projection")
    if labels == "table":
        config["num_class_embeds"] = 5
    elif labels:
        config["class_embed_type"] = labels
    if labels:
        config["class_embeddings_concat"] = pick(False, True)
    added = pick(None, None, "text", "text_time", "text_image", "image")
    if labels in ("projection", "simple_projection") or added == "text_time":
        config |= dict(projection_class_embeddings_input_dim=30, addition_time_embed_dim=4)
    if config.get("class_embeddings_concat"):
        added = None
    config["addition_embed_type"] = added
    if added == "image":
        config |= dict(encoder_hid_dim=10, encoder_hid_dim_type="image_proj")
    elif added in (None, "text") and rng.random() < 0.4:
        config |= dict(encoder_hid_dim=10, encoder_hid_dim_type=pick("text_proj", None))
    masked = bool(rng.integers(2)) and added != "image"
    # PyTorch's other blocks double what was an odd size to one that does not fit.
    sizes = [(8, 8), (12, 8)] + [(9, 10)] * ({"CrossAttnUpBlock2D", "UpBlock2D"} >= set(config["up_block_types"]))
    size = pick(*sizes)
    if size == (9, 10) and rng.random() < 0.5:  # which a kernel of even size makes one less
        config["conv_in_kernel"] = 4
    return _case(size=size, masked=masked, **config)
