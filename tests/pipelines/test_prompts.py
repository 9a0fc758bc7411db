"""Prompts with weights, in chunks, as the conditions of Stable Diffusion and SDXL."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.core.types import Model
from diffjax.data import load_tokenizer, parse_prompt, prompt_chunks, weigh_states
from diffjax.models.text.clip import TextOutput, clip_skip
from diffjax.pipelines.prompts import TextEncoder, both, flux_prompt, no_prompt, sd_prompt, sdxl_prompt, size_ids

TOKENIZER = load_tokenizer(Path(__file__).parents[1] / "parity" / "golden" / "tokenizers" / "clip")
LENGTH = TOKENIZER.max_length


def encoder(width, **settings):
    """A text tower of two layers whose states are those of the ids alone, and whose vector is that of all of them."""

    def apply(params, ids, skip=0):
        rng = np.random.default_rng(width)
        words = rng.standard_normal((3, TOKENIZER.size, width)).astype(np.float32)[:, np.asarray(ids)]
        states = words + words.mean(2, keepdims=True)
        last, pooled = states[2 - skip], states[2].mean(1)
        return TextOutput(*map(jnp.asarray, (last, states, pooled, pooled[:, :2])))

    return TextEncoder(TOKENIZER, Model(lambda key: {}, apply, {}), {}, **settings)


def test_a_short_prompt_without_weights_is_what_it_was():
    one, two = encoder(4), encoder(6)
    plain, weighted = (sd_prompt(one, ["a horse", "the sun"], skip=1, weighted=w)["context"] for w in (False, True))
    np.testing.assert_allclose(weighted, plain, rtol=1e-5, atol=1e-6)
    plain, weighted = (sdxl_prompt(one, two, "a horse", weighted=w) for w in (False, True))
    assert plain.keys() == weighted.keys()
    for name in plain:
        np.testing.assert_allclose(weighted[name], plain[name], rtol=1e-5, atol=1e-6)


def test_long_prompts_are_chunks_behind_one_another():
    one, two = encoder(4), encoder(6)
    long = "a (horse:1.5), " * 12 + "[the sun]"
    found = sdxl_prompt(one, two, [long, ""], weighted=True)
    ids, weights = prompt_chunks(TOKENIZER, parse_prompt(long))
    assert len(ids) > 2 and found["context"].shape == (2, len(ids) * LENGTH, 10) and found["pooled"].shape == (2, 2)
    for text, part in ((one, slice(0, 4)), (two, slice(4, 10))):
        out = text.model.apply({}, ids)
        wanted = weigh_states(clip_skip(out, 1), jnp.asarray(weights))
        np.testing.assert_allclose(found["context"][0, :, part], wanted.reshape(-1, wanted.shape[-1]), rtol=1e-5)
    np.testing.assert_allclose(found["pooled"][0], two.model.apply({}, ids[:1]).text_embeds[0], rtol=1e-5)
    # The empty prompt beside it: the same chunk again and again.
    empty = sd_prompt(one, "")["context"][0]
    np.testing.assert_allclose(
        sd_prompt(one, [long, ""], weighted=True)["context"][1], jnp.tile(empty, (len(ids), 1)), rtol=1e-5, atol=1e-6
    )
    assert sd_prompt(one, "", weighted=True, chunks=3)["context"].shape == (1, 3 * LENGTH, 4)


def test_towers_whose_tokenizers_cut_in_other_places_have_equally_many_chunks():
    one, two = encoder(4), encoder(6)
    two = two._replace(tokenizer=TOKENIZER.extended({"horse": (5, 5, 5, 5, 5, 5)}))
    found = sdxl_prompt(one, two, "horse " * 14, weighted=True)
    assert found["context"].shape == (1, 6 * LENGTH, 10)


def test_a_prompt_that_is_too_long_is_cut_or_refused():
    text = "a horse, " * 12
    assert sd_prompt(encoder(4), text)["context"].shape == (1, LENGTH, 4)
    with pytest.raises(ValueError, match="is longer than 16; truncate=True cuts it"):
        sd_prompt(encoder(4, truncate=False), text)


def test_what_is_no_text_and_what_is_no_tower_is_told():
    one = encoder(4)
    for texts in ([], None, [3]):
        for weighted in (False, True):
            with pytest.raises(ValueError, match=r"texts=.*: expected a text, or a list of them"):
                sd_prompt(one, texts, weighted=weighted)
    t5 = one._replace(model=one.model._replace(config={"architectures": ["T5EncoderModel"]}))
    for made in (lambda: sd_prompt(t5, ""), lambda: sdxl_prompt(t5, one, ""), lambda: flux_prompt(t5, one, "")):
        with pytest.raises(ValueError, match="a T5EncoderModel in the place of CLIP's text tower"):
            made()


def test_no_prompt_has_the_sizes_of_the_prompt():
    cond = {"pooled": jnp.ones((1, 2)), "time_ids": size_ids(1, (8, 16))}
    found = both(cond, no_prompt(cond))
    assert found["pooled"].tolist() == [[1, 1], [0, 0]]
    assert found["time_ids"].tolist() == [[8, 16, 0, 0, 8, 16]] * 2


def test_a_word_that_the_encoder_lacks_is_told():
    one = encoder(4)
    table = {"text_model": {"token_embedding": {"embedding": np.zeros((TOKENIZER.size, 4))}}}
    one = one._replace(params=table)
    assert sd_prompt(one, "a horse")["context"].shape == (1, LENGTH, 4)
    new = one._replace(tokenizer=TOKENIZER.extended({"<cat>": (TOKENIZER.size,)}))
    for weighted in (False, True):
        with pytest.raises(ValueError, match=f"the id {TOKENIZER.size}, .* knows {TOKENIZER.size} .*inversion.add"):
            sd_prompt(new, "a <cat>", weighted=weighted)
