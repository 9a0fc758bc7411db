"""What goes wrong with checkpoints."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or one that exists and cannot be read; the message says what to do."""


class Damaged(Exception):
    """One checkpoint fails its own checks; the one before it may do."""
