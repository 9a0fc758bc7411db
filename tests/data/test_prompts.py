"""Weighted prompts, and those longer than the encoder."""

import doctest
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import diffjax.data.prompts
from diffjax.data import load_tokenizer, parse_prompt, prompt_chunks, weigh_states

TOKENIZER = load_tokenizer(Path(__file__).parent.parent / "parity" / "golden" / "tokenizers" / "clip")

# The first six are those of stable-diffusion-webui's own documentation of the syntax.
PARSED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.3 * 1.1**2), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
        (", sun, ", 1.1), ("sky", 1.1**4), (".", 1.1),
    ],
    "": [("", 1.0)],
    "a:b (c:d) e:1.2) ]": [("a:b ", 1.0), ("c:d", 1.1), (" e:1.2) ]", 1.0)],
    "(a : 2)[b": [("a ", 2.0), ("b", 1 / 1.1)],
    "(日本 😀:-.5)": [("日本 😀", -0.5)],
    "(a:1.2.3)\\": [("a:1.2.3", 1.1), ("\\", 1.0)],
}  # fmt: skip


@pytest.mark.parametrize("prompt", PARSED)
def test_weights_of_a_prompt(prompt):
    found = parse_prompt(prompt)
    assert [text for text, _ in found] == [text for text, _ in PARSED[prompt]]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in PARSED[prompt]], rtol=1e-12)


def test_examples_of_the_docstrings():
    assert doctest.testmod(diffjax.data.prompts) == (0, 1)


def test_chunks_hold_all_tokens_and_their_weights():
    parts = [("a horse, " * 10, 1.0), ("the license", 1.5), (" of it", 0.5)]
    ids, weights = prompt_chunks(TOKENIZER, parts)
    assert ids.dtype == np.int32 and weights.dtype == np.float32 and ids.shape == weights.shape
    assert ids.shape[1] == 16 and len(ids) > 1
    assert (ids[:, 0] == TOKENIZER.bos).all() and (weights[:, 0] == 1).all()
    inner = ids[:, 1:-1].ravel()
    texts = TOKENIZER.encode([text for text, _ in parts])
    joined = [i for text in texts for i in text]
    np.testing.assert_array_equal(inner[: len(joined)], joined)
    assert (ids[:, -1] == TOKENIZER.eos).all() and (inner[len(joined) :] == TOKENIZER.eos).all()
    wanted = np.repeat([1.0, 1.5, 0.5], [len(text) for text in texts])
    np.testing.assert_array_equal(weights[:, 1:-1].ravel()[: len(joined)], wanted)
    assert (weights[:, 1:-1].ravel()[len(joined) :] == 1).all()


def test_a_short_prompt_is_what_the_tokenizer_makes_of_it():
    for text in ("", "a horse"):
        ids, weights = prompt_chunks(TOKENIZER, parse_prompt(text))
        np.testing.assert_array_equal(ids, TOKENIZER(text).ids)
        assert (weights == 1).all()
    with pytest.raises(ValueError, match="length 2 leave no room"):
        prompt_chunks(TOKENIZER, [("a", 1.0)], length=2)


def test_weighed_states_keep_their_mean():
    states = np.random.default_rng(0).normal(0.3, 1, (2, 5, 4)).astype(np.float32)
    weights = np.ones((2, 5), np.float32)
    np.testing.assert_allclose(weigh_states(states, weights), states, rtol=1e-6)
    weights[0, 2] = 2
    found = np.asarray(weigh_states(jnp.asarray(states), jnp.asarray(weights)))
    np.testing.assert_allclose(found.mean((1, 2)), states.mean((1, 2)), rtol=1e-5)
    # The other text is not touched, and in this one the token is twice what it was beside the others.
    np.testing.assert_allclose(found[1], states[1], rtol=1e-6)
    np.testing.assert_allclose(found[0, 2] / states[0, 2], 2 * found[0, 1] / states[0, 1], rtol=1e-5)
    assert np.isfinite(weigh_states(jnp.zeros((1, 5, 4)), weights[:1])).all()
