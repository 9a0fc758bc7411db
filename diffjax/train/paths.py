"""Names of the leaves of a pytree, and rule lists over them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def components(path: tuple) -> tuple[str, ...]:
    """The parts of a key path of `jax.tree_util`, as strings: dict keys, field names, indices."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def name(path: tuple) -> str:
    """A key path of `jax.tree_util` as `"a/b/c"`."""
    return "/".join(components(path))


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by name `"a/b/c"`, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: if two leaves have one name (keys `1` and `"1"`, or a key that contains `/`).
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if name(path) in leaves:
            raise ValueError(f"two leaves are named {name(path)!r}; rename one of the keys")
        leaves[name(path)] = leaf
    return leaves


def match(rules: Sequence[tuple[str, T]], names: Iterable[str], kind: str) -> dict[str, T]:
    """For each name the value of the first rule whose regex is found in it (`re.search`).

    Args:
      rules: `[(regex, value), ...]`; anchor with `^` and `$` where it matters, end with `(".*", value)` for the rest.
      names: leaf names `"a/b/c"`.
      kind: what the rules are, for messages: `"sharding"`, `"decay"`.

    Raises:
      ValueError: for a malformed regex, or if a name is covered by no rule; the message lists the uncovered names.
    """
    compiled = []
    for rule in rules:
        try:
            regex, value = rule
            compiled.append((re.compile(regex), value))
        except (re.error, TypeError, ValueError) as error:
            raise ValueError(f"{kind} rule {rule!r}: {error}; expected (regex, value)") from None
    found = {n: [value for regex, value in compiled if regex.search(n)] for n in names}
    uncovered = [n for n, values in found.items() if not values]
    if uncovered:
        raise ValueError(
            f"no {kind} rule covers {', '.join(uncovered)}; rules: {', '.join(repr(r) for r, _ in rules) or 'none'}; "
            "add a rule, or end the list with ('.*', ...)"
        )
    return {n: values[0] for n, values in found.items()}
