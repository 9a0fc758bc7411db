"""BertModel and BertForMaskedLM."""

from networks import Case


def _case(kind="BertModel", length=7, masked=False, typed=False, **config):
    inputs = {"ids": ("integers", (2, length), config.setdefault("vocab_size", 30))}
    inputs |= {"mask": ("mask", (2, length))} if masked else {}
    inputs |= {"types": ("integers", (2, length), config.get("type_vocab_size", 2))} if typed else {}
    return Case(kind, config, inputs, gradients=True)


SMALL = dict(
    hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=9
)
CASES = {
    "bert": _case(masked=True, typed=True, type_vocab_size=3, **SMALL),
    "bert-masked": _case("BertForMaskedLM", **SMALL),
    "bert-masked-untied": _case("BertForMaskedLM", tie_word_embeddings=False, hidden_act="relu", **SMALL),
}


def theirs(module, given):
    asked = {"attention_mask": given.get("mask"), "token_type_ids": given["types"].long() if "types" in given else None}
    out = module(given["ids"].long(), **asked, output_hidden_states=True)
    if type(module).__name__ == "BertForMaskedLM":
        return {"logits": out.logits}
    return {"last": out.last_hidden_state, "middle": out.hidden_states[-2], "pooled": out.pooler_output}


def ours(model, params, given):
    out = model.apply(params, given["ids"], types=given.get("types"), mask=given.get("mask"))
    if model.config["architectures"] == ["BertForMaskedLM"]:
        return {"logits": out}
    return {"last": out.last, "middle": out.hidden[-2], "pooled": out.pooled}


def random_case(rng):
    heads, length = int(rng.integers(1, 5)), int(rng.integers(1, 20))
    return _case(
        str(rng.choice(["BertModel", "BertForMaskedLM"])),
        length=length,
        masked=bool(rng.integers(2)),
        typed=bool(rng.integers(2)),
        vocab_size=int(rng.integers(5, 50)),
        hidden_size=heads * int(rng.integers(2, 9)),
        num_attention_heads=heads,
        intermediate_size=int(rng.integers(4, 40)),
        num_hidden_layers=int(rng.integers(1, 6)),
        max_position_embeddings=length + int(rng.integers(5)),
        type_vocab_size=int(rng.integers(1, 4)),
        hidden_act=str(rng.choice(["gelu", "relu", "silu", "gelu_new"])),
        layer_norm_eps=float(rng.choice([1e-12, 1e-5])),
        tie_word_embeddings=bool(rng.integers(2)),
        hidden_dropout_prob=float(rng.choice([0.0, 0.1])),
    )
