"""JSON that comes from outside: nothing in it is taken that two readers could take differently."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from diffjax.convert.weights.errors import WeightsError

LONGEST_JSON = 20_000_000
DEEPEST = 64  # values inside one another; more would end in an error of Python's stack somewhere else
LONGEST_NUMBER = 20  # digits: of 2**64 - 1


def parse(text: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
      ValueError: for what is no JSON; NaN, infinities and what is rounded to them; integers of more than 20 digits, or
        -0; a name that an object has twice; text with half of a surrogate pair; more than 64 values inside one another.
    """
    try:
        whole = json.loads(text.decode(), **HOOKS)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [whole]
    for _ in range(DEEPEST):
        for value in level:
            if isinstance(value, str):
                value.encode()
        inside = (value.values() if isinstance(value, dict) else value for value in level if _holds(value))
        level = [value for values in inside for value in values]
    if level:
        raise ValueError("it is nested too deeply")
    return whole


def shown(value: Any) -> str:
    """A value for an error message, at most a line whatever came."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring = 2, 200
    return short.repr(value)


def _holds(value):
    return isinstance(value, dict | list)


def _object(pairs):
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"it has the name {shown(twice)} twice")
    for name in out:
        name.encode()
    return out


def _integer(text):
    if len(text) > LONGEST_NUMBER or text == "-0":
        raise ValueError(f"the number {text[:LONGEST_NUMBER]} has {len(text)} digits" if text != "-0" else "-0")
    return int(text)


def _number(text):
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:LONGEST_NUMBER]} is too large")
    return value


def _constant(text):
    raise ValueError(f"{text} is no JSON")


HOOKS = dict(object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; raises `WeightsError` for anything else."""
    if path.stat().st_size > LONGEST_JSON:
        raise WeightsError(f"{path}: {path.stat().st_size} bytes are too many for a file of settings")
    return parse_object(path.read_bytes(), str(path))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object; raises `WeightsError`, which begins with `where`, for anything else."""
    try:
        value = parse(text)
    except ValueError as error:
        raise WeightsError(f"{where}: no JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
