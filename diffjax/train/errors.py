"""What stops a training, for callers that catch it; imports nothing."""

# Exit code of a run that was interrupted and goes on when it is started again: EX_TEMPFAIL of sysexits.h.
RESUME = 75


class ConfigError(ValueError):
    """A config that cannot run: one sentence with what is wrong, what was given, what is allowed and what to do."""


class NonFiniteError(RuntimeError):
    """The loss, the gradient or the parameters became infinite or NaN; nothing from that step on was saved."""


class WorkdirError(RuntimeError):
    """A folder cannot be used: another process has it (a training, a sweep, a sampling), or it cannot be written to.

    It is a file, for instance, or gone, or its disk is full.
    """
