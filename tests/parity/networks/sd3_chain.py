"""SD3Transformer2DModel with the residuals of an SD3ControlNetModel, whose weights are drawn from their names."""

from networks import mmdit, nchw, nhwc, weight

SHARED = (
    "sample_size patch_size in_channels num_attention_heads attention_head_dim joint_attention_dim "
    "caption_projection_dim pooled_projection_dim pos_embed_max_size qk_norm"
).split()


def _case(**config):
    case = mmdit._case(**config)
    shape = case.inputs["x"][1]
    return case._replace(inputs=case.inputs | {"control": ("normal", (*shape[:3], shape[3] + 1))})


CASES = {"sd3_chain": _case(num_layers=4, sample_size=8, pos_embed_max_size=6, qk_norm="rms_norm")}


def _controlnet(config):
    """The config of the ControlNet that fits a denoiser."""
    own = dict(num_layers=2, dual_attention_layers=(0,), extra_conditioning_channels=1)
    return {name: config[name] for name in SHARED} | own


def theirs(module, given):
    import torch
    from diffusers import SD3ControlNetModel

    net = SD3ControlNetModel(**_controlnet(module.config)).eval()
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    net.load_state_dict({key: torch.from_numpy(weight(f"control.{key}", shape)) for key, shape in shapes.items()})
    conditions = dict(
        timestep=given["t"].long(), encoder_hidden_states=given["context"], pooled_projections=given["pooled"]
    )
    x, control = nchw(given["x"]), nchw(given["control"])
    residuals = net.to(x.dtype)(x, controlnet_cond=control, **conditions).controlnet_block_samples
    return {"out": nhwc(module(x, **conditions, block_controlnet_hidden_states=residuals).sample)}


def ours(model, params, given):
    from drawn import params_of

    from diffjax.models import from_config

    net = from_config({"_class_name": "SD3ControlNetModel", **_controlnet(model.config)})
    conditions = [given[name] for name in ("x", "t", "context", "pooled")]
    residuals = net.apply(params_of(net, "control."), *conditions, given["control"])
    return {"out": model.apply(params, *conditions, residuals=residuals)}


def random_case(rng):
    size, layers = int(rng.choice([4, 6])), int(rng.integers(2, 7))
    return _case(
        height=size,
        num_layers=layers,
        sample_size=8,
        pos_embed_max_size=[None, 5][rng.integers(2)],
        out_channels=3,
        dual_attention_layers=tuple(range(rng.integers(layers))),
        qk_norm=[None, "rms_norm"][rng.integers(2)],
    )
