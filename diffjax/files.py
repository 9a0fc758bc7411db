"""Files that are whole or not there, and folders that one process uses at a time; the standard library only."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Callable, Iterator
from typing import IO


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
