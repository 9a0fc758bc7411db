"""Tokenizers against what transformers makes of the same texts with the same files (`tests/parity/tokens.py`)."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from diffjax.data import load_tokenizer

GOLDEN = Path(__file__).parent.parent / "parity" / "golden" / "tokenizers"
FACTS = json.loads((GOLDEN / "golden.json").read_text())
TEXTS, RUNS = FACTS["texts"], FACTS["runs"]


@pytest.mark.parametrize("name", RUNS)
def test_ids_are_those_of_transformers(name):
    run, tokenizer = RUNS[name], load_tokenizer(GOLDEN / name)
    whole = [[*tokenizer.prefix, *ids, *tokenizer.suffix] for ids in tokenizer.encode(TEXTS)]
    assert whole == run["whole"]
    # sentencepiece puts no space where an unknown first character was.
    assert [tokenizer.decode(ids).strip() for ids in whole] == [text.strip() for text in run["decoded"]]
    ids = run["ids"]
    assert (tokenizer.pad, tokenizer.unk, tokenizer.size) == (ids["pad"], ids["unk"], run["size"])
    assert tokenizer.bos == (ids["bos"] if ids["cls"] is None else ids["cls"])
    assert tokenizer.eos == (ids["eos"] if ids["sep"] is None else ids["sep"])
    assert tokenizer.max_length == 16


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if "longest" in run])
def test_cut_and_padded_ids_and_masks_are_those_of_transformers(name):
    tokenizer = load_tokenizer(GOLDEN / name)
    for pad, key in (("max", "max_length"), ("longest", "longest")):
        found = tokenizer(TEXTS, pad=pad)
        assert found.ids.dtype == found.mask.dtype == np.int32
        np.testing.assert_array_equal(found.ids, RUNS[name][key][0])
        np.testing.assert_array_equal(found.mask, RUNS[name][key][1])


def test_one_text_is_a_batch_of_one():
    tokenizer = load_tokenizer(GOLDEN / "clip")
    assert tokenizer("a horse").ids.shape == (1, 16) and tokenizer([], pad="longest").ids.shape == (0, 0)
    np.testing.assert_array_equal(tokenizer("a horse", length=9).ids, tokenizer(["a horse"]).ids[:, :9])
    assert tokenizer("", pad=None).ids.tolist() == [[tokenizer.bos, tokenizer.eos]]


def test_special_tokens_are_kept_when_asked_for():
    for name in ("clip", "t5"):
        tokenizer = load_tokenizer(GOLDEN / name)
        ids = tokenizer("a horse", pad="longest").ids[0]
        assert tokenizer.decode(ids) == "a horse"
        end = {"clip": "<|endoftext|>", "t5": "</s>"}[name]
        assert tokenizer.decode(ids, skip_special=False).endswith(end)


def test_padding_and_cutting_in_front(tmp_path):
    folder = shutil.copytree(GOLDEN / "bert", tmp_path / "bert")
    (folder / "tokenizer_config.json").write_text('{"padding_side": "left", "truncation_side": "left"}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.max_length is None
    found = tokenizer(["a", "a b c d e f"], length=6, pad="max")
    assert found.mask.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    assert tokenizer.decode(found.ids[1]) == "c d e f"


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("gpt2", dict(), "no token for padding"),
        ("clip", dict(pad=None), "need pad='max' or pad='longest'"),
        ("clip", dict(truncate=False), "is longer than 16; truncate=True"),
        ("clip", dict(length=1), "no room for a text: 2 tokens"),
        ("clip", dict(pad="maxx"), "pad is 'maxx'; known: 'max', 'longest', None; did you mean 'max'"),
    ],
)
def test_what_cannot_be_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load_tokenizer(GOLDEN / name)(["a", TEXTS[6]], **settings)


def test_texts_without_an_end_need_a_length(tmp_path):
    shutil.copy(GOLDEN / "bert" / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="give length="):
        tokenizer("a")
    assert tokenizer("a", pad="longest").ids.shape == (1, 3)


BROKEN = {
    "no merges": ("clip", {"merges.txt": None}, "without the merges.txt"),
    "merges of one": ("clip", {"merges.txt": "a\n"}, "two parts in each line"),
    "no JSON": ("clip", {"vocab.json": "{"}, "vocab.json: no JSON"),
    "no object": ("clip", {"tokenizer_config.json": "[]"}, "expected a JSON object, got list"),
    "no numbers": ("clip", {"vocab.json": '{"a</w>": "b"}'}, "vocab.json: no tokenizer"),
    "no whole file": ("bert-json", {"tokenizer.json": "{}"}, "tokenizer.json: no tokenizer"),
    "no model": ("t5", {"spiece.model": "nothing"}, "spiece.model: no model of sentencepiece"),
    "two ids": ("bert", {"added_tokens.json": '{"<new>": 7}'}, "token '<new>' has the id 7 in one file, and 260"),
    "no content": (
        "bert", {"tokenizer_config.json": '{"added_tokens_decoder": {"0": {}}}'}, "expected tokens by their ids"
    ),
    "extra ids": ("t5", {"tokenizer_config.json": '{"extra_ids": 1000000000}'}, "expected a number up to 10000"),
    "length": ("clip", {"tokenizer_config.json": '{"model_max_length": "77"}'}, "='77'; expected a number of tokens"),
    "no length": ("t5", {"tokenizer_config.json": '{"model_max_length": 0}'}, "=0; expected a number of tokens"),
    "no token": ("clip", {"special_tokens_map.json": '{"unk_token": [1]}'}, r"unk_token=\[1\]; expected a token"),
    "token of a number": ("t5", {"tokenizer_config.json": '{"additional_special_tokens": [3]}'}, "expected tokens"),
    "id of text": ("bert", {"added_tokens.json": '{"<new>": "7"}'}, "'<new>' has the id '7'; expected a number"),
    "no utf-8": ("clip", {"merges.txt": b"\xff"}, "vocab.json: no tokenizer: UnicodeDecodeError"),
}


@pytest.mark.parametrize("name, files, message", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(name, files, message, tmp_path):
    folder = shutil.copytree(GOLDEN / name, tmp_path / name)
    for file, text in files.items():
        (folder / file).unlink(missing_ok=True)
        if text is not None:
            (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)


def test_tokens_that_were_added_have_the_ids_of_their_file(tmp_path):
    folder = shutil.copytree(GOLDEN / "bert", tmp_path / "bert")
    (folder / "added_tokens.json").write_text('{"<second>": 261, "<first>": 260}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(["a<second> <first>"])[0][1:] == [261, 260] and tokenizer.size == 262


def edited(name, tmp_path, file="tokenizer_config.json", **settings):
    """A tokenizer with other settings in one of its files."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / name, dirs_exist_ok=True)
    held = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps(held | settings))
    return load_tokenizer(folder)


def test_sides_of_padding_and_cutting_are_those_of_the_whole_file_where_the_settings_are_silent(tmp_path):
    padding = dict(direction="Left", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="[PAD]")
    padding["strategy"] = "BatchLongest"
    cut = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tokenizer = edited("bert-json", tmp_path, "tokenizer.json", padding=padding, truncation=cut)
    found = tokenizer(["a", "a b c d e f"], length=6)
    assert found.mask.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6] and tokenizer.decode(found.ids[1]) == "c d e f"
    right = edited("bert-json", tmp_path, padding_side="right", truncation_side="right")
    assert not right.pad_left and not right.cut_left


@pytest.mark.parametrize("setting", ["do_lower_case", "strip_accents", "tokenize_chinese_chars"])
def test_settings_of_bert_count_beside_its_whole_file(setting, tmp_path):
    texts, settings = ["Hello café 日本語"], {setting: False}
    whole = edited("bert-json", tmp_path, tokenizer_class="BertTokenizer", **settings)
    assert whole.encode(texts) == edited("bert", tmp_path, **settings).encode(texts)
    assert whole.encode(texts) != load_tokenizer(GOLDEN / "bert").encode(texts)


def test_space_in_front_of_gpt2_counts_beside_its_whole_file(tmp_path):
    package = pytest.importorskip("tokenizers")
    whole = package.Tokenizer(package.models.BPE(vocab={"a": 0, "Ġ": 1}, merges=[]))
    whole.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.save(str(tmp_path / "tokenizer.json"))
    for kind, ids in (("GPT2TokenizerFast", [1, 0]), ("PreTrainedTokenizerFast", [0])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class=kind, add_prefix_space=True)))
        assert load_tokenizer(tmp_path).encode(["a"]) == [ids]


def test_special_tokens_are_found_as_their_files_say(tmp_path):
    xl = load_tokenizer(GOLDEN / "clip-xl")  # whose end is looked for in the text in small letters
    assert xl.eos in xl.encode(["a<|EndOfText|>b"])[0]
    new = dict(content="<new>", lstrip=True, rstrip=False, normalized=False, single_word=False)
    wide = edited("gpt2", tmp_path, "special_tokens_map.json", pad_token=new, additional_special_tokens=["<two>"])
    a, b = wide.encode(["a", "b "])
    assert wide.encode(["a <new>b <two>"]) == [[*a, wide.pad, *b, wide.pad + 1]]
    named = edited("gpt2", tmp_path, image_token="<img>")
    assert named.encode(["<img>"]) == [[wide.pad + 1]]  # before those without a name


def test_tokens_that_were_added_to_t5(tmp_path):
    plain = load_tokenizer(GOLDEN / "t5")
    entry = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=False)
    table = {str(plain.size): dict(content="<new>", **entry), "0": dict(content="<pad>", **entry | {"special": True})}
    tokenizer = edited("t5", tmp_path, added_tokens_decoder=table, extra_special_tokens=["<two>"])
    ids = tokenizer.encode(["a<new> horse <two>"])[0]
    assert [ids[1], ids[-1], tokenizer.size] == [plain.size, plain.size + 1, plain.size + 2]
    assert tokenizer.decode(ids) == "a <new> horse" and tokenizer.decode(ids, skip_special=False).endswith("<two>")
    with pytest.raises(ValueError, match="'<new>' has the id 7 in one file, and 205 in the others"):
        edited("t5", tmp_path, "added_tokens.json", **{"<new>": 7})
    word = {str(plain.size): dict(content="<new>", **entry | {"single_word": True})}
    with pytest.raises(ValueError, match="single_word=True of '<new>' is not supported"):
        edited("t5", tmp_path, added_tokens_decoder=word)


def test_tokens_that_are_null_are_none(tmp_path):
    tokenizer = edited("t5", tmp_path, pad_token=None, eos_token=None)
    assert tokenizer.pad is None and tokenizer.suffix == ()


def test_longest_text_under_its_older_name(tmp_path):
    shutil.copy(GOLDEN / "bert" / "vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"max_len": 7}')
    assert load_tokenizer(tmp_path).max_length == 7


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_special_tokens_that_are_not_looked_for_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="split_special_tokens=True; expected False"):
        edited(name, tmp_path, split_special_tokens=True)


@pytest.mark.parametrize("name", ["clip", "gpt2", "t5"])
def test_learned_words_are_their_ids(name):
    plain = load_tokenizer(GOLDEN / name)
    ids = {"<cat>": (plain.size, plain.size + 1), "<cat>s": (plain.size + 2,)}
    tokenizer = plain.extended(ids)
    row = tokenizer.encode(["a <cat> on <cat>s.<cat>"])[0]
    (before,), (between,), (dot,) = (plain.encode([text]) for text in ("a ", " on ", "."))
    assert row == [*before, *ids["<cat>"], *between, *ids["<cat>s"], *dot, *ids["<cat>"]]
    assert tokenizer.decode(row).split() == [
        *plain.decode(before).split(), "<cat>", *plain.decode(between).split(), "<cat>s", ".", "<cat>"
    ]
    assert tokenizer.encode(["a horse", ""]) == plain.encode(["a horse", ""])
    assert tokenizer.decode(plain.encode(["a horse"])[0]) == plain.decode(plain.encode(["a horse"])[0])
    assert tokenizer.size == plain.size + 3 and plain.extended({}) is plain
    for wrong in ({"": (1,)}, {"a": ()}, {"a": (-1,)}, {"a": ("x",)}):
        with pytest.raises(ValueError, match="expected letters, and numbers from 0 on"):
            plain.extended(wrong)


def test_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked for tokenizer.json, spiece.model, vocab.json, vocab.txt"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name, package", [("clip", "tokenizers"), ("t5", "sentencepiece")])
def test_a_package_that_is_not_installed_is_named_with_its_extra(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}.*pip install 'diffjax\[text\]'"):
        load_tokenizer(GOLDEN / name)
