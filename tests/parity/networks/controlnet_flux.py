"""FluxControlNetModel, and the transformer that it steers, whose weights are drawn from their names."""

import numpy as np

import networks
from networks import Case, flux, nchw

KIND = "FluxControlNetModel"


def _case(picture=None, modes=None, **config):
    base = flux._case(**config)
    batch, tokens = base.inputs["x"][1][:2]
    inputs = base.inputs | {"cond": ("normal", (batch, tokens, base.config["in_channels"]))}
    config = dict(base.config)
    if picture is not None:
        height, width, config["conditioning_embedding_channels"], config["patch_size"] = picture
        inputs["cond"] = ("normal", (batch, height, width, 3))
    if modes is not None:
        inputs["mode"] = ("integers", (batch,), modes)
        config["num_mode"] = modes
    return Case(KIND, config, inputs | {"scale": ("value", np.float32(0.7))}, gradients=True)


def _picture(height, width, channels, patch):
    """What a picture of these sides needs besides: as many tokens, and channels of them."""
    tokens = (-(-height // 8) // patch) * (-(-width // 8) // patch)
    return dict(picture=(height, width, channels, patch), tokens=tokens, in_channels=channels * patch**2)


CASES = {
    "controlnet-flux-union": _case(**flux.TINY, modes=4, num_layers=1, num_single_layers=1, guidance_embeds=True),
    "controlnet-flux-picture": _case(**flux.TINY, **_picture(32, 48, 2, 2), num_layers=1, num_single_layers=0),
}


def _steered(config):
    """The config of the transformer: one block more of each kind."""
    kept = {k: v for k, v in config.items() if k not in ("num_mode", "conditioning_embedding_channels")}
    kept = {k: v for k, v in kept.items() if not k.startswith("_")}
    more = {name: config[name] + 1 for name in ("num_layers", "num_single_layers")}
    return kept | more | {"patch_size": 1}


def theirs(module, given):
    import diffusers
    import torch

    given, real = dict(given), module.dtype
    cond, mode, scale = given.pop("cond"), given.pop("mode", None), given.pop("scale").item()
    text = given["context"].shape[1], given["positions"].shape[1]
    wide = {k: v.to(real) if v.is_floating_point() else v for k, v in given.items()}
    double, single = module(
        hidden_states=wide["x"],
        controlnet_cond=(nchw(cond) if cond.ndim == 4 else cond).to(real),
        controlnet_mode=None if mode is None else mode[:, None],
        conditioning_scale=scale,
        encoder_hidden_states=wide["context"],
        pooled_projections=wide["pooled"],
        timestep=wide["t"],
        img_ids=given["positions"].float(),
        txt_ids=given.get("context_positions", torch.zeros(text)).float(),
        guidance=wide.get("guidance"),
        return_dict=False,
    )
    found = {"residuals": double, "single_residuals": single}
    found = {name: torch.stack(list(a)) for name, a in found.items() if a is not None}
    transformer = diffusers.FluxTransformer2DModel(**_steered(dict(module.config))).eval()
    state = transformer.state_dict()
    transformer.load_state_dict({k: torch.from_numpy(networks.weight(k, tuple(v.shape))) for k, v in state.items()})
    return found | flux.theirs(transformer.to(real), given | found)


def ours(model, params, given):
    from drawn import params_of

    from diffjax.models import from_config

    given = dict(given)
    own = {name: given.pop(name) for name in ("cond", "mode", "scale") if name in given}
    first = [given.pop(name) for name in ("x", "t", "context", "pooled")]
    double, single = model.apply(params, *first, **given, **own)
    found = {"residuals": double, "single_residuals": single}
    found = {name: a for name, a in found.items() if a is not None}
    dtype = next(iter(found.values())).dtype.name if found else "float32"
    transformer = from_config(_steered(model.config) | {"_class_name": flux.KIND}, dtype=dtype)
    return found | {"out": transformer.apply(params_of(transformer), *first, **given, **found)}


def random_case(rng):
    extra = {}
    case = flux.random_case(rng)
    if rng.integers(2):
        size = (int(n) for n in rng.choice([16, 32, 48], 2))
        extra = _picture(*size, int(rng.integers(1, 5)), int(rng.integers(1, 3)))
    dropped = ("out_channels", "patch_size", "in_channels" if extra else "")
    config = {k: v for k, v in case.config.items() if k not in dropped}
    config["num_layers"] = max(config["num_layers"], 1)
    batch, length = case.inputs["context"][1][:2]
    return _case(
        batch=batch,
        length=length,
        text_places="context_positions" in case.inputs,
        modes=[None, int(rng.integers(1, 9))][rng.integers(2)],
        **config,
        **extra,
    )
