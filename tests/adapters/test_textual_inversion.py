"""Learned tokens: rows behind a table, their gradients, and the files that they come in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.adapters.textual_inversion import add, extended, init, restrict, table_of, words
from diffjax.convert import WeightsError, load_textual_inversion, save_textual_inversion
from diffjax.convert.weights.tensors import Source, write

TABLE = np.arange(12, dtype=np.float32).reshape(4, 3)
PARAMS = {
    "embeddings": {"position_embedding": {"embedding": np.ones((2, 3))}, "token_embedding": {"embedding": TABLE}},
    "head": {"kernel": np.ones((3, 1), np.float32)},
}
NAME = "embeddings/token_embedding/embedding"


def table(params):
    return params["embeddings"]["token_embedding"]["embedding"]


def test_rows_lie_behind_the_table_and_ids_say_where():
    rows = {"<a>": np.full((2, 3), 7.0), "<b>": np.full(3, 8.0)}
    params, ids = add(PARAMS, rows)
    assert ids == {"<a>": (4, 5), "<b>": (6,)}
    np.testing.assert_array_equal(table(params)[:4], TABLE)
    np.testing.assert_array_equal(table(params)[4:], [[7] * 3, [7] * 3, [8] * 3])
    assert params["head"] is not PARAMS["head"] and table(PARAMS).shape == (4, 3)
    assert words("<a>", 3) == ["<a>", "<a>_1", "<a>_2"] and table_of(PARAMS) == NAME
    assert extended({"vocab_size": 4, "x": 1}, 3) == {"vocab_size": 7, "x": 1}


def test_a_half_precision_table_stays_one():
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), PARAMS)
    assert table(add(half, {"<a>": np.ones(3, np.float32)})[0]).dtype == jnp.bfloat16


def test_new_rows_start_as_a_word():
    rows = init(PARAMS, "<a>", like=2, count=2)
    np.testing.assert_array_equal(rows["<a>"], [TABLE[2]] * 2)


def loss(params):
    tokens = jnp.take(table(params), jnp.array([0, 5, 4, 5]), axis=0)
    return jnp.sum(jnp.tanh(tokens @ params["head"]["kernel"]))


def test_gradients_are_for_the_new_rows_alone():
    rows = {"<a>": np.full((2, 3), 0.1, np.float32)}
    alone = jax.grad(lambda rows: loss(add(PARAMS, rows)[0]))(rows)
    whole = jax.grad(loss)(add(PARAMS, rows)[0])
    assert table(whole)[0].any() and whole["head"]["kernel"].any()
    kept = restrict(whole, 4)
    np.testing.assert_array_equal(table(kept)[4:], alone["<a>"])
    assert not table(kept)[:4].any() and not kept["head"]["kernel"].any()
    # Two uses of one row and one of the other, in closed form.
    slope = 1 - np.tanh(0.3) ** 2
    np.testing.assert_allclose(alone["<a>"], [[slope] * 3, [2 * slope] * 3], rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: add(PARAMS, {"<a>": np.ones((2, 4))}), r"'<a>' has shape \(2, 4\); the table's rows have 3"),
        (lambda: add(PARAMS, {"<a>": np.ones((2, 3))}, vocabulary={"<a>_1"}), "'<a>_1' is in the vocabulary already"),
        (lambda: add(PARAMS, {"<a>": np.ones((2, 3)), "<a>_1": np.ones(3)}), "'<a>_1' is in the vocabulary"),
        (lambda: init(PARAMS, "<a>", like=4), "like=4, count=1: the table has 4 rows"),
        (lambda: table_of(PARAMS, "embedding$"), "it finds embeddings/position_embedding/embedding, embeddings/token"),
        (lambda: table_of({"x": np.ones(2)}), "it finds none, among x"),
        (lambda: extended({"x": 1}, 1), "no vocab_size"),
    ],
)
def test_what_is_wrong_with_a_request(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def file(path, **tensors):
    arrays = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    write(path, {k: Source(v.dtype, v.shape, lambda v=v: v) for k, v in arrays.items()}, {})
    return path


def test_forms_of_files(tmp_path):
    one = file(tmp_path / "a.safetensors", **{"<cat>": np.ones(3)})
    assert {k: v.shape for k, v in load_textual_inversion(one).items()} == {"<cat>": (1, 3)}
    assert [*load_textual_inversion(one, "<dog>")] == ["<dog>"]
    unnamed = file(tmp_path / "style.safetensors", emb_params=np.ones((2, 3)))
    assert {k: v.shape for k, v in load_textual_inversion(unnamed).items()} == {"style": (2, 3)}
    both = file(tmp_path / "xl.safetensors", clip_l=np.ones((2, 3)), clip_g=np.ones((2, 5)))
    assert load_textual_inversion(both, encoder="clip_g")["xl"].shape == (2, 5)
    apart = load_textual_inversion(both, ["<s0>", "<s1>"], encoder="clip_l")
    assert {k: v.shape for k, v in apart.items()} == {"<s0>": (1, 3), "<s1>": (1, 3)}


def test_what_is_saved_is_what_was_read(tmp_path):
    rows = {"<cat>": np.random.default_rng(0).standard_normal((2, 3)).astype(np.float16)}
    save_textual_inversion(rows, tmp_path / "learned_embeds.safetensors")
    again = load_textual_inversion(tmp_path)
    assert [*again] == ["<cat>"] and again["<cat>"].tobytes() == rows["<cat>"].tobytes()


def test_what_is_wrong_with_a_file(tmp_path):
    both = file(tmp_path / "xl.safetensors", clip_l=np.ones((2, 3)), clip_g=np.ones((2, 5)))
    with pytest.raises(WeightsError, match="rows for clip_l, clip_g: name one"):
        load_textual_inversion(both)
    with pytest.raises(WeightsError, match="no rows for the encoder 't5'"):
        load_textual_inversion(both, encoder="t5")
    with pytest.raises(WeightsError, match="expected one name for each"):
        load_textual_inversion(both, ["<a>"], encoder="clip_l")
    with pytest.raises(WeightsError, match="2 tensors; expected one"):
        load_textual_inversion(file(tmp_path / "b.safetensors", x=np.ones(3), y=np.ones(3)))
    with pytest.raises(WeightsError, match="expected rows of a table"):
        load_textual_inversion(file(tmp_path / "c.safetensors", x=np.ones((2, 2, 3))))
    (tmp_path / "old.pt").write_bytes(b"PK")
    with pytest.raises(WeightsError, match="a pickle"):
        load_textual_inversion(tmp_path / "old.pt")
    with pytest.raises(WeightsError, match="a file holds one"):
        save_textual_inversion({"<a>": np.ones(3), "<b>": np.ones(3)}, tmp_path / "d.safetensors")
