"""Files that are whole or not there, logs that outlive a crash, and folders that one process uses at a time; the
standard library only."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from typing import IO, Any

log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "w", *, tag: str | None = None) -> Iterator[IO]:
    """A file to write, which takes the place of `path` in one move when the block ends well.

    A reader never sees half of it: before the move the content is on the disk, under a name of its own beside `path`,
    and after an error `path` is what it was and the other file is gone.

    Args:
      path: what to write.
      mode: `"w"` for text, which is UTF-8, or `"wb"`.
      tag: tells the unfinished file, `PATH.TAG.part`, from that of another writer; default the machine and the number
        of the process. A process that is killed leaves it behind; where a lock lets in one writer at a time, give a
        tag, and the next one takes it over.

    Raises:
      OSError: disk full, folder gone or read-only.
    """
    unfinished = f"{os.fspath(path)}.{tag or f'{platform.node()}-{os.getpid()}'}.part"
    try:
        with open(unfinished, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise


def write_text(path: str | os.PathLike, text: str, *, tag: str | None = None) -> None:
    """Writes a text file with `replacing`."""
    with replacing(path, tag=tag) as file:
        file.write(text)


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a log such as `metrics.jsonl` in order: one JSON object with an integer `step` a line.

    Other lines, as a power cut or a bad disk leaves them, are left out, and a warning names them; a last line that was
    cut short is left out without one, as every kill may leave it.

    Raises:
      OSError: if there is no such file, or it cannot be read.
    """
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    rows = [_row(line) for line in lines]
    # What follows the last line break is the cut line, or nothing.
    damaged = [str(number) for number, row in enumerate(rows[:-1], 1) if row is None and lines[number - 1].strip()]
    if damaged:
        shown = ", ".join(damaged[:8]) + (f" and {len(damaged) - 8} more" if damaged[8:] else "")
        log.warning("%s: left out what is no JSON object with a step, line %s", os.fspath(path), shown)
    return [row for row in rows if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


@contextlib.contextmanager
def locked(path: str | os.PathLike, refusal: Callable[[str], Exception]) -> Iterator[None]:
    """Holds the lock that the file `path` stands for; the system drops it when the process ends, however it ends.

    Args:
      path: made if absent; it names its owner, such as `4711 on node3`.
      refusal: from the owner to the error to raise where another process holds the lock.

    Raises:
      OSError: if the file cannot be made, or its file system has no locks.
      what `refusal` returns, if another process holds it.
    """
    # POSIX alone has it, and samplers, which need files only, are imported elsewhere as well.
    import fcntl

    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            file.seek(0)
            raise refusal(file.read().strip() or "unknown") from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        yield
