"""Texts as integers: the tokenizers of published checkpoints, read from their folders.

They are run by the packages `tokenizers` and `sentencepiece` (`pip install 'diffjax[text]'`); neither PyTorch nor
transformers is needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.data.errors import require
from diffjax.registry import nearest

PADS = ("max", "longest", None)
# What transformers writes for a tokenizer without a longest text.
ENDLESS = 10**9
MOST_EXTRA = 10_000  # sentinels of T5, which has 100
LONGEST_JSON = 100_000_000
FILES = ("tokenizer.json", "spiece.model", "vocab.json", "vocab.txt")
# Of the vocabularies whose files do not name them.
_END = "<|endoftext|>"
DEFAULTS = {
    "clip": dict(unk_token=_END, bos_token="<|startoftext|>", eos_token=_END, pad_token=_END),
    "gpt2": dict(unk_token=_END, bos_token=_END, eos_token=_END),
    "bert": dict(
        unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]", mask_token="[MASK]"
    ),
    "t5": dict(unk_token="<unk>", eos_token="</s>", pad_token="<pad>"),
}
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# How a token is found in a text: with the spaces beside it, in the normalised text, as a whole word alone.
WAYS = ("lstrip", "rstrip", "normalized", "single_word")
# Settings of BERT by their names in the package.
BERT = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars"}  # fmt: skip
# The words of CLIP: what the text is split into before pairs are merged.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokens(NamedTuple):
    """Texts as integers.

    Attributes:
      ids: `[B, L] int32`.
      mask: `[B, L] int32`, 1 for tokens of the text and those that begin and end it, 0 for padding.
    """

    ids: np.ndarray
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer; see `load_tokenizer`.

    Attributes:
      encode: `(texts) -> lists of ids`, without the tokens that begin and end a text.
      decode: `(ids, skip_special=True) -> text`, of one text.
      prefix, suffix: the tokens that begin and end a text.
      bos, eos, pad, unk: single tokens, None where there is none. BERT's first and last are `bos` and `eos`.
      size: the number of ids.
      max_length: of a text, with the tokens around it; None if the files do not say.
      pad_left, cut_left: whether padding is put, and texts are cut, in front.
    """

    encode: Callable[[Sequence[str]], list[list[int]]]
    decode: Callable[..., str]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None
    size: int
    max_length: int | None
    pad_left: bool = False
    cut_left: bool = False

    def __call__(
        self, texts: str | Sequence[str], length: int | None = None, pad: str | None = "max", truncate: bool = True
    ) -> Tokens:
        """The tokens of texts.

        Args:
          texts: one, or many.
          length: of the longest; None for `max_length`.
          pad: "max" fills all up to `length`, "longest" to the longest of them; None for texts of one length.
          truncate: cut what is longer than `length`, but not the tokens around it; otherwise that is an error.

        Raises:
          ValueError: for a length that is not known or leaves no room, texts that are too long or, without padding, of
            several lengths, or padding without a token for it.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = self.max_length if length is None else length
        around = len(self.prefix) + len(self.suffix)
        if pad not in PADS:
            raise ValueError(f"pad is {pad!r}; known: {', '.join(map(repr, PADS))}{nearest(str(pad), PADS[:2])}")
        if pad == "max" and length is None:
            raise ValueError("this tokenizer has no longest text: give length=, or pad='longest'")
        if length is not None and length < max(around, 1):
            raise ValueError(f"length={length} leaves no room for a text: {around} tokens are put around it")
        rows = [self._whole(ids, length, around, truncate) for ids in self.encode(texts)]
        longest = max(map(len, rows), default=0)
        width = length if pad == "max" else longest
        if pad is None and any(len(row) < longest for row in rows):
            raise ValueError(f"texts of {sorted({len(row) for row in rows})} tokens need pad='max' or pad='longest'")
        if self.pad is None and any(len(row) < width for row in rows):
            raise ValueError("this tokenizer has no token for padding: give texts of one length, with pad=None")
        ids, mask = np.full((len(rows), width), self.pad or 0, np.int32), np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            where = slice(width - len(row), width) if self.pad_left else slice(0, len(row))
            ids[i, where], mask[i, where] = row, 1
        return Tokens(ids, mask)

    def extended(self, ids: Mapping[str, Sequence[int]]) -> Tokenizer:
        """The same with further words, such as those that `diffjax.adapters.textual_inversion.add` returns.

        Args:
          ids: `{word: its ids}`; a word is found wherever it stands in a text letter by letter, the longest first.

        Raises:
          ValueError: for a word without letters or ids, and ids that are no whole numbers from zero on.
        """
        words = {word: tuple(given) for word, given in ids.items()}
        for word, given in words.items():
            if not word or not given or any(not isinstance(i, int | np.integer) or i < 0 for i in given):
                raise ValueError(f"the word {word!r} with the ids {given}: expected letters, and numbers from 0 on")
        if not words:
            return self
        regex = re.compile("(" + "|".join(map(re.escape, sorted(words, key=len, reverse=True))) + ")")
        back = sorted(words.items(), key=lambda item: -len(item[1]))

        def encode(texts):
            parts = [[part for part in regex.split(text) if part] for text in texts]
            known = iter(self.encode([part for row in parts for part in row if part not in words]))
            return [[i for part in row for i in (words[part] if part in words else next(known))] for row in parts]

        def decode(ids, skip_special=True):
            ids, parts, plain = [int(i) for i in ids], [], []
            at = 0
            while at < len(ids):
                word = next((word for word, given in back if tuple(ids[at : at + len(given)]) == given), None)
                if word is None:
                    plain.append(ids[at])
                else:
                    parts += [self.decode(plain, skip_special), word] if plain else [word]
                    plain = []
                at += 1 if word is None else len(words[word])
            return " ".join([*parts, self.decode(plain, skip_special)] if plain or not parts else parts)

        size = max(self.size, *(1 + i for given in words.values() for i in given))
        return dataclasses.replace(self, encode=encode, decode=decode, size=size)

    def _whole(self, ids, length, around, truncate):
        if length is not None and len(ids) + around > length:
            if not truncate:
                raise ValueError(f"a text of {len(ids) + around} tokens is longer than {length}; truncate=True cuts it")
            room = length - around
            ids = ids[len(ids) - room :] if self.cut_left else ids[:room]
        return [*self.prefix, *ids, *self.suffix]


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a folder, such as `stable-diffusion/tokenizer`.

    It is read from the first of these files that is there: `tokenizer.json`; `spiece.model` (T5); `vocab.json` and
    `merges.txt` (CLIP if words end in `</w>`, else GPT-2); `vocab.txt` (BERT). Special tokens and the longest text come
    from `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`, where these are; beside a
    `tokenizer.json` the settings of BERT's normalisation and of GPT-2's first space count as well.

    Raises:
      ValueError: for files that are damaged or do not fit together, and settings that are not supported.
      FileNotFoundError: for a folder without a tokenizer.
      ModuleNotFoundError: if the package that reads the file is not installed.
    """
    folder = Path(folder)
    found = [name for name in FILES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: no tokenizer; looked for {', '.join(FILES)}")
    config, named, added = (
        _json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    # With its table of added tokens the config is the newer of the two files.
    config = {**named, **config} if "added_tokens_decoder" in config else {**config, **named}
    _check_config(folder, config, added)
    name = "sentencepiece" if found[0] == "spiece.model" else "tokenizers"
    package = require(name, name, "text")
    try:
        if found[0] == "spiece.model":
            return _sentencepiece(package, folder / found[0], config, added)
        reader = {"tokenizer.json": _whole_file, "vocab.json": _pairs, "vocab.txt": _wordpiece}[found[0]]
        tokenizer, kind = reader(package, folder, config)
        names = _names(config, kind)
        _add_tokens(package, folder, tokenizer, names, config, added)
        if kind is not None:
            _surround(package, tokenizer, names, config, kind)
        return _of_package(tokenizer, names, config)
    except Exception as error:  # the packages raise nothing more special
        if str(error).startswith(str(folder)):
            raise
        raise ValueError(f"{folder / found[0]}: no tokenizer: {type(error).__name__}: {str(error)[:200]}") from error


def _check_config(folder: Path, config: dict[str, Any], added: dict[str, Any]) -> None:
    """Raises `ValueError` for settings that are not of their type, or ask for more tokens than there can be."""
    token = lambda value: isinstance(_content(value), str)
    length = lambda value: type(value) in (int, float) and value >= 1
    several = lambda value: isinstance(value, list | dict) and all(map(token, _listed(value)))
    table = lambda value: isinstance(value, dict) and all(map(_numbered, value.items()))
    rules = {
        **{name: (token, "a token") for name in NAMES},
        **dict.fromkeys(("model_max_length", "max_len"), (length, "a number of tokens")),
        "extra_ids": (lambda n: type(n) is int and 0 <= n <= MOST_EXTRA, f"a number up to {MOST_EXTRA}"),
        "additional_special_tokens": (several, "tokens"), "extra_special_tokens": (several, "tokens"),
        "added_tokens_decoder": (table, "tokens by their ids"),
        "split_special_tokens": (lambda value: value is False, "False: special tokens are found in a text"),
    }  # fmt: skip
    for name, (fits, wanted) in rules.items():
        if config.get(name) is not None and not fits(config[name]):
            raise ValueError(f"{folder}: its settings have {name}={reprlib.repr(config[name])}; expected {wanted}")
    wrong = next((name for name, number in added.items() if type(number) is not int), None)
    if wrong is not None:
        told = f"{reprlib.repr(wrong)} has the id {reprlib.repr(added[wrong])}; expected a number"
        raise ValueError(f"{folder / 'added_tokens.json'}: {told}")


def _numbered(item: tuple[str, Any]) -> bool:
    """Whether an entry of `added_tokens_decoder` has an id and a token."""
    number, entry = item
    fits = isinstance(entry, dict) and isinstance(entry.get("content"), str)
    return fits and re.fullmatch("[0-9]{1,9}", number) is not None


def _listed(tokens: list | dict) -> list:
    """Tokens in a list, or by names that a model has for them."""
    return [*tokens.values()] if isinstance(tokens, dict) else tokens


def _names(config, kind):
    """The special tokens by their names, in the order of `NAMES`; those that the files set to null are left out."""
    given = {name: _content(config[name]) for name in NAMES if config.get(name) is not None}
    given |= {name: token for name, token in DEFAULTS.get(kind, {}).items() if name not in config}
    return {name: given[name] for name in NAMES if name in given}


def _more(config):
    """The special tokens without one of these names: such as `image_token` of a model, and those without any."""
    own = (config[key] for key in config if key.endswith("_token") and key not in NAMES)
    more = _listed(config.get("extra_special_tokens") or config.get("additional_special_tokens") or [])
    return [*(token for token in own if isinstance(_content(token), str)), *more]


def _whole_file(package, folder, config):
    """`tokenizer.json`; what `config` lacks is put there, and what its class takes from there counts."""
    tokenizer = package.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for held, side in ((tokenizer.padding, "padding_side"), (tokenizer.truncation, "truncation_side")):
        config.setdefault(side, held["direction"] if held else "right")
    if tokenizer.padding:
        config.setdefault("pad_token", tokenizer.padding["pad_token"])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    kind = str(config.get("tokenizer_class"))
    if kind.startswith("BertTokenizer") and isinstance(tokenizer.normalizer, package.normalizers.BertNormalizer):
        for name, attribute in BERT.items():
            if name in config:
                setattr(tokenizer.normalizer, attribute, config[name])
    if kind.startswith("GPT2Tokenizer") and isinstance(tokenizer.pre_tokenizer, package.pre_tokenizers.ByteLevel):
        tokenizer.pre_tokenizer.add_prefix_space = bool(
            config.get("add_prefix_space", tokenizer.pre_tokenizer.add_prefix_space)
        )
    return tokenizer, None


def _pairs(package, folder, config):
    """CLIP or GPT-2 (byte pair encoding: Sennrich et al. 2016, arXiv:1508.07909)."""
    if not (folder / "merges.txt").is_file():
        raise ValueError(f"{folder}: vocab.json without the merges.txt that belongs to it")
    vocab, lines = _json(folder / "vocab.json"), (folder / "merges.txt").read_text("utf-8").split("\n")
    # CLIP's own file has a version in its first line; a pair may begin with # as well, and has two parts.
    lines = lines[1:] if lines[0].startswith("#version") else lines
    merges = [tuple(line.split()) for line in lines if line.strip()]
    if not all(len(pair) == 2 for pair in merges):
        raise ValueError(f"{folder / 'merges.txt'}: expected two parts in each line")
    clip = any(token.endswith("</w>") for token in vocab)
    decoders, normal, split = package.decoders, package.normalizers, package.pre_tokenizers
    bytewise = dict(add_prefix_space=not clip and bool(config.get("add_prefix_space", False)))
    if not clip:
        tokenizer = package.Tokenizer(package.models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer, tokenizer.decoder = split.ByteLevel(**bytewise), decoders.ByteLevel()
        return tokenizer, "gpt2"
    unknown = _content(config.get("unk_token")) or _END
    suffix = dict(end_of_word_suffix="</w>", unk_token=unknown)
    tokenizer = package.Tokenizer(package.models.BPE(vocab=vocab, merges=merges, **suffix))
    tokenizer.normalizer = normal.Sequence(
        [normal.NFC(), normal.Replace(package.Regex(r"\s+"), " "), normal.Lowercase()]
    )
    words = split.Split(package.Regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = split.Sequence([words, split.ByteLevel(**bytewise)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, "clip"


def _wordpiece(package, folder, config):
    """BERT (WordPiece: Wu et al. 2016, arXiv:1609.08144)."""
    lines = (folder / "vocab.txt").read_bytes().decode("utf-8").split("\n")
    lines = lines[:-1] if not lines[-1] else lines
    vocab = {line.rstrip("\r"): i for i, line in enumerate(lines)}
    unknown = _content(config.get("unk_token")) or "[UNK]"
    tokenizer = package.Tokenizer(package.models.WordPiece(vocab, unk_token=unknown))
    tokenizer.normalizer = package.normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"), lowercase=config.get("do_lower_case", True),
    )  # fmt: skip
    tokenizer.pre_tokenizer = package.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = package.decoders.WordPiece(prefix="##")
    return tokenizer, "bert"


def _add_tokens(package, folder, tokenizer, names, config, added):
    """Makes the special tokens ones that are found in a text before it is split."""
    tokens = {}
    for name, token in names.items():
        # One that has several names is found as its last one is.
        tokens[token] = dict(special=True, **_ways(config.get(name)))
    for token in _more(config):
        tokens.setdefault(_content(token), dict(special=True, **_ways(token)))
    tokens |= {name: dict(special=False, normalized=True) for name in added if name not in tokens}
    ids = dict(added)
    for number, entry in (config.get("added_tokens_decoder") or {}).items():
        ids[entry["content"]] = int(number)
        tokens[entry["content"]] = {k: v for k, v in entry.items() if k not in ("content", "__type")}
    # Those that are not in the vocabulary have their ids by the order in which they are added.
    for name in sorted(tokens, key=lambda name: ids.get(name, -1)):
        tokenizer.add_tokens([package.AddedToken(name, **tokens[name])])
    _check_ids(folder, ids, {name: tokenizer.token_to_id(name) for name in ids})


def _ways(token):
    return {name: token[name] for name in WAYS if name in token} if isinstance(token, dict) else {}


def _surround(package, tokenizer, names, config, kind):
    """Sets the tokens that begin and end a text."""
    first, last = names.get("bos_token"), names.get("eos_token")
    if kind == "bert":
        first, last = names.get("cls_token"), names.get("sep_token")
    elif kind == "gpt2":
        first, last = first if config.get("add_bos_token") else None, last if config.get("add_eos_token") else None
    around = [token for token in (first, last) if token is not None]
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(around)]
    single = [*([first] if first is not None else []), "$A", *([last] if last is not None else [])]
    if special:
        tokenizer.post_processor = package.processors.TemplateProcessing(single=single, special_tokens=special)


def _of_package(tokenizer, names, config):
    # What is put around a text is what comes with one and is none of its own.
    probe = tokenizer.encode("a")
    own = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
    first, last = (own[0], own[-1] + 1) if own else (len(probe.ids), len(probe.ids))
    ending = getattr(tokenizer.model, "end_of_word_suffix", None)

    def encode(texts):
        return [found.ids for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(ids, skip_special=True):
        text = tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)
        return text.replace(ending, " ").strip() if ending else text

    ids = {name: tokenizer.token_to_id(token) for name, token in names.items()}
    prefix, suffix = tuple(probe.ids[:first]), tuple(probe.ids[last:])
    return _tokenizer(encode, decode, prefix, suffix, ids, tokenizer.get_vocab_size(), config)


def _tokenizer(encode, decode, prefix, suffix, ids, size, config):
    longest = config.get("model_max_length", config.get("max_len"))
    return Tokenizer(
        encode, decode, prefix, suffix,
        bos=ids.get("bos_token", ids.get("cls_token")),
        eos=ids.get("eos_token", ids.get("sep_token")),
        pad=ids.get("pad_token"),
        unk=ids.get("unk_token"),
        size=size,
        max_length=int(longest) if longest is not None and longest < ENDLESS else None,
        pad_left=config.get("padding_side") == "left",
        cut_left=config.get("truncation_side") == "left",
    )  # fmt: skip


def _sentencepiece(package, path, config, added):
    """T5 (unigrams: Kudo 2018, arXiv:1804.10959), whose sentinels `<extra_id_0>`, ... have the last ids, backwards."""
    try:
        model = package.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: no model of sentencepiece: {str(error)[:200]}") from error
    names, more = _names(config, "t5"), [_content(token) for token in _more(config)]
    count = sum(token.startswith("<extra_id_") for token in more) or config.get("extra_ids", 100)
    sentinels = [f"<extra_id_{i}>" for i in range(count)]
    ids = {model.id_to_piece(i): i for i in range(len(model))}
    entries = config.get("added_tokens_decoder") or {}
    for entry in entries.values():
        if entry.get("single_word"):
            raise ValueError(f"{path}: single_word=True of {entry['content']!r} is not supported; supported: False")
    told = added | {entry["content"]: int(number) for number, entry in entries.items()}
    for token in (*reversed(sentinels), *sorted(told, key=told.get), *names.values(), *more):
        ids.setdefault(token, len(ids))
    _check_ids(path.parent, told, ids)
    special = {*names.values(), *sentinels, *more, *(e["content"] for e in entries.values() if e.get("special"))}
    # Added tokens in a text are themselves, the longest first where several fit.
    found = {token: ids[token] for token in special | told.keys() if token}
    tokens = {i: token for token, i in found.items()}
    regex = re.compile("(" + "|".join(map(re.escape, sorted(found, key=len, reverse=True))) + ")")

    def encode(texts):
        parts = [[part for part in regex.split(text) if part] for text in texts]
        return [[i for p in row for i in ([found[p]] if p in found else model.encode(p))] for row in parts]

    def decode(ids, skip_special=True):
        parts: list[Any] = []
        for i in map(int, ids):
            if i in tokens:
                parts += [] if skip_special and tokens[i] in special else [tokens[i]]
            elif parts and isinstance(parts[-1], list):
                parts[-1].append(i)
            else:
                parts.append([i])
        return " ".join(part if isinstance(part, str) else model.decode(part) for part in parts)

    named = {name: ids[token] for name, token in names.items()}
    suffix = (named["eos_token"],) if "eos_token" in named else ()
    return _tokenizer(encode, decode, (), suffix, named, len(ids), config)


def _check_ids(folder, told, ids):
    """Raises `ValueError` for a token whose id in one file is not that of the others."""
    for token, number in told.items():
        if ids[token] != number:
            raise ValueError(
                f"{folder}: token {token!r} has the id {number} in one file, and {ids[token]} in the others"
            )


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > LONGEST_JSON:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are too many for a vocabulary or settings")
    try:
        value = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
