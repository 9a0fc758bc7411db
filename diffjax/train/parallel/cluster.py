"""Which processes make up a run: found from flags, `DIFFJAX_*` variables, SLURM, Open MPI or a TPU pod.

Reads variables and nothing else; joining is `diffjax.train.parallel.processes`. Where JAX finds something itself (the
coordinator of a SLURM or Open MPI job, everything about a TPU pod), it is left to JAX.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
from collections.abc import Mapping
from typing import NamedTuple

from diffjax.train.errors import ConfigError

log = logging.getLogger(__name__)

FLAGS = ("coordinator", "num_processes", "process_id")
AUTO = "auto"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# One variable of each says which devices a launcher has given to this process alone.
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


class Cluster(NamedTuple):
    """The processes of a run, as `jax.distributed.initialize` takes them.

    Attributes:
      found: what said so, for messages.
      coordinator: `HOST:PORT` of process 0; None leaves it to JAX.
      count: number of processes; None leaves it to JAX.
      index: this one, from 0; None leaves it to JAX.
      devices: local devices of this process; empty for all of them, None leaves it to JAX.
    """

    found: str
    coordinator: str | None
    count: int | None
    index: int | None
    devices: tuple[int, ...] | None = ()


def find(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    joins: bool = True,
) -> Cluster | None:
    """The cluster that this process belongs to; None where it is alone.

    Flags come first, then `DIFFJAX_COORDINATOR`, `DIFFJAX_NUM_PROCESSES` and `DIFFJAX_PROCESS_ID`, then what a launcher
    says. A flag that is given replaces that part of what a launcher says.

    Args:
      environ: `os.environ`, or what stands for it.
      coordinator: `HOST:PORT`; `"auto"` leaves everything that is not given to JAX, which also knows Kubernetes.
      num_processes: how many.
      process_id: which one this is.
      joins: whether the processes are to be joined, which takes a coordinator.

    Raises:
      ConfigError: for what cannot work: a part that is missing, no number, or out of range.
    """
    given = _given(environ, coordinator, num_processes, process_id)
    cluster = _slurm(environ) or _open_mpi(environ) or _tpu(environ)
    if given.coordinator == AUTO:
        cluster = Cluster("JAX's own detection", None, given.count, given.index, None)
    elif given.found:
        parts = {name: value for name, value in given._asdict().items() if value is not None}
        parts["found"] += f" over {cluster.found}" if cluster else ""
        cluster = (cluster or given._replace(devices=()))._replace(**parts)
    if cluster is None or (cluster.count == 1 and not cluster.index):
        return None
    _check(cluster, joins)
    if ids := environ.get("JAX_LOCAL_DEVICE_IDS"):
        cluster = cluster._replace(devices=tuple(_number("JAX_LOCAL_DEVICE_IDS", item) for item in ids.split(",")))
    return cluster


def _given(environ, coordinator, num_processes, process_id) -> Cluster:
    """What flags and `DIFFJAX_*` variables say; None where they say nothing."""
    flags = dict(zip(FLAGS, (coordinator, num_processes, process_id), strict=True))
    values, sources = {}, []
    for name, value in flags.items():
        variable = f"DIFFJAX_{name.upper()}"
        if value is not None:
            sources.append(f"--{name}")
        elif value := environ.get(variable) or None:
            sources.append(variable)
            value = value if name == "coordinator" else _number(variable, value)
        values[name] = value
    return Cluster(", ".join(sources), values["coordinator"], values["num_processes"], values["process_id"], None)


def _slurm(environ) -> Cluster | None:
    if not all(name in environ for name in _SLURM):
        if environ.get("SLURM_NTASKS", "1") not in ("", "1") and "SLURM_STEP_NODELIST" not in environ:
            log.warning(
                "SLURM_NTASKS=%s, and this process was not started by srun: it runs alone; start one with "
                "`srun diffjax ...` for a run of all tasks",
                environ["SLURM_NTASKS"],
            )
        return None
    # An allocation may be larger than the step that srun started in it.
    count = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    index, local = (_number(name, environ[name]) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    here = _tasks_here(environ)
    devices = _devices(environ, local, here, _gpus_per_task(environ))
    return Cluster("SLURM", None, _number(count, environ[count]), index, devices)


def _gpus_per_task(environ) -> int:
    """The number in `SLURM_GPUS_PER_TASK` (`2`, `a100:2` or `a100:1,h100:1`), which srun binds each task to; else 1.

    `SLURM_GPUS_ON_NODE` may be that of the job around the step, and `SLURM_STEP_GPUS` lists what is visible.
    """
    counts = (item.rpartition(":")[2] for item in environ.get("SLURM_GPUS_PER_TASK", "").split(","))
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


def _tasks_here(environ) -> int:
    """Tasks on this node, from `SLURM_STEP_TASKS_PER_NODE`, such as `4(x2),3`: four on two nodes each, then three."""
    counts: list[int] = []
    for item in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        each, _, repeat = item.rstrip(")").partition("(x")
        if each.isdecimal():
            counts += [int(each)] * (int(repeat) if repeat.isdecimal() else 1)
    node = environ.get("SLURM_NODEID", "0")
    node = int(node) if node.isdecimal() else 0
    return counts[node] if node < len(counts) else 1


def _open_mpi(environ) -> Cluster | None:
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    if not all(name in environ for name in names):
        return None
    count, index = (_number(name, environ[name]) for name in names)
    local = _number("OMPI_COMM_WORLD_LOCAL_RANK", environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
    here = _number("OMPI_COMM_WORLD_LOCAL_SIZE", environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    # Open MPI 5 does not say where its launcher runs, which is how JAX finds the coordinator.
    found = "Open MPI" if "OMPI_MCA_orte_hnp_uri" in environ else "Open MPI 5"
    return Cluster(found, None, count, index, _devices(environ, local, here))


def _tpu(environ) -> Cluster | None:
    """A TPU host, where JAX finds the rest; its platform can be turned off by `JAX_PLATFORMS`."""
    platforms = environ.get("JAX_PLATFORMS") or "tpu"
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    if "tpu" not in platforms or not chips or importlib.util.find_spec("libtpu") is None:
        return None
    return Cluster("TPU", None, None, None, None)


def _devices(environ, local: int, here: int, each: int = 1) -> tuple[int, ...]:
    """The devices of one of `here` processes on a machine: its own, or all that it can see where it is alone there or
    the launcher, which gives `each` to a process, has already hidden those of the others."""
    visible = next((environ[name] for name in _VISIBLE if environ.get(name)), "")
    bound = bool(visible) and len(visible.split(",")) <= each
    return () if here == 1 or bound else (local,)


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r}: expected a whole number; unset it, or give the right one") from None


def _check(cluster: Cluster, joins: bool) -> None:
    """Raises `ConfigError` for a cluster that cannot start, or, where none is joined, does not say who is who."""
    found, coordinator, count, index, _ = cluster
    if count is not None and count < 1:
        raise ConfigError(f"{found}: {count} processes; expected at least 1")
    if index is not None and count is not None and not 0 <= index < count:
        raise ConfigError(f"{found}: process id {index} of {count} processes; ids go from 0 to {count - 1}")
    if coordinator is not None and coordinator != AUTO:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"{found}: coordinator {coordinator!r}; expected HOST:PORT of process 0, as node0:12345")
    if joins and found == "Open MPI 5" and coordinator is None:
        raise ConfigError(
            "Open MPI 5 does not say where process 0 runs; add --coordinator=HOST:PORT of process 0 (any free port)"
        )
    launched = any(name in found for name in ("SLURM", "Open MPI", "TPU", "JAX's"))
    needed = list(zip(FLAGS, ("HOST:PORT", "N", "I"), cluster[1:4], strict=True))[not joins :]
    missing = [f"--{name}" for name, _, part in needed if part is None]
    if missing and not launched:
        *flags, last = (f"--{name}={value}" for name, value, _ in needed)
        raise ConfigError(
            f"several processes need {', '.join(flags)} and {last} (or DIFFJAX_* variables of those names); "
            f"given: {found or 'nothing'}; missing: {', '.join(missing)}"
        )
