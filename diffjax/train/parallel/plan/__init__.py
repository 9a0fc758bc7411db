"""Plans of runs for meshes that no machine at hand has."""

from diffjax.train.parallel.plan.plan import Plan, plan
from diffjax.train.parallel.plan.roofline import Estimate, estimate
from diffjax.train.parallel.plan.text import plan_text

__all__ = ["Estimate", "Plan", "estimate", "plan", "plan_text"]
