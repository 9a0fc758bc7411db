"""Joining the processes of a run, agreeing with them, and leaving them; or only telling which one this is.

The processes find each other through `jax.distributed`; everything else here is what a run wants besides: that all were
started alike, that a signal to one stops all at the same step, and that a process which ends takes the others along.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # The client of the coordination service has no public name; Orbax takes it from here.
from jax.sharding import Sharding

from diffjax.train.errors import ConfigError
from diffjax.train.parallel.cluster import Cluster, find
from diffjax.train.parallel.peers import STALL_S, Verdict, Watch, catch_abort, refused, release_abort
from diffjax.train.survival.signals import at_first, caught_signals, heard_at_once

JOIN_S = 300
MEET_S = 3600
# A network file system may show a new file late.
SHARED_S = 20
USAGE_ERROR = 2  # the exit code of `diffjax` for what was asked wrongly
# Later than our own limit, which names the process; this one is for what Python can no longer see.
_HEARTBEAT_S = 90
# At the end process 0 may still write a summary or draw samples while the others wait for it.
_SHUTDOWN_S = 3600


def join(cluster: Cluster | None, *, timeout_s: int = JOIN_S, stall_s: float = STALL_S) -> Watch | None:
    """Meets the other processes of the run and begins to watch them; None, and nothing done, where there are none.

    Must come before JAX has used a device.

    Args:
      cluster: from `diffjax.train.parallel.cluster.find`.
      timeout_s: how long to wait for the others.
      stall_s: as in `Watch`.

    Raises:
      ConfigError: if JAX cannot begin, as where the port is taken. Where the processes do not meet (nothing answers at
        the coordinator, one is missing, two have the same id) JAX aborts, and this ends the process with a message and
        code 2.
    """
    if cluster is None:
        return None
    _check_port(cluster)
    devices = None if cluster.devices is None else list(cluster.devices)
    start = time.monotonic()
    handler = catch_abort(lambda: _not_met(cluster, time.monotonic() - start, timeout_s), _end)
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.count,
            cluster.index,
            devices,
            initialization_timeout=timeout_s,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except Exception as error:
        raise ConfigError(f"{_who(cluster)} cannot join: {' '.join(str(error).split())}") from error
    finally:
        release_abort()
        del handler
    state = distributed.global_state
    if state.num_processes == 1:
        return None
    watch = Watch(state.client, state.coordinator_address, state.process_id, state.num_processes, stall_s)
    watch.start()
    return watch


def _check_port(cluster: Cluster) -> None:
    """Raises `ConfigError` if process 0 cannot listen where it should: some versions of JAX crash there."""
    if cluster.index != 0 or not cluster.coordinator or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    port = int(cluster.coordinator.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"{_who(cluster)} cannot listen on port {port} ({error}); wait until an earlier run has ended, or give "
                "another port in --coordinator"
            ) from error


def _who(cluster: Cluster) -> str:
    return f"process {cluster.index} of {cluster.count} ({cluster.found})" if cluster.count else cluster.found


def _not_met(cluster: Cluster, waited: float, timeout_s: int) -> Verdict:
    """Why JAX gave up joining; it says so only in a log line before its `abort()`."""
    where = distributed.global_state.coordinator_address
    error = refused(where)
    if error:
        why = f"nothing answers at the coordinator {where} ({error}); see that process 0 runs there, and open the port"
    elif waited >= timeout_s:
        why = f"not all processes came to {where} within {timeout_s} s; see that all were started and none has failed"
    else:
        why = f"the coordinator {where} turned it away; see that no two processes have the same id"
    return Verdict(USAGE_ERROR, f"{_who(cluster)} cannot join: {why}; --join_timeout=S waits longer")


def _end(verdict: Verdict) -> None:
    try:
        os.write(2, f"diffjax: {verdict.text}\n".encode())
    finally:
        os._exit(verdict.code)


def place(environ: Mapping[str, str], **flags) -> tuple[int, int]:
    """`(i, n)` of a process among those that a launcher (SLURM, Open MPI, `DIFFJAX_*`) or flags name; `(0, 1)` alone.

    Takes the accelerators that the launcher meant for it, so it must come before the first use of a device. Nothing
    joins the processes: none waits for another, and one that dies does not stop the others. On a TPU host it starts
    the chips, which know their place; those of a slice of several hosts start when all hosts do.

    Args:
      environ: of the process.
      **flags: `coordinator`, `num_processes` and `process_id`, as for `diffjax.train.parallel.cluster.find`.

    Raises:
      ConfigError: as `find`, and where only joining would tell, as with `coordinator="auto"`.
    """
    found = find(environ, joins=False, **flags)
    if found is None:
        return 0, 1
    if found.count is None or found.index is None:
        if "TPU" in found.found:
            return jax.process_index(), jax.process_count()
        raise ConfigError(
            f"{found.found} does not say which process this is, and none is joined here; give --num_processes=N and "
            "--process_id=I on each of them"
        )
    if found.devices:
        chosen = ",".join(map(str, found.devices))
        jax.config.update("jax_cuda_visible_devices", chosen)
        jax.config.update("jax_rocm_visible_devices", chosen)
    return found.index, found.count


def agree(name: str, facts: Mapping[str, Any], advice: str) -> None:
    """Returns when every process has come here with the same facts; does nothing for a single process.

    Args:
      name: of the occasion, for messages.
      facts: what must be the same everywhere; anything that `str` tells apart.
      advice: what to do if it is not.

    Raises:
      ConfigError: on every process, if one has other facts; names the first that differs and how.
    """
    client, index, count = distributed.global_state.client, jax_index(), jax_count()
    if client is None or count == 1:
        return
    mine = json.dumps({key: str(value) for key, value in facts.items()}, sort_keys=True)
    # A key can be set once, and a process may train more than once.
    call = client.key_value_increment(f"diffjax/agree/{name}/calls/{index}", 1)
    folder = f"diffjax/agree/{name}/{call}"
    client.key_value_set(f"{folder}/digest/{index}", hashlib.sha256(mine.encode()).hexdigest())
    client.key_value_set(f"{folder}/facts/{index}", mine)
    client.wait_at_barrier(f"{folder}/barrier", MEET_S * 1000)
    digests = {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get(f"{folder}/digest/")}
    other = next((i for i in sorted(digests) if digests[i] != digests[0]), None)
    if other is None:
        return
    texts = (client.blocking_key_value_get(f"{folder}/facts/{i}", 10_000) for i in (0, other))
    first, second = (json.loads(text) for text in texts)
    absent = "(not there)"
    keys = [key for key in sorted({**first, **second}) if first.get(key, absent) != second.get(key, absent)]
    shown = "; ".join(f"{key}: {first.get(key, absent)} | {second.get(key, absent)}" for key in keys[:8])
    raise ConfigError(f"processes 0 and {other} of {count} differ in the {name} ({shown}); {advice}")


def meet(name: str, *, timeout_s: int = MEET_S) -> None:
    """Returns when every process has come here; does nothing for a single process.

    After whatever may take one process longer than another, such as a compilation that another one has cached: the
    first collective between two processes fails if one comes half a minute after the other.
    """
    client, index = distributed.global_state.client, jax_index()
    if client is None or jax_count() == 1:
        return
    call = client.key_value_increment(f"diffjax/meet/{name}/calls/{index}", 1)
    client.wait_at_barrier(f"diffjax/meet/{name}/{call}", timeout_s * 1000)


def share(folder: str | os.PathLike) -> None:
    """Returns when every process has seen in `folder` what the first one made there; does nothing for a single process.

    Raises:
      ConfigError: on every process, if one does not see it.
    """
    client, index = distributed.global_state.client, jax_index()
    if client is None or jax_count() == 1:
        return
    key = f"diffjax/share/{client.key_value_increment(f'diffjax/share/calls/{index}', 1)}"
    if index == 0:
        mark = Path(folder, f".shared-{uuid.uuid4().hex}")
        mark.touch()
        client.key_value_set(key, mark.name)
    mark = Path(folder, client.blocking_key_value_get(key, MEET_S * 1000))
    until = time.monotonic() + SHARED_S
    while not (seen := mark.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    try:
        agree("folder", {"sees what process 0 wrote": seen}, f"{str(folder)!r} must be one folder that all of them see")
    finally:
        if index == 0:
            mark.unlink(missing_ok=True)


def least(value: int) -> int:
    """The smallest value that any process has; a collective operation, which all of them must come to."""
    if jax_count() == 1:
        return int(value)
    from jax.experimental import multihost_utils

    return int(np.min(multihost_utils.process_allgather(np.asarray(value, np.int32))))


@contextlib.contextmanager
def stop_requests(early: Callable[[int], None] | None = None) -> Iterator[Callable[[int], int | None]]:
    """`asked(step)`: the signal that stops the run after `step` updates, or None; the same on every process.

    It must be called before the first update and once after every one, by all processes. In a single process it is what
    `caught_signals` has caught. In several a SIGTERM or SIGINT to any of them is told to the others by JAX, which
    chooses the next step that none of them has passed.

    Args:
      early: in a single process, what to call with a signal, in a thread, before `asked` is called for the first time.
    """
    if jax_count() == 1:
        with caught_signals() as caught, heard_at_once(early) as begin:

            def asked(step):
                begin()
                return caught[0] if caught else None

            yield asked
        return
    from jax.experimental import multihost_utils

    with interrupt_is_terminate():
        yield lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None


def interrupt_is_terminate() -> contextlib.AbstractContextManager[None]:
    """Turns the first SIGINT into a SIGTERM while the block lasts: JAX listens to that one alone."""
    return at_first((signal.SIGINT,), lambda number: os.kill(os.getpid(), signal.SIGTERM))


def input_share(sharding: Sharding, rows: int) -> tuple[int, int]:
    """`(index, count)`: this process reads part `index` of the `count` equal parts of each batch of `rows` rows.

    Processes that hold the same rows, as under tensor parallelism across processes, read the same part.

    Raises:
      ConfigError: if the rows of this process are not one such part: the mesh scatters them.
    """
    places = sharding.addressable_devices_indices_map((rows,))
    spans = sorted({(s.start or 0, rows if s.stop is None else s.stop) for (s,) in places.values()})
    start, stop = spans[0][0], spans[-1][1]
    size = stop - start
    contiguous = all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    if not contiguous or rows % size or start % size:
        raise ConfigError(
            f"config.mesh scatters the rows of a batch of {rows} over process {jax.process_index()}: {spans}; "
            "put the axes that split the batch first, and those within a machine last"
        )
    return start // size, rows // size


@contextlib.contextmanager
def joined(
    cluster: Cluster | None, describe: Callable[[BaseException], tuple[int, str]], **settings
) -> Iterator[Watch | None]:
    """The other processes of the run for as long as the block lasts; None, and nothing else, where there are none.

    An error in the block stops every process: this one with the code and the text of `describe(error)`, the others with
    a line that quotes it. A computation over all processes fails as well where another one has died; then that is said.

    Args:
      cluster: from `diffjax.train.parallel.cluster.find`.
      describe: `error -> (exit code, text for stderr)`.
      settings: as `join`.

    Raises:
      ConfigError: as `join`.
    """
    watch = join(cluster, **settings)
    try:
        yield watch
    except BaseException as error:
        if watch is None:
            raise
        _fail(watch, error, *describe(error))
    if watch is not None:
        watch.finish()
        jax.distributed.shutdown()
        release_abort()


def _fail(watch: Watch, error: BaseException, code: int, text: str) -> None:
    verdict = watch.explain() if _of_the_runtime(error) else None
    if verdict is None:
        *before, line = (text.strip() or type(error).__name__).splitlines()
        sys.stderr.write("".join(part + "\n" for part in before))
        watch.announce(Verdict(code, f"{watch.name()} failed: {line}"))
        verdict = Verdict(code, line)
    watch.stop(verdict)


def _of_the_runtime(error: BaseException | None) -> bool:
    """Whether it began with an error of JAX: a save that waits for a process which dies raises one of its own."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error is not None


def jax_count() -> int:
    """Processes of the run, without touching a device."""
    return distributed.global_state.num_processes if distributed.global_state.client else 1


def jax_index() -> int:
    """This process, without touching a device."""
    return distributed.global_state.process_id if distributed.global_state.client else 0


def is_first() -> bool:
    """Whether this is the process that writes what a run writes once."""
    return jax_index() == 0
