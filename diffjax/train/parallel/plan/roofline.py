"""How long a planned step takes at least, from what the makers of accelerators state."""

from __future__ import annotations

from typing import NamedTuple

from diffjax.train.parallel.accelerators import Accelerator
from diffjax.train.parallel.plan.plan import Plan

COMPUTE_SHARE, MEMORY_SHARE, LINK_SHARE = 0.5, 0.8, 0.8
# One 400 Gbit/s adapter a GPU, as in NVIDIA's DGX H100 and H200 data sheets.
NETWORK = 50e9


class Estimate(NamedTuple):
    """A roofline of a plan: what a step takes at least on accelerators of one kind, in seconds.

    Attributes:
      compute: of the hardware FLOPs at `COMPUTE_SHARE` of the peak.
      memory: to read and write the state once, and write and read gradients and activations, at `MEMORY_SHARE` of the
        memory's bandwidth.
      link: to send what the collectives send over rings, one after another, at `LINK_SHARE` of the bandwidth of the
        links; of `NETWORK` where a group reaches beyond the devices that the links join.
      fits: whether `Plan.needed` is within the memory.
    """

    compute: float
    memory: float
    link: float
    fits: bool

    @property
    def step(self) -> float:
        """The largest of the three: everything else hides behind it."""
        return max(self.compute, self.memory, self.link)

    @property
    def bound(self) -> str:
        """What the largest is."""
        return max(("compute", "memory", "link"), key=lambda name: getattr(self, name))


def estimate(plan: Plan, accelerator: Accelerator) -> Estimate:
    """The `Estimate` of a plan on accelerators of one kind."""
    held = {name: size for name, size in plan.state.items() if name != "gradients"}
    moved = 2 * sum(held.values()) + 2 * plan.state["gradients"] + 2 * plan.activations
    link = 0.0
    for row in plan.collectives:
        near = row.spread <= accelerator.domain
        link += row.sent() / (LINK_SHARE * (accelerator.link_bandwidth if near else NETWORK))
    return Estimate(
        compute=plan.flops.hardware / plan.devices / (COMPUTE_SHARE * accelerator.peak_flops),
        memory=moved / (MEMORY_SHARE * accelerator.hbm_bandwidth),
        link=link,
        fits=plan.needed() <= accelerator.hbm,
    )
