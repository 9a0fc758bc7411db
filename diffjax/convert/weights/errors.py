"""What goes wrong with files of weights, and how it is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

LONGEST = 2000  # characters of a message: what a file holds may be megabytes


class WeightsError(ValueError):
    """A file of weights that cannot be read, or does not hold the parameters of its network."""


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Puts the path before what is wrong with what it holds, of which it tells no more than can be read."""
    try:
        yield
    except ValueError as error:
        told = str(error)
        if told.startswith(str(path)):
            raise
        raise WeightsError(f"{path}: {told if len(told) <= LONGEST else told[:LONGEST] + '...'}") from error


def some(names: Iterable, most: int = 5) -> str:
    """The first of the names, for a message, on one line."""
    names = [printable(str(name)) for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if len(name) <= 200 else name[:200] + "..." for name in names[:most]) + rest


def printable(text: str) -> str:
    """A text with what a terminal would act upon, or not show, as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
