"""What can go wrong while data is read."""

from __future__ import annotations

import errno


class Unreadable(OSError):
    """One item cannot be read: `Unreadable(name, reason)`. The pipeline replaces the item and counts it."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"cannot read {self.name}: {self.reason}"


class UnreadableError(OSError):
    """More items could not be read than the run allows; the message names them."""


class WorkerError(OSError):
    """A process that reads data ended without being asked to."""


def refuse_full_table(error: Exception) -> None:
    """Raises `OSError` if an error, met while an item was read, is too many open files: that is not about the item."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise OSError(error.errno, f"{error.strerror}; raise the limit (ulimit -n)", error.filename) from error


def require(module: str, package: str, extra: str = ""):
    """The imported `module`.

    Raises:
      ModuleNotFoundError: if it is not installed; the message says what to install.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"'diffjax[{extra}]'" if extra else package
        raise ModuleNotFoundError(
            f"this data needs {package}, which is not installed ({error}); pip install {what}"
        ) from error
