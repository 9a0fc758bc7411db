"""A bar that counts bytes, on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def progress_bar(what: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """A bar with this heading while the block lasts; gives `progress(done, total)`, in bytes."""
    with tqdm(desc=what, unit="B", unit_scale=True, total=total, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
