"""UNet2DConditionModel with what a ControlNetModel or a T2IAdapter says; their weights are drawn from their names."""

from networks import nchw, nhwc, unet_cond, weight

XL = dict(
    down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), block_out_channels=(8,),
    transformer_layers_per_block=2,
)  # fmt: skip
# What a ControlNet shares with its U-Net.
SHARED = (
    "in_channels down_block_types block_out_channels layers_per_block norm_num_groups cross_attention_dim "
    "attention_head_dim transformer_layers_per_block use_linear_projection addition_embed_type addition_time_embed_dim "
    "projection_class_embeddings_input_dim"
).split()
HINT = dict(conditioning_embedding_out_channels=(4, 8))


def _case(control, pictured, size=8, **config):
    case = unet_cond._case(**config, size=(size, size))
    inputs = dict(case.inputs)
    if control:
        inputs["control"] = ("normal", (2, 2 * size, 2 * size, 3))
    if pictured:
        inputs["picture"] = ("normal", (2, 8 * size, 8 * size, 3))
    return case._replace(inputs=inputs)


CASES = {
    "unet_chain_sd": _case(True, True, **unet_cond.SD | dict(block_out_channels=(8, 8))),
    "unet_chain_sdxl": _case(True, False, size=4, **unet_cond.SD | unet_cond.XL | XL),
}


def _helpers(config, given):
    """The classes and configs of what steers the U-Net."""
    out = {}
    if "control" in given:
        out["ControlNetModel"] = {name: config[name] for name in SHARED} | HINT
    if "picture" in given:
        out["T2IAdapter"] = dict(channels=config["block_out_channels"], num_res_blocks=1)
    return out


def theirs(module, given):
    import diffusers
    import torch

    given, nets = dict(given), {}
    for kind, config in _helpers(module.config, given).items():
        net = nets[kind] = getattr(diffusers, kind)(**config).eval()
        shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
        net.load_state_dict({key: torch.from_numpy(weight(f"{kind}.{key}", shape)) for key, shape in shapes.items()})
        net.to(given["x"].dtype)
    longs = {k: v.long() if not v.is_floating_point() else v for k, v in given.items()}
    added = {"text_embeds": longs["pooled"], "time_ids": longs["time_ids"]} if "pooled" in longs else None
    conditions = dict(encoder_hidden_states=given["context"], added_cond_kwargs=added)
    x, call = nchw(given["x"]), {}
    if "control" in given:
        net = nets["ControlNetModel"]
        said = net(x, longs["t"], controlnet_cond=nchw(given["control"]), conditioning_scale=0.7, **conditions)
        call["down_block_additional_residuals"] = said.down_block_res_samples
        call["mid_block_additional_residual"] = said.mid_block_res_sample
    if "picture" in given:
        call["down_intrablock_additional_residuals"] = [0.8 * a for a in nets["T2IAdapter"](nchw(given["picture"]))]
    return {"out": nhwc(module(x, longs["t"], **conditions, **call).sample)}


def ours(model, params, given):
    from drawn import params_of

    from diffjax.models import from_config

    given, said = dict(given), {}
    for kind, config in _helpers(model.config, given).items():
        net = from_config({"_class_name": kind, **config})
        said[kind] = net, params_of(net, f"{kind}.")
    control, picture = given.pop("control", None), given.pop("picture", None)
    call = {}
    if picture is not None:
        net, weights = said["T2IAdapter"]
        call["adapter"] = net.apply(weights, picture, scale=0.8)
    if control is not None:
        net, weights = said["ControlNetModel"]
        asked = {name: given[name] for name in ("pooled", "time_ids") if name in given}
        residuals = net.apply(weights, *(given[n] for n in ("x", "t", "context")), control, scale=0.7, **asked)
        call |= dict(residuals=residuals.down, mid_residual=residuals.mid)
    return {"out": model.apply(params, given.pop("x"), given.pop("t"), **given, **call)}


def random_case(rng):
    pick = lambda *values: values[rng.integers(len(values))]
    control = bool(rng.integers(3))
    config = unet_cond.SD | dict(block_out_channels=pick((8, 8), (8, 16)))
    config |= pick({}, unet_cond.XL, unet_cond.XL | XL) | dict(layers_per_block=pick(1, 2))
    return _case(control, not control or bool(rng.integers(2)), **config)
