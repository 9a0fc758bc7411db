"""ControlNetModel and T2IAdapter."""

from networks import Case, nchw, nhwc

SMALL = dict(
    block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=2, cross_attention_dim=12,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), conditioning_embedding_out_channels=(4, 8),
)  # fmt: skip
XL = dict(
    addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=30,
    use_linear_projection=True,
)  # fmt: skip


def _controlnet(batch=2, size=8, guess=False, **config):
    times = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)
    inputs = {
        "x": ("normal", (batch, size, size, config.get("in_channels", 4))),
        "t": ("times", batch),
        "context": ("normal", (batch, 5, config["cross_attention_dim"])),
        "picture": ("normal", (batch, times * size, times * size, config.get("conditioning_channels", 3))),
        "guess": ("value", guess),
    }
    labels = config.get("class_embed_type")
    if labels == "timestep":
        inputs["y"] = ("times", batch)
    elif labels:
        widths = dict(identity=4 * config["block_out_channels"][0], projection=30)
        inputs["y"] = ("normal", (batch, widths[labels]))
    elif config.get("num_class_embeds"):
        inputs["y"] = ("integers", (batch,), config["num_class_embeds"])
    if config.get("addition_embed_type") == "text_time":
        inputs |= {"pooled": ("normal", (batch, 6)), "time_ids": ("integers", (batch, 6), 1024)}
    return Case("ControlNetModel", config, inputs, gradients=True)


def _t2i(size=32, batch=2, **config):
    inputs = {"picture": ("normal", (batch, size, size, config.get("in_channels", 3)))}
    return Case("T2IAdapter", config, inputs, gradients=True)


CASES = {
    "controlnet_sd": _controlnet(**SMALL),
    "controlnet_sdxl": _controlnet(guess=True, **SMALL, **XL, controlnet_conditioning_channel_order="bgr"),
    "t2i_adapter": _t2i(channels=(8, 16), num_res_blocks=1),
    "t2i_adapter_xl": _t2i(channels=(8, 16, 16, 16), num_res_blocks=1, adapter_type="full_adapter_xl"),
    "t2i_adapter_light": _t2i(channels=(8, 16), num_res_blocks=1, adapter_type="light_adapter", size=40),
}


def theirs(module, given):
    if type(module).__name__ == "T2IAdapter":
        return {str(i): nhwc(a) for i, a in enumerate(module(nchw(given["picture"])))}
    longs = {k: v.long() if not v.is_floating_point() else v for k, v in given.items()}
    added = {"text_embeds": longs.get("pooled"), "time_ids": longs.get("time_ids")} if "pooled" in given else None
    call = dict(class_labels=longs.get("y"), added_cond_kwargs=added, guess_mode=bool(given["guess"]))
    # PyTorch's class casts the waves of a time, and not those of a time among the labels.
    cast = module.time_proj.register_forward_hook(lambda _, __, waves: waves.to(module.dtype))
    out = module(nchw(given["x"]), longs["t"], given["context"], nchw(given["picture"]), conditioning_scale=0.7, **call)
    cast.remove()
    down = {f"down{i}": nhwc(a) for i, a in enumerate(out.down_block_res_samples)}
    return down | {"mid": nhwc(out.mid_block_res_sample)}


def ours(model, params, given):
    if "x" not in given:
        return {str(i): a for i, a in enumerate(model.apply(params, given["picture"]))}
    given = dict(given)
    # The choice is static; under a trace what is recorded tells it.
    inputs = [given.pop(name) for name in ("x", "t", "context", "picture")]
    guess = model.config["controlnet_conditioning_channel_order"] == "bgr"
    del given["guess"]
    out = model.apply(params, *inputs, scale=0.7, guess=guess, **given)
    return {f"down{i}": a for i, a in enumerate(out.down)} | {"mid": out.mid}


def random_case(rng):
    pick = lambda *values: values[rng.integers(len(values))]
    if rng.random() < 0.4:
        count = int(rng.integers(1, 4))
        kind = pick("full_adapter", "full_adapter_xl", "light_adapter")
        widths = [int(rng.choice([8, 16])) for _ in range(count)]
        if kind == "full_adapter_xl":
            widths = (8, 16, 24, 24)
        return _t2i(
            channels=tuple(widths), num_res_blocks=int(rng.integers(1, 4)), adapter_type=kind,
            downscale_factor=pick(4, 8), in_channels=pick(1, 3), size=pick(32, 40, 48),
        )  # fmt: skip
    order, labels = pick("rgb", "bgr"), pick(None, None, "timestep", "identity", "projection")
    config = SMALL | dict(
        down_block_types=tuple(pick("CrossAttnDownBlock2D", "DownBlock2D") for _ in range(2)),
        layers_per_block=pick(1, 2),
        transformer_layers_per_block=pick(1, 2, (1, 2)),
        mid_block_type=pick("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
        controlnet_conditioning_channel_order=order,
        conditioning_embedding_out_channels=pick((4, 8), (4, 8, 8)),
        conditioning_channels=pick(1, 3),
        global_pool_conditions=pick(False, False, True),
        flip_sin_to_cos=pick(True, False),
        act_fn=pick("silu", "gelu"),
        resnet_time_scale_shift=pick("default", "scale_shift"),
        num_class_embeds=pick(None, 4),
        class_embed_type=labels,
        projection_class_embeddings_input_dim=30,
    )
    config |= pick({}, XL)
    return _controlnet(guess=order == "bgr", **config)
