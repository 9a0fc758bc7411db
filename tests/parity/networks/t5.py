"""T5EncoderModel and UMT5EncoderModel."""

from networks import Case


def _case(kind="T5EncoderModel", length=9, masked=False, **config):
    inputs = {"ids": ("integers", (2, length), config.setdefault("vocab_size", 30))}
    return Case(kind, config, inputs | ({"mask": ("mask", (2, length))} if masked else {}), gradients=True)


SMALL = dict(d_model=16, d_kv=6, d_ff=20, num_layers=2, num_heads=2)
CASES = {
    "t5": _case(masked=True, relative_attention_num_buckets=8, relative_attention_max_distance=6, **SMALL),
    "umt5": _case("UMT5EncoderModel", feed_forward_proj="gated-gelu", **SMALL),
}


def theirs(module, given):
    return {"out": module(given["ids"].long(), attention_mask=given.get("mask")).last_hidden_state}


def ours(model, params, given):
    return {"out": model.apply(params, given["ids"], mask=given.get("mask"))}


def random_case(rng):
    return _case(
        str(rng.choice(["T5EncoderModel", "UMT5EncoderModel"])),
        length=int(rng.integers(1, 40)),
        masked=bool(rng.integers(2)),
        vocab_size=int(rng.integers(5, 50)),
        d_model=int(rng.integers(4, 24)),
        d_kv=int(rng.integers(2, 10)),
        d_ff=int(rng.integers(4, 40)),
        num_layers=int(rng.integers(1, 6)),
        num_heads=int(rng.integers(1, 5)),
        relative_attention_num_buckets=int(rng.choice([4, 8, 20, 32])),
        relative_attention_max_distance=int(rng.choice([10, 20, 128])),
        layer_norm_epsilon=float(rng.choice([1e-6, 1e-5])),
        feed_forward_proj=str(rng.choice(["relu", "gated-gelu", "gated-silu", "gelu", "gated-relu"])),
        dropout_rate=float(rng.choice([0.0, 0.1])),
    )
