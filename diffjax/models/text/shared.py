"""What the text encoders have in common: the keys of their configs, masks, and attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from diffjax.models import settings
from diffjax.nn import ACTIVATIONS, Compute, attend, tap, widen
from diffjax.nn.blocks.attention import split_heads

T = TypeVar("T")

# Keys of a config.json of transformers, of any version, that do not change the forward pass of evaluation here.
GENERIC = frozenset(
    # Where the file comes from, and how it was to be computed.
    "architectures model_type transformers_version name_or_path dtype torch_dtype use_bfloat16 torchscript xla_device "
    "attn_implementation gradient_checkpointing chunk_size_feed_forward tf_legacy_loss "
    # What is returned, and caches.
    "return_dict use_return_dict output_attentions output_hidden_states output_past use_cache "
    # Training: initial values, dropout.
    "initializer_range initializer_factor logit_scale_init_value dropout dropout_rate attention_dropout "
    "hidden_dropout_prob attention_probs_dropout_prob attn_pdrop embd_pdrop resid_pdrop classifier_dropout "
    # Tokens; a family that looks at one of them has it among its settings.
    "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id "
    "decoder_start_token_id tokenizer_class prefix "
    # Heads and tasks that the classes here do not have.
    "finetuning_task id2label label2id num_labels problem_type task_specific_params directionality pooler_fc_size "
    "pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj "
    # Decoders of encoder-decoders, and whether embeddings are tied, where a family does not look.
    "is_encoder_decoder tie_encoder_decoder tie_word_embeddings cross_attention_hidden_size num_decoder_layers "
    "scale_decoder_outputs "
    # Relics in published files.
    "n_positions n_ctx predict_special_tokens scalable_attention "
    # How text is sampled.
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens".split()
)
# Keys that would change it, with the values that do not.
HARMLESS: dict[str, tuple] = {
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
# What is added to the score of a masked token: finite, so that a row that sees nothing has a mean and no NaN.
HIDDEN = -1e30


def read(kind: str, cls: type[T], config: Mapping[str, Any]) -> T:
    """The settings `cls` from a `config.json` of transformers, whose keys of `GENERIC` are passed over.

    Raises:
      ValueError: for a key that is not known, or one of `HARMLESS` with another value.
    """
    for name, values in HARMLESS.items():
        if name in config and config[name] not in values:
            raise ValueError(f"{kind}: {name}={config[name]!r} is not supported; supported: {values[0]!r}")
    own = {field.name for field in dataclasses.fields(cls)}
    given = {name: value for name, value in config.items() if name not in HARMLESS}
    return settings.read(kind, cls, given, ignored=GENERIC - own)


def activation(kind: str, name: str, value: str) -> Callable[[jax.Array], jax.Array]:
    """The activation of a setting, rounded once, behind it; raises `ValueError` for one that is not known."""
    if value not in ACTIVATIONS:
        raise ValueError(f"{kind}: {name}={value!r} is not supported; supported: {', '.join(map(repr, ACTIVATIONS))}")
    return _rounded_once(value)


@functools.cache
def _rounded_once(name: str) -> Callable[[jax.Array], jax.Array]:
    return lambda x: ACTIVATIONS[name](widen(x)).astype(x.dtype)


def divisible(kind: str, width_name: str, width: int, heads_name: str, heads: int) -> None:
    """Raises `ValueError` unless the heads share the width evenly."""
    if heads < 1 or width % heads:
        raise ValueError(f"{kind}: {width_name}={width} is no multiple of {heads_name}={heads}")


def check_ids(kind: str, ids: jax.Array, mask: jax.Array | None, longest: int | None = None) -> None:
    """Raises `ValueError` unless `ids` are `[B, L]` integers, L is at most `longest`, and `mask` is of their shape."""
    settings.expect(kind, "ids", ids, None, None)
    if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise ValueError(f"{kind}: ids are {jnp.result_type(ids)}; expected integers")
    if longest is not None and ids.shape[1] > longest:
        raise ValueError(f"{kind}: {ids.shape[1]} tokens are more than the {longest} positions of this network")
    if mask is not None:
        settings.expect(kind, "mask", mask, *ids.shape)


def mix(
    q: jax.Array, k: jax.Array, v: jax.Array, heads: int, *, compute: Compute, scale: float | None = None,
    bias: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Attention of `q, k, v [B, L, N d]` with N heads: `[B, L, N d]`; see `diffjax.nn.attend`.

    Activations: `q`, `k`, `v` and `mixed`, `[B, L, N, d]`.
    """
    q, k, v = (tap(name, split_heads(a, heads)) for name, a in zip("qkv", (q, k, v), strict=True))
    mixed = attend(q, k, v, scale, bias=bias, causal=causal, implementation=compute.attention)
    return tap("mixed", mixed).reshape(*mixed.shape[:2], -1)


def all_hidden(first: jax.Array, outs: jax.Array | None) -> jax.Array:
    """The input of the first layer and the outputs of all, `[layers + 1, B, L, D]`."""
    return first[None] if outs is None else jnp.concatenate([first[None], outs])


def logits(h: jax.Array, table: jax.Array, compute: Compute) -> jax.Array:
    """The products of `h [B, L, D]` with the rows of a table `[count, D]`: `[B, L, count]`, float32 at least."""
    wide = jnp.promote_types(compute.dtype, jnp.float32)
    h, table = h.astype(compute.dtype), tap("table", table).astype(compute.dtype)
    return jnp.einsum("bld,vd->blv", h, table, preferred_element_type=wide)
