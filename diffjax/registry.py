"""From a name in a config to an object: `"karras(rho=7)"`, or a user's own `"my_pkg.module:fn(arg=1)"`.

Arguments are Python literals only, read with `ast`; nothing in a config is ever evaluated as code.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """` did you mean 'x'?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def parse(spec: str) -> tuple[str, tuple, dict[str, Any]]:
    """Splits `"name(1, arg=2)"` or `"pkg.module:name(arg=2)"` into the name, positional and keyword arguments.

    Raises:
      ValueError: if the text is not of that form or an argument is not a literal.
    """
    form = f"{spec!r}: expected 'name', 'name(arg=1)' or 'package.module:name(arg=1)'"
    name, paren, rest = spec.strip().partition("(")
    name = name.strip()
    if not all(part.isidentifier() for part in name.replace(":", ".", 1).split(".")):
        raise ValueError(form)
    if not paren:
        return name, (), {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
    except SyntaxError:
        raise ValueError(form) from None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "f"):
        raise ValueError(form)
    if any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(form)
    try:
        args = tuple(ast.literal_eval(arg) for arg in call.args)
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except ValueError:
        raise ValueError(f"{spec!r}: arguments must be literals (numbers, strings, tuples, True, None)") from None
    return name, args, kwargs


def lookup(name: str, known: Mapping[str, Callable], kind: str) -> Callable:
    """The callable that `name` stands for: one of `known`, or `"package.module:attribute"` imported.

    Raises:
      ValueError: for an unknown name (the message lists the known ones and the nearest) or a failed import.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import {kind} {name!r}: {error}; is its package on the Python path?") from error
    if name not in known:
        hint = nearest(name, known)
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(sorted(known))}, or 'package.module:fn'{hint}")
    return known[name]


def build(spec: str | Mapping, known: Mapping[str, Callable], kind: str, **extra) -> Any:
    """Calls what `spec` names with the arguments that it gives, and with those of `extra` that it has a parameter for.

    Args:
      spec: `"name(arg=1)"`, `"package.module:fn(arg=1)"`, or a mapping with `name` and the keyword arguments.
      known: the names of the library for this kind of thing.
      kind: what it is, for messages: `"schedule"`, `"solver"`, ...
      extra: what the caller offers (a schedule, the shape of the data); each only for a parameter of that name.

    Raises:
      ValueError: for a malformed spec, an unknown name, or arguments that the callable does not take.
    """
    if isinstance(spec, str):
        name, args, kwargs = parse(spec)
    else:
        kwargs = dict(spec)
        name, args = kwargs.pop("name"), ()
    fn = lookup(name, known, kind)
    signature = inspect.signature(fn)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    extra = {k: v for k, v in extra.items() if (open_ended or k in signature.parameters) and k not in kwargs}
    try:
        signature.bind(*args, **kwargs, **extra)
    except TypeError as error:
        allowed = [p for p in signature.parameters if p not in extra]
        unknown = [k for k in kwargs if k not in signature.parameters]
        hint = nearest(unknown[0], allowed) if unknown else ""
        raise ValueError(f"{kind} {name!r}: {error}; arguments: {', '.join(allowed) or 'none'}{hint}") from None
    return fn(*args, **kwargs, **extra)
