"""CLIPTextModel, CLIPVisionModel, both with projections, and CLIPModel."""

import numpy as np

from networks import Case, nchw

KINDS = (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "CLIPModel",
)


def _ids(rng, batch, length, vocabulary, eos):
    """Texts of different lengths, each with its end and padding behind it."""
    largest = vocabulary - 1 if eos == 2 else eos
    ids = rng.integers(3, vocabulary - 2, (batch, length)).astype(np.int32)
    for row, end in zip(ids, rng.integers(1, length, batch), strict=True):
        row[end:] = largest if rng.integers(2) else 0
        row[end] = largest
    return ids


def _text(rng, *, masked=False, length=7, vocab_size=40, eos_token_id=39, **config):
    config |= dict(vocab_size=vocab_size, eos_token_id=eos_token_id)
    ids = _ids(rng, 2, length, vocab_size, eos_token_id)
    inputs = {"ids": ("value", ids.tolist())} | ({"mask": ("mask", (2, length))} if masked else {})
    return config, inputs


def _case(kind, rng, text=None, vision=None, **config):
    inputs, text_config, vision_config = {}, {}, {}
    if text is not None:
        text_config, inputs = _text(rng, **text)
    if vision is not None:
        size = vision["image_size"]
        vision_config, inputs["x"] = vision, ("normal", (2, size, size, vision.get("num_channels", 3)))
    if kind == "CLIPModel":
        config |= dict(text_config=text_config, vision_config=vision_config)
    return Case(kind, config | (text_config or vision_config if kind != "CLIPModel" else {}), inputs, gradients=True)


SMALL = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
RNG = np.random.Generator(np.random.Philox(key=1))
CASES = {
    "clip-text": _case(
        "CLIPTextModel", RNG, dict(masked=True, eos_token_id=2, max_position_embeddings=9, **SMALL)
    ),
    "clip-pair": _case(
        "CLIPModel",
        RNG,
        dict(hidden_act="gelu", max_position_embeddings=7, **SMALL),
        dict(image_size=8, patch_size=4, num_channels=2, **SMALL),
        projection_dim=12,
    ),
    "clip-vision": _case(
        "CLIPVisionModelWithProjection", RNG, None, dict(image_size=9, patch_size=4, projection_dim=6, **SMALL)
    ),
}


def theirs(module, given):
    kind = type(module).__name__
    asked = {"attention_mask": given["mask"]} if "mask" in given else {}
    asked |= {"input_ids": given["ids"].long()} if "ids" in given else {}
    asked |= {"pixel_values": nchw(given["x"])} if "x" in given else {}
    if kind == "CLIPModel":
        out = module(**asked)
        return {"text": out.text_embeds, "image": out.image_embeds, "logits": out.logits_per_text}
    out = module(**asked, output_hidden_states=True)
    found = {"last": out.last_hidden_state, "middle": out.hidden_states[-2], "first": out.hidden_states[0]}
    if hasattr(out, "pooler_output"):
        found["pooled"] = out.pooler_output
    if kind == "CLIPTextModel":
        found["skipped"] = module.final_layer_norm(out.hidden_states[-2])
    name = {"CLIPTextModelWithProjection": "text_embeds", "CLIPVisionModelWithProjection": "image_embeds"}.get(kind)
    return found | ({"embeds": getattr(out, name)} if name else {})


def ours(model, params, given):
    kind = model.config["architectures"][0]
    asked = {"mask": given["mask"]} if "mask" in given else {}
    inputs = [given[name] for name in ("ids", "x") if name in given]
    out = model.apply(params, *inputs, **asked)
    if kind == "CLIPModel":
        return {"text": out.text_embeds, "image": out.image_embeds, "logits": out.logits_per_text}
    found = {"last": out.last, "middle": out.hidden[-2], "first": out.hidden[0]}
    if kind in ("CLIPTextModel", "CLIPVisionModel"):
        found["pooled"] = out.pooled
    if kind == "CLIPTextModel":
        found["skipped"] = model.apply(params, *inputs, skip=1, **asked).last
    embeds = {"CLIPTextModelWithProjection": "text_embeds", "CLIPVisionModelWithProjection": "image_embeds"}.get(kind)
    return found | ({"embeds": getattr(out, embeds)} if embeds else {})


def random_case(rng):
    kind = str(rng.choice(KINDS))

    def common():
        heads = int(rng.integers(1, 4))
        return dict(
            hidden_size=heads * int(rng.choice([8, 12])),  # norms over 4 channels make much of bfloat16's roundings
            num_attention_heads=heads,
            intermediate_size=int(rng.integers(5, 40)),
            num_hidden_layers=int(rng.integers(1, 5)),
            hidden_act=str(rng.choice(["quick_gelu", "gelu", "gelu_new", "relu", "silu"])),
            layer_norm_eps=float(rng.choice([1e-5, 1e-6])),
            attention_dropout=float(rng.choice([0.0, 0.1])),
            projection_dim=int(rng.integers(3, 20)),
        )

    text = vision = None
    if "Vision" not in kind:
        length, vocabulary = int(rng.integers(2, 20)), int(rng.integers(10, 60))
        text = common() | dict(
            masked=bool(rng.integers(2)),
            length=length,
            vocab_size=vocabulary,
            eos_token_id=int(rng.choice([2, vocabulary - 1, vocabulary - 2])),
            max_position_embeddings=length + int(rng.integers(3)),
            pad_token_id=int(rng.choice([0, 1])),
        )
    if "Text" not in kind:
        patch = int(rng.choice([2, 3, 4]))
        vision = common() | dict(
            patch_size=patch,
            image_size=patch * int(rng.integers(1, 4)) + int(rng.integers(2)),
            num_channels=int(rng.choice([1, 3])),
        )
    return _case(kind, rng, text, vision, **({"projection_dim": 10} if kind == "CLIPModel" else {}))
