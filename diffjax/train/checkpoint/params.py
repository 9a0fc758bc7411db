"""The parameters of a run alone, for whoever starts from them."""

from __future__ import annotations

from pathlib import Path

from diffjax.train.checkpoint.errors import CheckpointError
from diffjax.train.checkpoint.folder import open_checkpoints

# The folder of a run's checkpoints in its workdir, and what the parameters as trained are called among the averages.
CHECKPOINTS, RAW = "checkpoints", "raw"


def read_params(workdir: str | Path, which: str = RAW, step: int | None = None) -> tuple[int, dict]:
    """`(step, params)` of a run: its parameters, or an average of them, as nested dicts of arrays; reads nothing else.

    Args:
      workdir: the folder of the run, or its folder of checkpoints.
      which: `"raw"` for the parameters as trained, or the spec of an average, such as `"power(std=0.1)"`.
      step: which checkpoint; default the newest that can be read.

    Raises:
      CheckpointError: if there is no checkpoint, or none that can be read.
      ValueError: if the run keeps no such average; lists what is there.
    """
    folder = Path(workdir)
    folder = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    found = open_checkpoints(folder).restore_part("params" if which == RAW else f"ema/{which}", step)
    if found is None:
        raise CheckpointError(f"{str(workdir)!r} holds no checkpoint; give the folder of a run that has saved one")
    return found
