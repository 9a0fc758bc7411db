"""Many runs of one config: a grid of settings and seeds, run one after another or on a cluster, compared in a table."""

from diffjax.sweep.grid import parse_grid
from diffjax.sweep.plan import Run, plan_runs
from diffjax.sweep.run import sweep

__all__ = ["Run", "parse_grid", "plan_runs", "sweep"]
