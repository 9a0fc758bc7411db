"""What a run would take on a mesh that no machine at hand has: the step is compiled for that many pretended devices.

    plan(config, "data=1,fsdp=8", sharding="fsdp")

The devices are CPU devices of another process, in which nothing is allocated: the program is partitioned by the same
code as for accelerators, and read.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

from ml_collections import ConfigDict

from diffjax.train import checks
from diffjax.train import config as configs
from diffjax.train.errors import ConfigError
from diffjax.train.parallel.flops import Flops
from diffjax.train.parallel.plan.hlo import Collective

MOST_DEVICES = 512
_FLAGS = (
    "--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_dump_to={folder} --xla_dump_hlo_pass_re=spmd-partitioning"
)


class Plan(NamedTuple):
    """One training step on a mesh. Bytes are per device, on the one that holds most.

    Attributes:
      mesh: size of each axis.
      sharding: as in the config.
      batch_size: rows of the whole batch.
      rows: rows that a device works on at once.
      dtype: in which the network computes.
      parameters: how many there are.
      state: bytes of "parameters", "gradients", "optimiser" and "averages".
      activations: bytes kept for the backward pass by estimate: what JAX's differentiation keeps, split over all
        devices, in the network's own dtypes.
      temporary: bytes of temporary memory in the program compiled for CPU, which computes bfloat16 in float32 and has
        no fused attention.
      flops: operations of the whole step, on all devices together.
      collectives: what a step exchanges.
      seconds: what the compilation took.
    """

    mesh: dict[str, int]
    sharding: str
    batch_size: int
    rows: int
    dtype: str
    parameters: int
    state: dict[str, float]
    activations: float
    temporary: float
    flops: Flops
    collectives: tuple[Collective, ...]
    seconds: float

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    def needed(self) -> float:
        """Bytes on a device: the state, the gradients and the activations."""
        return sum(self.state.values()) + self.activations


def plan(config: ConfigDict, mesh: str, *, sharding: str | None = None) -> Plan:
    """The `Plan` of one step of the config on a mesh.

    Args:
      config: as for `diffjax.train.loop.train`.
      mesh: such as "data=4,fsdp=64"; at most 512 devices, all sizes given.
      sharding: "data", "fsdp" or "rules"; None for the config's own.

    Raises:
      ConfigError: for a mesh or a config that cannot run, or that cannot be compiled here; the message says why.
    """
    from diffjax.train.parallel.sharding import parse_mesh

    given = f"--mesh={mesh}: "
    try:
        axes = parse_mesh(mesh) or {}
    except ValueError as error:
        raise ConfigError(f"{given}{error}") from error
    devices = math.prod(axes.values())
    if not axes or min(axes.values()) < 1 or devices > MOST_DEVICES:
        raise ConfigError(
            f"{given}a plan needs the size of every axis, at most {MOST_DEVICES} devices together, as in "
            "--mesh='data=4,fsdp=64'"
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh = mesh
        config.sharding = sharding or config.get("sharding", "data")
        if config.get("accumulate_loop", "auto") == "auto":
            # On the CPU that compiles here it would be unrolled, as on no accelerator.
            config.accumulate_loop = "scan"
    checks.check_axis_names(axes, given)
    checks.check_batch(configs.fill(config), axes)
    with tempfile.TemporaryDirectory(prefix="diffjax-plan-") as folder:
        job = {"config": configs.to_json(config), "folder": folder, "devices": devices}
        done = subprocess.run(
            [sys.executable, "-m", "diffjax.train.parallel.plan.measure"],
            input=json.dumps(job), capture_output=True, text=True, env=_environment(folder, devices),
        )  # fmt: skip
        try:
            answer = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            why = _why(done.returncode, done.stderr)
            raise ConfigError(f"{given}the step cannot be compiled for {devices} devices: {why}") from None
    if "error" in answer:
        raise ConfigError(answer["error"])
    return Plan(**answer | {"flops": Flops(*answer["flops"])} | {"collectives": _rows(answer)})


def _rows(answer) -> tuple[Collective, ...]:
    return tuple(Collective(*row) for row in answer["collectives"])


def _why(code: int, stderr: str) -> str:
    """Why the process that compiles gave no answer: the signal that ended it, else the error that it ended with."""
    if code < 0:
        return (
            f"the process that compiles was ended by {signal.Signals(-code).name}, as where memory runs out; plan on "
            "a machine with more, or for fewer devices"
        )
    _, frame, rest = stderr.rpartition('\n  File "')
    # After the last frame, its line of code and the marks below that comes the error.
    words = re.sub(r"\A.*(\n[ \t].*)*\n", "", rest).split()[:60] if frame else stderr.split()[-60:]
    return " ".join(words) or f"exit code {code}, and no message"


def _environment(folder: str, devices: int) -> dict[str, str]:
    flags = _FLAGS.format(folder=folder, devices=devices)
    # A user's own modules, named in the config, are found from where this process finds them.
    return os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # Else notes of JAX about its frames follow the text of an error.
        "JAX_TRACEBACK_FILTERING": "off",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
