"""What a training step minimises beside the plain loss: each piece a value of the config's `loss` group."""

from diffjax.train.objectives.conditioning import OWN
from diffjax.train.objectives.objective import Objective, build_objective, network_of, row_loss, trained_schedule

__all__ = ["OWN", "Objective", "build_objective", "network_of", "row_loss", "trained_schedule"]
