"""Checkpoints that a crash cannot lose: written in the background, every block verified when it is read.

One checkpoint is one folder `<directory>/<step>/`, complete or absent: it is written under another name and renamed
when every process has written its part. `state/` holds the arrays (`blocks`), `meta/` one JSON file with everything
else. Format 1, whole leaves in Orbax's array format, is read as well.
"""

from diffjax.train.checkpoint.errors import CheckpointError
from diffjax.train.checkpoint.folder import Checkpoints, open_checkpoints
from diffjax.train.checkpoint.meta import versions
from diffjax.train.checkpoint.params import read_params

__all__ = ["CheckpointError", "Checkpoints", "open_checkpoints", "read_params", "versions"]
