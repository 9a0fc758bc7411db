"""GPT2Model and GPT2LMHeadModel."""

from networks import Case


def _case(kind="GPT2Model", length=7, masked=False, **config):
    inputs = {"ids": ("integers", (2, length), config.setdefault("vocab_size", 30))}
    return Case(kind, config, inputs | ({"mask": ("mask", (2, length))} if masked else {}), gradients=True)


SMALL = dict(n_embd=16, n_layer=2, n_head=2, n_positions=9)
CASES = {
    "gpt2": _case(masked=True, n_inner=20, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, **SMALL),
    "gpt2-lm": _case("GPT2LMHeadModel", **SMALL),
    "gpt2-lm-untied": _case("GPT2LMHeadModel", tie_word_embeddings=False, **SMALL),
}


def theirs(module, given):
    out = module(given["ids"].long(), attention_mask=given.get("mask"), use_cache=False, output_hidden_states=True)
    if type(module).__name__ == "GPT2LMHeadModel":
        return {"logits": out.logits}
    return {"last": out.last_hidden_state, "middle": out.hidden_states[-2], "end": out.hidden_states[-1]}


def ours(model, params, given):
    out = model.apply(params, given["ids"], mask=given.get("mask"))
    if model.config["architectures"] == ["GPT2LMHeadModel"]:
        return {"logits": out}
    return {"last": out.last, "middle": out.hidden[-2], "end": out.hidden[-1]}


def random_case(rng):
    heads, length = int(rng.integers(1, 5)), int(rng.integers(1, 20))
    return _case(
        str(rng.choice(["GPT2Model", "GPT2LMHeadModel"])),
        length=length,
        masked=bool(rng.integers(2)),
        vocab_size=int(rng.integers(5, 50)),
        n_embd=heads * int(rng.integers(2, 9)),
        n_head=heads,
        n_inner=[None, 17][rng.integers(2)],
        n_layer=int(rng.integers(1, 6)),
        n_positions=length + int(rng.integers(5)),
        activation_function=str(rng.choice(["gelu_new", "gelu", "relu", "silu"])),
        layer_norm_epsilon=float(rng.choice([1e-5, 1e-6])),
        scale_attn_weights=bool(rng.integers(2)),
        scale_attn_by_inverse_layer_idx=bool(rng.integers(2)),
        reorder_and_upcast_attn=bool(rng.integers(2)),
        tie_word_embeddings=bool(rng.integers(2)),
        attn_pdrop=float(rng.choice([0.0, 0.1])),
    )
