"""Text encoders: older names, tied weights, configs, sharding rules. `test_parity` compares what they compute."""


import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffjax.convert import WeightsError, load, save
from diffjax.models import NETWORKS, from_config
from diffjax.models.text import clip_skip
from diffjax.nn.functional import names_of
from diffjax.train import paths

SMALL = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(vocab_size=20, max_position_embeddings=6, projection_dim=4, **SMALL)
VISION = dict(image_size=4, patch_size=2, projection_dim=4, **SMALL)
BERT = dict(vocab_size=20, max_position_embeddings=6, **SMALL)
GPT2 = dict(vocab_size=20, n_positions=6, n_embd=8, n_layer=2, n_head=2)
T5 = dict(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
CONFIGS = {
    "BertForMaskedLM": BERT,
    "BertModel": BERT,
    "GPT2LMHeadModel": GPT2,
    "GPT2Model": GPT2,
    "T5EncoderModel": T5,
    "UMT5EncoderModel": T5,
    "CLIPTextModel": TEXT,
    "CLIPTextModelWithProjection": TEXT,
    "CLIPVisionModel": VISION,
    "CLIPVisionModelWithProjection": VISION,
    "CLIPModel": dict(text_config=TEXT, vision_config=VISION, projection_dim=4),
}


def network(kind, **settings):
    return from_config({"architectures": [kind], **CONFIGS[kind], **settings})


def drawn(model):
    """Parameters without the time that their initial values take."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


def folder_with(kind, path, rename, **settings):
    """A checkpoint whose tensors `rename(name, array) -> {name: array}` has renamed, and its parameters."""
    model = network(kind, **settings)
    params = drawn(model)
    save(model, params, path)
    path = path / "model.safetensors"
    tensors = load_file(path).items()
    save_file({k: v for name, array in tensors for k, v in rename(name, array).items()}, path)
    return params


def prefixed(prefix):
    return lambda name, array: {prefix + name: array}


def with_positions(prefix):
    ids = np.arange(6)[None]
    return lambda name, array: {prefix + name: array, f"{prefix}embeddings.position_ids": ids}


def tensorflow(name, array):
    """As in bert-base-uncased: the norms' old names, and the heads of pretraining."""
    if ".LayerNorm." in name:
        name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
    heads = ("bert.pooler.dense.weight", "cls.seq_relationship.bias", "bert.embeddings.position_ids")
    return {name: array} | {head: np.zeros(8, np.float32) for head in heads}


def of_masked_lm(name, array):
    return {"bert." + name: array, "cls.predictions.bias": np.zeros(20, np.float32)}


def without_head(name, array):
    """As in gpt2: names of the network without its head, and the causal masks."""
    masks = {f"h.{i}.attn.{n}": np.ones((1, 1, 6, 6), np.float32) for i in range(2) for n in ("bias", "masked_bias")}
    return {name.removeprefix("transformer."): array} | masks


def doubled(name, other):
    return lambda key, array: {key: array, other: array} if key == name else {key: array}


TABLES = {
    "BertForMaskedLM": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    "GPT2LMHeadModel": ("transformer.wte.weight", "lm_head.weight"),
    "T5EncoderModel": ("shared.weight", "encoder.embed_tokens.weight"),
    "UMT5EncoderModel": ("shared.weight", "encoder.embed_tokens.weight"),
}
OLDER = {
    "bert of tensorflow": ("BertForMaskedLM", tensorflow),
    "bert of a masked lm": ("BertModel", of_masked_lm),
    "bert with both biases": ("BertForMaskedLM", doubled("cls.predictions.bias", "cls.predictions.decoder.bias")),
    "gpt2": ("GPT2LMHeadModel", without_head),
    "gpt2 of a language model": ("GPT2Model", lambda k, v: {f"transformer.{k}": v, "lm_head.weight": v}),
    "t5 with its decoder": ("T5EncoderModel", lambda k, v: {k: v, "decoder." + k: v, "lm_head.weight": v}),
    **{f"{kind} with both tables": (kind, doubled(*names)) for kind, names in TABLES.items()},
    **{
        f"{kind} with the other table": (kind, lambda k, v, names=names: {names[1] if k == names[0] else k: v})
        for kind, names in TABLES.items()
    },
    "text": ("CLIPTextModel", with_positions("text_model.")),
    "vision": ("CLIPVisionModel", with_positions("vision_model.")),
    "vision twice": ("CLIPVisionModel", prefixed("vision_model.vision_model.")),
    "projected vision twice": (
        "CLIPVisionModelWithProjection",
        lambda name, array: {("vision_model." if name.startswith("vision_model.") else "") + name: array},
    ),
}


@pytest.mark.parametrize("kind, rename", OLDER.values(), ids=OLDER)
def test_older_names_are_read(kind, rename, tmp_path):
    params = folder_with(kind, tmp_path, rename)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], params)


TOWERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection")


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_is_read_from_a_file_of_both(kind, tmp_path):
    both = folder_with("CLIPModel", tmp_path, prefixed(""))
    params = load(tmp_path, config={"architectures": [kind], **CONFIGS[kind]})[1]
    tower, projection = ("text_model", "text_projection") if "Text" in kind else ("vision_model", "visual_projection")
    wanted = both[tower] if "Projection" not in kind else {name: both[name] for name in (tower, projection)}
    jax.tree.map(np.testing.assert_array_equal, params, wanted)


@pytest.mark.parametrize("kind", TABLES)
def test_two_tables_that_differ_are_refused(kind, tmp_path):
    name, other = TABLES[kind]
    folder_with(kind, tmp_path, lambda k, v: {k: v, other: v + 1} if k == name else {k: v})
    with pytest.raises(WeightsError, match="differ, and are one parameter"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_untied_tables_are_two_parameters(kind, tmp_path):
    params = folder_with(kind, tmp_path, prefixed(""), tie_word_embeddings=False)
    held = load_file(tmp_path / "model.safetensors")
    assert not np.array_equal(held[TABLES[kind][0]], held[TABLES[kind][1]])
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], params)


@pytest.mark.parametrize("kind", CONFIGS)
def test_sharding_rules_cover_every_parameter_with_its_rank(kind):
    model = network(kind)
    leaves = names_of(jax.eval_shape(model.init, jax.random.key(0)))
    found = paths.match(model.rules, leaves, "sharding")
    for name, axes in found.items():
        assert len(axes) in (0, leaves[name].ndim), name
    matrices = [n for n in leaves if n.endswith(("/kernel", "/embedding"))]
    assert all(any(found[n]) for n in matrices)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_class_is_registered_and_rejects_what_it_does_not_know(kind):
    assert kind in NETWORKS
    with pytest.raises(ValueError, match="unknown setting 'hiden'"):
        network(kind, hiden=8)


REFUSED = [
    ("CLIPTextModel", dict(hidden_act="gelu_10"), "hidden_act='gelu_10' is not supported"),
    ("CLIPTextModel", dict(num_attention_heads=3), "hidden_size=8 is no multiple of num_attention_heads=3"),
    ("CLIPTextModel", dict(quantization_config={"bits": 4}), "quantization_config"),
    ("CLIPTextModel", dict(eos_token_id=[1, 2]), r"eos_token_id=\(1, 2\): expected int, such as 49407"),
    ("CLIPVisionModel", dict(image_size=[4, 4]), r"image_size=\(4, 4\): expected int, such as 224"),
    ("CLIPModel", dict(text_config={**TEXT, "hidden_act": "no"}), "CLIPModel.text_config: hidden_act='no'"),
    ("CLIPModel", dict(vision_config_dict={"depth": 3}), "CLIPModel.vision_config_dict: unknown setting 'depth'"),
    ("BertModel", dict(position_embedding_type="relative_key"), "position_embedding_type"),
    ("BertModel", dict(is_decoder=True), "is_decoder"),
    ("GPT2Model", dict(add_cross_attention=True), "add_cross_attention"),
    ("GPT2Model", dict(n_head=3), "n_embd=8 is no multiple of n_head=3"),
    ("T5EncoderModel", dict(feed_forward_proj="odd-relu"), "feed_forward_proj='odd-relu'"),
    ("T5EncoderModel", dict(feed_forward_proj="gated-odd"), "feed_forward_proj='odd'"),
    ("T5EncoderModel", dict(relative_attention_max_distance=8), "relative_attention_max_distance=8"),
    ("CLIPVisionModel", dict(pruned_heads={"0": [1]}), "pruned_heads"),
]


@pytest.mark.parametrize("kind, settings, message", REFUSED)
def test_what_is_not_supported_is_refused_by_name(kind, settings, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        network(kind, **settings)


def test_config_of_an_older_file_is_read():
    older = dict(
        torch_dtype="float32", gradient_checkpointing=False, attention_dropout=0.1, dropout=0.0, initializer_factor=1.0,
        _attn_implementation_autoset=True, transformers_version="4.22.0.dev0", pruned_heads={}, is_decoder=False,
        add_cross_attention=False, model_type="clip_text_model", bos_token_id=0, pad_token_id=1, top_k=50,
    )  # fmt: skip
    assert network("CLIPTextModel", **older).config["torch_dtype"] == "float32"


def test_settings_of_t5_in_the_file_replace_what_its_name_of_the_perceptron_says():
    names = names_of(jax.eval_shape(network("T5EncoderModel", is_gated_act=True).init, jax.random.key(0)))
    assert any(name.endswith("wi_0/kernel") for name in names)


@pytest.mark.parametrize("pad", [3, -17])  # of 20
def test_padding_of_bert_is_not_trained(pad):
    model = network("BertModel", pad_token_id=pad)
    loss = lambda params: model.apply(params, np.array([[3, 4, 3]])).last[0, 0, 0]
    found = jax.jit(jax.grad(loss))(drawn(model))["embeddings"]["word_embeddings"]["embedding"]
    assert not np.any(found[3]) and np.any(found[4])


def test_older_config_of_both_towers_has_its_defaults_where_it_is_silent():
    """As transformers reads the `_dict`s: what they leave out is the default, whatever the other key says."""
    model = network("CLIPModel", text_config={**TEXT, "hidden_size": 16}, text_config_dict={**TEXT})
    shapes = names_of(jax.eval_shape(model.init, jax.random.key(0)))
    assert shapes["text_projection/kernel"].shape == (8, 4)


def test_clip_skip_is_an_earlier_layer():
    model = network("CLIPTextModel", eos_token_id=19)
    params = drawn(model)
    ids = np.array([[1, 5, 19, 0, 0, 0], [1, 2, 3, 4, 19, 19]])
    out = model.apply(params, ids)
    np.testing.assert_array_equal(clip_skip(out, 1), out.hidden[-2])
    np.testing.assert_array_equal(out.pooled, np.stack([out.last[0, 2], out.last[1, 4]]))
    skipped = model.apply(params, ids, skip=1)
    np.testing.assert_array_equal(skipped.pooled, out.pooled)
    assert np.abs(skipped.last - out.last).max() > 1e-2
    with pytest.raises(ValueError, match="skip=3"):
        clip_skip(out, 3)
    with pytest.raises(ValueError, match="7 tokens are more than the 6 positions"):
        model.apply(params, np.zeros((1, 7), np.int32))
    with pytest.raises(ValueError, match="ids are float32"):
        model.apply(params, np.zeros((1, 6), np.float32))
