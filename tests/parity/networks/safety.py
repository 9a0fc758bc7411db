"""StableDiffusionSafetyChecker and IFSafetyChecker: the numbers that they decide by (`safety.py` has the decisions)."""

from networks import Case, nchw

KINDS = ("StableDiffusionSafetyChecker", "IFSafetyChecker")
SMALL = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
    projection_dim=6,
)  # fmt: skip


def _case(kind, width=5, batch=3, **vision):
    size = vision["image_size"]
    inputs = {"x": ("normal", (batch, size, size, vision.get("num_channels", 3)))}
    return Case(kind, dict(vision_config=vision, projection_dim=width), inputs, gradients=kind == KINDS[1])


CASES = {"safety": _case(KINDS[0], **SMALL), "safety-if": _case(KINDS[1], **SMALL)}


def build(case):
    import torch
    from diffusers.pipelines.deepfloyd_if.safety_checker import IFSafetyChecker
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    kind = {kind.__name__: kind for kind in (IFSafetyChecker, StableDiffusionSafetyChecker)}[case.kind]
    module = kind(CLIPConfig(**case.config))
    if case.kind == KINDS[0]:
        # They are all the same at first, so that all cosines would be one number.
        module.concept_embeds.data = torch.randn(module.concept_embeds.shape)
    return module


def theirs(module, given):
    # Their calls return decisions alone, and have no gradient.
    if type(module).__name__ == KINDS[1]:
        embeds = module.vision_model(nchw(given["x"]))[0]
        return {"nsfw": module.p_head(embeds)[:, 0], "watermark": module.w_head(embeds)[:, 0]}
    from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance

    embeds = module.visual_projection(module.vision_model(nchw(given["x"]))[1])
    return {"concepts": cosine_distance(embeds, module.concept_embeds)}


def ours(model, params, given):
    out = model.apply(params, given["x"])
    if "p_head" in params:
        return {"nsfw": out.nsfw_score, "watermark": out.watermark_score}
    # Without the thresholds, and what special concepts add: they are out of reach.
    near, special = (params[f"{name}_embeds_weights"] * 0 for name in ("concept", "special_care"))
    params = {**params, "concept_embeds_weights": near, "special_care_embeds_weights": special + 2}
    return {"concepts": model.apply(params, given["x"]).scores}


def random_case(rng):
    heads, patch = int(rng.integers(1, 4)), int(rng.choice([2, 4]))
    vision = dict(
        hidden_size=8 * heads, num_attention_heads=heads, intermediate_size=int(rng.integers(5, 40)),
        num_hidden_layers=int(rng.integers(1, 4)), image_size=patch * int(rng.integers(1, 4)), patch_size=patch,
        projection_dim=int(rng.integers(8, 20)), num_channels=3, hidden_act=str(rng.choice(["quick_gelu", "gelu"])),
        layer_norm_eps=float(rng.choice([1e-5, 1e-6])),
    )  # fmt: skip
    return _case(str(rng.choice(KINDS)), int(rng.integers(8, 20)), batch=8, **vision)
