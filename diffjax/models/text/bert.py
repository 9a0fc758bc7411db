"""BERT, and BERT that guesses masked tokens, as transformers stores them.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
arXiv:1810.04805.
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
from diffjax.nn import Compute, LayerNorm, Linear, run_stack, scope, stack, tap, widen
from diffjax.nn.blocks import Embedding, mask_bias

RULES = (
    (r"layer/.*/(query|key|value|intermediate/dense)/kernel$", (None, "fsdp", "tensor")),
    (r"layer/.*/output/dense/kernel$", (None, "tensor", "fsdp")),
    (r"layer/.*/(query|key|value|intermediate/dense)/bias$", (None, "tensor")),
    (r"word_embeddings/embedding$", ("tensor", "fsdp")),
    (r"(position|token_type)_embeddings/embedding$", (None, "fsdp")),
    (r"(pooler|transform)/dense/kernel$", (None, "fsdp")),
    (r"decoder/kernel$", ("fsdp", "tensor")),
    (r"/(bias|scale)$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `BertModel`, with its defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    position_embedding_type: str = "absolute"
    tie_word_embeddings: bool = True


class BertOutput(NamedTuple):
    """What `bert` returns, all float32.

    Attributes:
      last: `[B, L, D]`, the last hidden state.
      hidden: `[layers + 1, B, L, D]`, the embedded tokens and the output of each layer.
      pooled: `[B, D]`, the first token's state behind a projection and tanh.
    """

    last: jax.Array
    hidden: jax.Array
    pooled: jax.Array | None


class Layer(nnx.Module):
    """Attention and a perceptron, the sums normalised."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width, given = c.hidden_size, dict(dtype=compute.dtype, rngs=rngs)
        norm = lambda: LayerNorm(width, eps=c.layer_norm_eps)
        # `self` is a part of the names in the file.
        mixing = nnx.Dict({name: Linear(width, width, **given) for name in ("query", "key", "value")})
        after = nnx.Dict(dense=Linear(width, width, **given), LayerNorm=norm())
        self.attention = nnx.Dict({"self": mixing, "output": after})
        self.intermediate = nnx.Dict(dense=Linear(width, c.intermediate_size, **given))
        self.output = nnx.Dict(dense=Linear(c.intermediate_size, width, **given), LayerNorm=norm())
        self.activation = activation("BERT", "hidden_act", c.hidden_act)
        self.heads, self.compute = c.num_attention_heads, compute

    def __call__(self, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        mixing, after = self.attention["self"], self.attention["output"]
        with scope("attention"):
            q, k, v = (mixing[name](x) for name in ("query", "key", "value"))
            h = tap("out", after["dense"](mix(q, k, v, self.heads, compute=self.compute, bias=bias)))
        x = after["LayerNorm"](x + h)
        h = tap("hidden", self.activation(self.intermediate["dense"](x)))
        return tap("out", self.output["LayerNorm"](x + self.output["dense"](h)))


class Bert(nnx.Module):
    """The module of `bert`; without `pooled` in what it returns if `pooler` is False."""

    def __init__(self, c: Settings, *, kind: str, pooler: bool = True, compute: Compute, rngs):
        width = c.hidden_size
        sizes = dict(word=c.vocab_size, position=c.max_position_embeddings, token_type=c.type_vocab_size)
        tables = {f"{n}_embeddings": Embedding(size, width, compute=compute, rngs=rngs) for n, size in sizes.items()}
        self.embeddings = nnx.Dict(**tables, LayerNorm=LayerNorm(width, eps=c.layer_norm_eps))
        layers = stack(lambda rngs: Layer(c, compute=compute, rngs=rngs), 0, c.num_hidden_layers, rngs=rngs)
        self.encoder = nnx.Dict(layer=layers)
        dense = dict(dtype=compute.dtype, rngs=rngs)
        self.pooler = nnx.Dict(dense=Linear(width, width, **dense)) if pooler else None
        self.c, self.kind, self.compute = c, kind, compute

    def __call__(self, ids: jax.Array, *, types: jax.Array | None = None, mask: jax.Array | None = None) -> BertOutput:
        check_ids(self.kind, ids, mask, self.c.max_position_embeddings)
        if types is not None:
            settings.expect(self.kind, "types", types, *ids.shape)
        e, bias = self.embeddings, mask_bias(mask, HIDDEN)
        x = e["word_embeddings"](ids)
        if self.c.pad_token_id is not None:
            # The row of padding is not trained; a negative one is counted from the last row on.
            x = jnp.where((ids == self.c.pad_token_id % self.c.vocab_size)[..., None], jax.lax.stop_gradient(x), x)
        x = x + e["token_type_embeddings"](jnp.zeros_like(ids) if types is None else types)
        x = tap("tokens", e["LayerNorm"](x + e["position_embeddings"](jnp.arange(ids.shape[1]))))

        def body(layer, h, i):
            with scope("encoder/layer"):
                h = layer(h, bias)
            return h, h

        last, outs = run_stack(self.encoder["layer"], body, x, self.compute)
        pooled = None if self.pooler is None else widen(jnp.tanh(self.pooler["dense"](last[:, 0])))
        return BertOutput(widen(last), widen(all_hidden(x, outs)), pooled)


class MaskedBert(nnx.Module):
    """The module of `bert_for_masked_lm`."""

    def __init__(self, c: Settings, *, kind: str, compute: Compute, rngs):
        width, given = c.hidden_size, dict(dtype=compute.dtype, rngs=rngs)
        self.bert = Bert(c, kind=kind, pooler=False, compute=compute, rngs=rngs)
        norm = LayerNorm(width, eps=c.layer_norm_eps)
        head = dict(bias=nnx.Param(jnp.zeros((c.vocab_size,), jnp.float32)))
        head["transform"] = nnx.Dict(dense=Linear(width, width, **given), LayerNorm=norm)
        if not c.tie_word_embeddings:
            # With a bias of its own, beside which the other one is in the file and has no use.
            head["decoder"] = Linear(width, c.vocab_size, **given)
        self.cls = nnx.Dict(predictions=nnx.Dict(**head))
        self.activation, self.compute = activation("BERT", "hidden_act", c.hidden_act), compute

    def __call__(self, ids: jax.Array, *, types: jax.Array | None = None, mask: jax.Array | None = None) -> jax.Array:
        head = self.cls["predictions"]
        with scope("bert"):
            h = self.bert(ids, types=types, mask=mask).last
        h = head["transform"]["LayerNorm"](self.activation(head["transform"]["dense"](h)))
        if "decoder" in head:
            return widen(head["decoder"](h))
        table = self.bert.embeddings["word_embeddings"].embedding[...]
        return logits(h, table, self.compute) + widen(head["bias"][...])


def _model(kind, module, config, how):
    c = read(kind, Settings, config)
    settings.only(kind, c, position_embedding_type=("absolute",))
    divisible(kind, "hidden_size", c.hidden_size, "num_attention_heads", c.num_attention_heads)
    activation(kind, "hidden_act", c.hidden_act)
    make = lambda compute, rngs: module(c, kind=kind, compute=compute, rngs=rngs)
    return settings.model(kind, config, make, settings.how(kind, **how), RULES)


def bert(config: Mapping[str, Any], **how) -> Model:
    """`BertModel` (arXiv:1810.04805) by the config of a checkpoint.

    Args:
      config: see `Settings`; keys of `diffjax.models.text.GENERIC` are passed over. Dropout is never on.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, ids [B, L] int, *, types=None, mask=None) -> BertOutput`. `types [B, L]` tells which of
      two texts a token belongs to, the first by default; `mask [B, L]` is 1 where a token is seen.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    return _model("BertModel", Bert, config, how)


def bert_for_masked_lm(config: Mapping[str, Any], **how) -> Model:
    """`BertForMaskedLM`: as `bert`, but the call returns the logits of all tokens, `[B, L, vocab_size] float32`.

    With `tie_word_embeddings` the table of the tokens is the last projection as well.
    """
    return _model("BertForMaskedLM", MaskedBert, config, how)
