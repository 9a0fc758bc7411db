"""Tiny tokenizers in the folder formats of published ones, and what transformers makes of texts with them.

    .venv-oracle/bin/python tests/parity/tokens.py --out tests/parity/golden/tokenizers

Vocabularies are trained on this project's license and README. Needs transformers, tokenizers and sentencepiece.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TEXTS = [
    "",
    " ",
    "a photograph of an astronaut riding a horse",
    "License,  granted\tto\nYou: 1999's 42 works!!! don't we'll",
    "Ünïcödé naïve café Ｆｕｌｌ ﬁne ½ 日本語 한국어 عربى",
    "👩‍🚀 emoji 🐎🏽 mixed😀in",
    "a very long text, " * 12,
    "the end<|endoftext|>of the </s> text <extra_id_0>and<extra_id_1> [MASK] more",
    "UPPER lower MiXed x_y-z --- ... (a:1.2) [b] {c}",
]
CLASSES = {"clip": "CLIPTokenizer", "clip-xl": "CLIPTokenizer", "gpt2": "GPT2Tokenizer", "bert": "BertTokenizer"}
CLASSES |= {"bert-cased": "BertTokenizer", "t5": "T5Tokenizer"}


def corpus() -> list[str]:
    return (ROOT / "LICENSE").read_text().split("\n") + ["naïve café Ünïcödé 日本語 a photograph of a horse"] * 5


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n")


def pairs(folder: Path, suffix: str, count: int) -> None:
    """`vocab.json` and `merges.txt`: bytes, bytes at the end of a word, pairs, special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    ending = dict(end_of_word_suffix=suffix) if suffix else {}
    tokenizer = Tokenizer(models.BPE(**ending))
    split = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if suffix:
        tokenizer.normalizer = normalizers.Lowercase()
        split.insert(0, pre_tokenizers.WhitespaceSplit())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    trainer = trainers.BpeTrainer(vocab_size=count, show_progress=False, **ending)
    tokenizer.train_from_iterator(corpus(), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [token + suffix for token in alphabet if suffix] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>"] if suffix else []
    tokens += ["<|endoftext|>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(dict.fromkeys(tokens))})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def words(folder: Path, lower: bool) -> None:
    """`vocab.txt`."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(lowercase=lower)
    tokenizer.train_from_iterator(corpus(), vocab_size=260, show_progress=False)
    tokenizer.save_model(str(folder))


def unigrams(folder: Path) -> None:
    """`spiece.model`; its rules of normalisation are a few of NFKC's, whose table has 240 KB."""
    import sentencepiece

    rules = folder / "rules.tsv"
    rows = [(c, c - 0xFEE0) for c in range(0xFF21, 0xFF5B)] + [(0xFB01, "66 69"), (9, 32), (10, 32), (0x3000, 32)]
    text = lambda to: to if isinstance(to, str) else f"{to:X}"
    rules.write_text("".join(f"{source:X}\t{text(to)}\n" for source, to in rows))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=200, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        character_coverage=0.98, normalization_rule_tsv=str(rules), minloglevel=2,
    )  # fmt: skip
    rules.unlink()
    (folder / "spiece.model").write_bytes(model.getvalue())


def build(name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    config = {"tokenizer_class": CLASSES[name], "model_max_length": 16}
    if name.startswith("clip"):
        pairs(folder, "</w>", 700)
        token = lambda text: dict(content=text, lstrip=False, normalized=True, rstrip=False, single_word=False)
        pad = "!" if name == "clip-xl" else "<|endoftext|>"
        write_json(
            folder / "special_tokens_map.json",
            dict(bos_token=token("<|startoftext|>"), eos_token=token("<|endoftext|>"), pad_token=pad,
                 unk_token=token("<|endoftext|>")),
        )  # fmt: skip
    if name == "gpt2":
        pairs(folder, "", 450)
    if name.startswith("bert"):
        words(folder, name == "bert")
        config["do_lower_case"] = name == "bert"
    if name == "t5":
        unigrams(folder)
        config["extra_ids"] = 5
    write_json(folder / "tokenizer_config.json", config)


def record(tokenizer) -> dict:
    """What transformers makes of the texts, whole and cut to 16 tokens."""
    whole = tokenizer(TEXTS)["input_ids"]
    out = {"whole": whole, "decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in whole]}
    if tokenizer.pad_token is not None:
        for pad in ("max_length", "longest"):
            cut = tokenizer(TEXTS, padding=pad, truncation=True, max_length=16)
            out[pad] = [cut["input_ids"], cut["attention_mask"]]
    ids = {n: getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "eos", "pad", "unk", "cls", "sep")}
    return out | {"ids": ids, "size": len(tokenizer)}


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, replaced if it is there")
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    golden = {}
    for name, kind in CLASSES.items():
        build(name, out / name)
        tokenizer = getattr(transformers, kind).from_pretrained(out / name)
        golden[name] = record(tokenizer)
        if name in ("bert", "t5"):
            tokenizer.save_pretrained(out / f"{name}-json")
            whole = out / f"{name}-json" / "tokenizer.json"
            whole.write_text(json.dumps(json.loads(whole.read_text()), ensure_ascii=False))
            golden[f"{name}-json"] = golden[name]
    (out / "golden.json").write_text(json.dumps({"texts": TEXTS, "runs": golden}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
