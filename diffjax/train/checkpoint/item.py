"""The arrays of a state as an item of an Orbax checkpoint: written by every process, in the background."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from diffjax.train.checkpoint import blocks


class BlocksHandler(ocp.handlers.AsyncCheckpointHandler):
    """What Orbax asks for: hands out a future that is done when this process's blocks are on disk."""

    async def async_save(self, directory, args: BlocksSave):
        staged, process, processes = args.staged, jax.process_index(), jax.process_count()

        async def commit():
            blocks.write(Path(directory), staged, process, processes)

        return [ocp.future.CommitFutureAwaitingContractedSignals(commit(), name=f"blocks_{process}")]

    def save(self, directory, args: BlocksSave):
        blocks.write(Path(directory), args.staged, jax.process_index(), jax.process_count())

    def restore(self, directory, args=None):
        raise NotImplementedError("read with diffjax.train.checkpoint.open_checkpoints(...).restore")


# Orbax wants a class for restoring as well; no restore is ever asked of it.
@ocp.args.register_with_handler(BlocksHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class BlocksSave(ocp.args.CheckpointArgs):
    """Argument of a save: the staged blocks of this process."""

    staged: blocks.Staged
