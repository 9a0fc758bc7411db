"""GPT-2, with and without its language model's head, as transformers stores it.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Its linear maps are stored with the inputs
first, unlike those of PyTorch's other networks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.text.shared import HIDDEN, activation, all_hidden, check_ids, divisible, logits, mix, read
from diffjax.nn import Compute, LayerNorm, Linear, plus, run_stack, scope, stack, tap, widen
from diffjax.nn.blocks import Embedding, mask_bias
from diffjax.nn.linear import product

RULES = (
    (r"(c_attn|c_fc)/weight$", (None, "fsdp", "tensor")),
    (r"c_proj/weight$", (None, "tensor", "fsdp")),
    (r"(c_attn|c_fc)/bias$", (None, "tensor")),
    (r"wte/embedding$", ("tensor", "fsdp")),
    (r"wpe/embedding$", (None, "fsdp")),
    (r"^lm_head/kernel$", ("fsdp", "tensor")),
    (r"/(bias|scale)$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `GPT2Model`, with its defaults."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False  # of nothing: scores are float32 at least
    tie_word_embeddings: bool = True


class GPT2Output(NamedTuple):
    """What `gpt2` returns, all float32.

    Attributes:
      last: `[B, L, D]`, the last hidden state, behind the final normalisation.
      hidden: `[layers + 1, B, L, D]`, the embedded tokens and the output of each layer; the last one is `last`.
    """

    last: jax.Array
    hidden: jax.Array


class Conv1D(nnx.Module):
    """`x weight + bias`; the weight is stored as it is here, `[C_in, C_out]`."""

    def __init__(self, channels_in: int, channels_out: int, *, compute: Compute, rngs):
        weight = nnx.initializers.normal(0.02)(rngs.params(), (channels_in, channels_out), jnp.float32)
        self.weight = nnx.Param(weight)
        self.bias = nnx.Param(jnp.zeros((channels_out,), jnp.float32))
        self.dtype = compute.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return plus(product(x.astype(self.dtype), self.weight[...].astype(self.dtype)), self.bias[...])


class Block(nnx.Module):
    """Causal attention and a perceptron, each of what is normalised before."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width, inner, given = c.n_embd, c.n_inner or 4 * c.n_embd, dict(compute=compute, rngs=rngs)
        self.ln_1, self.ln_2 = (LayerNorm(width, eps=c.layer_norm_epsilon) for _ in range(2))
        self.attn = nnx.Dict(c_attn=Conv1D(width, 3 * width, **given), c_proj=Conv1D(width, width, **given))
        self.mlp = nnx.Dict(c_fc=Conv1D(width, inner, **given), c_proj=Conv1D(inner, width, **given))
        self.activation = activation("GPT-2", "activation_function", c.activation_function)
        self.c, self.compute = c, compute

    def __call__(self, x: jax.Array, bias: jax.Array | None, index: jax.Array) -> jax.Array:
        c = self.c
        q, k, v = jnp.split(self.attn["c_attn"](self.ln_1(x)), 3, axis=-1)
        if c.scale_attn_by_inverse_layer_idx:
            q = (widen(q) / (index + 1)).astype(q.dtype)
        scale = None if c.scale_attn_weights else 1.0
        with scope("attn"):
            mixed = mix(q, k, v, c.n_head, compute=self.compute, scale=scale, bias=bias, causal=True)
            x = x + tap("out", self.attn["c_proj"](mixed))
        h = tap("hidden", self.activation(self.mlp["c_fc"](self.ln_2(x))))
        return tap("out", x + self.mlp["c_proj"](h))


class GPT2(nnx.Module):
    """The module of `gpt2`."""

    def __init__(self, c: Settings, *, kind: str, compute: Compute, rngs):
        self.wte = Embedding(c.vocab_size, c.n_embd, compute=compute, rngs=rngs)
        self.wpe = Embedding(c.n_positions, c.n_embd, compute=compute, rngs=rngs)
        self.h = stack(lambda rngs: Block(c, compute=compute, rngs=rngs), 0, c.n_layer, rngs=rngs)
        self.ln_f = LayerNorm(c.n_embd, eps=c.layer_norm_epsilon)
        self.c, self.kind, self.compute = c, kind, compute

    def __call__(self, ids: jax.Array, *, mask: jax.Array | None = None) -> GPT2Output:
        check_ids(self.kind, ids, mask, self.c.n_positions)
        bias = mask_bias(mask, HIDDEN)
        x = tap("tokens", self.wte(ids) + self.wpe(jnp.arange(ids.shape[1])))

        def body(block, h, i):
            with scope("h"):
                h = block(h, bias, i)
            return h, h

        last, outs = run_stack(self.h, body, x, self.compute)
        last = self.ln_f(last)
        return GPT2Output(widen(last), widen(all_hidden(x, outs)).at[-1].set(widen(last)))


class LanguageModel(nnx.Module):
    """The module of `gpt2_lm`."""

    def __init__(self, c: Settings, *, kind: str, compute: Compute, rngs):
        self.transformer = GPT2(c, kind=kind, compute=compute, rngs=rngs)
        own = dict(bias=False, dtype=compute.dtype, rngs=rngs)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.n_embd, c.vocab_size, **own)
        self.compute = compute

    def __call__(self, ids: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        with scope("transformer"):
            h = self.transformer(ids, mask=mask).last
        if self.lm_head is not None:
            return widen(self.lm_head(h))
        return logits(h, self.transformer.wte.embedding[...], self.compute)


def _model(kind, module, config, how):
    c = read(kind, Settings, config)
    divisible(kind, "n_embd", c.n_embd, "n_head", c.n_head)
    activation(kind, "activation_function", c.activation_function)
    make = lambda compute, rngs: module(c, kind=kind, compute=compute, rngs=rngs)
    return settings.model(kind, config, make, settings.how(kind, **how), RULES)


def gpt2(config: Mapping[str, Any], **how) -> Model:
    """`GPT2Model` by the config of a checkpoint.

    Args:
      config: see `Settings`; keys of `diffjax.models.text.GENERIC` are passed over. Dropout is never on.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, ids [B, L] int, *, mask=None) -> GPT2Output`. `mask [B, L]` is 1 where a token is seen,
      besides the causal mask; positions are counted from the first token, seen or not.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    return _model("GPT2Model", GPT2, config, how)


def gpt2_lm(config: Mapping[str, Any], **how) -> Model:
    """`GPT2LMHeadModel`: as `gpt2`, but the call returns the logits of the next token, `[B, L, vocab_size] float32`.

    With `tie_word_embeddings` the table of the tokens is the last projection as well.
    """
    return _model("GPT2LMHeadModel", LanguageModel, config, how)
