"""The text of a grid: `"optim.lr=[1e-4, 3e-4]; model.depth=[6, 12] & model.width=[64, 128]"`."""

from __future__ import annotations

import ast
import itertools
from typing import Any

FORM = "expected KEY=[A, B], several of them joined by ';' (every combination) or '&' (that change together)"


def parse_grid(text: str) -> list[dict[str, str]]:
    """Every combination as `{config key: text of its value}`, the last group of the grid changing fastest.

    Groups are separated by `;` and multiplied with each other. Keys joined by `&` form one group and take their values
    together, first with first. Values are what `--config.KEY=VALUE` takes: numbers, tuples, `name(arg=1)`; quotes
    around one are taken off. An empty text has one combination, of no keys.

    Raises:
      ValueError: for text of another form, a key that comes twice, no value, or joined keys of different lengths.
    """
    groups, seen = [], set()
    for group in split(text, ";"):
        columns = dict(_axis(part) for part in split(group, "&"))
        parts = [part.partition("=")[0].strip() for part in split(group, "&")]
        twice = sorted({key for key in parts if parts.count(key) > 1} | (seen & set(parts)))
        if twice:
            raise ValueError(f"grid: {', '.join(twice)} comes twice in {text!r}; give each key once")
        seen |= set(parts)
        lengths = {key: len(values) for key, values in columns.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{key} has {n}" for key, n in lengths.items())
            raise ValueError(f"grid: keys joined by '&' need equally many values, but {counts}")
        groups.append([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*groups)]


def options_of(text: str) -> dict[str, Any]:
    """`{name: value}` of `"slurm_partition=gpu; timeout_min=60"`: Python literals, and strings where they are none.

    Raises:
      ValueError: for a part without a name and a value.
    """
    found = {}
    for part in split(text, ";"):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            raise ValueError(f"options: {part!r}; expected NAME=VALUE, several of them joined by ';'")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def split(text: str, separator: str) -> list[str]:
    """`text` cut at every separator outside brackets and quotes, stripped, without empty parts."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
        if char == separator and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


def _axis(part: str) -> tuple[str, list[str]]:
    key, equals, values = (piece.strip() for piece in part.partition("="))
    if not equals or not key or values[:1] != "[" or values[-1:] != "]":
        raise ValueError(f"grid: {part!r}; {FORM}")
    items = [_unquoted(item) for item in split(values[1:-1], ",")]
    if not items:
        raise ValueError(f"grid: {part!r} has no value; {FORM}")
    return key, items


def _unquoted(item: str) -> str:
    if item[:1] not in "\"'":
        return item
    try:
        return str(ast.literal_eval(item))
    except (ValueError, SyntaxError):
        raise ValueError(f"grid: {item} is no string: its quotes do not match") from None
