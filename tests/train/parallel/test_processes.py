"""Processes that meet or do not meet, agree or differ, fall silent or get stuck."""

import json
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from diffjax.train.checkpoint import CheckpointError
from diffjax.train.errors import RESUME, ConfigError
from diffjax.train.parallel import cluster, peers, processes
from diffjax.train.parallel.cluster import Cluster
from diffjax.train.parallel.peers import BEAT_S, SILENT_S, Verdict, Watch

# Forks a process for each entry of `{name: arguments}`, which joins, compares `facts`, and says how it went.
SCRIPT = """
import json, os, sys
from diffjax.train.errors import ConfigError
from diffjax.train.parallel import cluster, processes
jobs, folder = json.loads(sys.argv[1]), sys.argv[2]
children = {}
for name, arguments in jobs.items():
    children[name] = os.fork()
    if not children[name]:
        break
else:
    ends = {name: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for name, pid in children.items()}
    print(json.dumps(ends))
    sys.exit()
for number, stream in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{folder}/{name}.{stream}", os.O_CREAT | os.O_WRONLY), number)
address, count, index, fact, wait, shared = arguments
describe = lambda error: (2 if isinstance(error, ConfigError) else 1, str(error))
found = cluster.find({}, coordinator=address, num_processes=count, process_id=index)
try:
    with processes.joined(found, describe, timeout_s=wait) as watch:
        processes.agree("facts", {"lr": fact, "seed": 0}, "start all alike")
        processes.agree("facts", {"again": 1}, "start all alike")
        processes.SHARED_S = 1
        processes.share(shared)
        assert os.listdir(shared) == [] or not processes.is_first()
        print("agreed", watch.name(), processes.is_first())
        if fact == "fails":
            raise OSError("no space left")
except ConfigError as error:
    sys.stderr.write(str(error))
    sys.exit(2)
"""
# Seconds to wait: short where somebody will not come, long where a loaded machine may keep one back.
WAIT = {"nobody": 4, "missing": 4, "busy": 4, "twice": 10}
CASES = {
    "alike": [(2, 0, "0.1"), (2, 1, "0.1")],
    "fails": [(2, 0, "fails"), (2, 1, "fails")],
    "differ": [(3, 0, "0.1"), (3, 1, "0.1"), (3, 2, "0.2")],
    "nobody": [(2, 1, "")],
    "missing": [(2, 0, "")],
    "twice": [(3, 0, ""), (3, 1, ""), (3, 1, "")],
    "busy": [(2, 0, "")],
    "apart": [(2, 0, "0.1"), (2, 1, "0.1")],
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """`{case: [(exit code, stdout, stderr) of each process]}`; all cases run at once."""
    taken, folder = socket.create_server(("", 0)), tmp_path_factory.mktemp("ended")
    jobs = {}
    for case, members in CASES.items():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = (taken if case == "busy" else free).getsockname()[1]
        for count, index, fact in members:
            shared = folder / (f"{case}{index}" if case == "apart" else case)
            shared.mkdir(exist_ok=True)
            # Of two with one id each has a place in the list of its own.
            name = f"{case}.{sum(other.startswith(case + '.') for other in jobs)}"
            jobs[name] = (f"127.0.0.1:{port}", count, index, fact, WAIT.get(case, 100), str(shared))
    command = [sys.executable, "-c", SCRIPT, json.dumps(jobs), str(folder)]
    codes = json.loads(subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True).stdout)
    taken.close()
    found = {}
    for name, code in codes.items():
        texts = (Path(folder, f"{name}.{stream}").read_text() for stream in ("out", "err"))
        found.setdefault(name.partition(".")[0], []).append((code, *texts))
    return found


def test_processes_that_were_started_alike_agree(ended):
    assert [(code, out.strip()) for code, out, _ in ended["alike"]] == [
        (0, "agreed process 0 of 2 True"),
        (0, "agreed process 1 of 2 False"),
    ]


def test_a_difference_is_shown_by_all(ended):
    for code, _, err in ended["differ"]:
        assert code == 2
        assert "processes 0 and 2 of 3 differ in the facts (lr: 0.1 | 0.2); start all alike" in err


def test_folders_that_are_not_one_are_told(ended):
    for code, _, err in ended["apart"]:
        assert code == 2
        assert "sees what process 0 wrote: True | False" in err and "must be one folder that all of them see" in err


def test_an_error_ends_all_with_its_code(ended):
    for index, (code, _, err) in enumerate(ended["fails"]):
        assert code == 1
        assert f"diffjax: process {index} of 2" in err and "no space left" in err


@pytest.mark.parametrize(
    "case, member, words",
    [
        ("nobody", 0, "nothing answers at the coordinator 127.0.0.1:"),
        ("missing", 0, "within 4 s; see that all were started"),
        ("busy", 0, "cannot listen on port"),
    ],
)
def test_who_cannot_join_says_why(ended, case, member, words):
    code, _, err = ended[case][member]
    assert code == 2
    assert words in err.splitlines()[-1]


def test_two_with_one_id_are_told(ended):
    assert [code for code, _, _ in ended["twice"]] == [2, 2, 2]
    assert sum("no two processes have the same id" in err for _, _, err in ended["twice"]) == 1


def test_alone_there_is_nothing_to_join():
    assert processes.join(None) is None
    processes.agree("facts", {"a": 1}, "")
    assert processes.is_first()
    with processes.joined(None, None) as watch:
        assert watch is None
    with pytest.raises(OSError, match="mine"), processes.joined(None, None):
        raise OSError("mine")


def test_a_port_that_is_taken_is_found_before_jax_is_asked():
    with socket.create_server(("", 0)) as taken:
        cluster = Cluster("flags", f"127.0.0.1:{taken.getsockname()[1]}", 2, 0)
        with pytest.raises(ConfigError, match="another port in --coordinator"):
            processes.join(cluster)


class Store(dict):
    """What a watch asks of JAX's client, in one process."""

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self[key] = value

    def key_value_dir_get(self, key):
        return [(k, v) for k, v in self.items() if k.startswith(key)]


@pytest.fixture
def world(monkeypatch):
    """`beat(*indices)` lets `BEAT_S` pass and these processes speak; `watches` of three processes."""
    now, store = [0.0], Store()
    monkeypatch.setattr(peers, "time", types.SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: None))
    watches = [Watch(store, "127.0.0.1:1", i, 3, stall_s=100.0) for i in range(3)]

    def beat(*indices):
        now[0] += BEAT_S
        for i in indices:
            watches[i]._beat()
        return watches[0].judge(SILENT_S)

    beat(0, 1, 2)
    return types.SimpleNamespace(beat=beat, watches=watches, beats=lambda seconds: range(int(seconds / BEAT_S)))


def test_who_falls_silent_is_named(world):
    for _ in world.beats(SILENT_S):
        assert world.beat(0, 1) is None
    found = world.beat(0, 1)
    assert found.code == RESUME and "process 2 of 3 died or lost the network" in found.text


def test_who_has_finished_is_not_missed(world):
    world.watches[2].finish()
    assert all(world.beat(0, 1) is None for _ in world.beats(3 * SILENT_S))


def test_the_last_word_of_who_has_finished_stays():
    store, asked, answers = Store(), threading.Event(), threading.Event()
    watch = Watch(store, "127.0.0.1:1", 1, 2)

    def slow(key, value, allow_overwrite):
        if not asked.is_set():
            asked.set()
            answers.wait(30)
        store[key] = value

    store.key_value_set = slow
    threads = [threading.Thread(target=watch._beat), threading.Thread(target=watch.finish)]
    threads[0].start()
    assert asked.wait(30)
    threads[1].start()
    time.sleep(0.05)
    answers.set()
    for thread in threads:
        thread.join(30)
    watch._beat()
    assert [value.split()[0] for value in store.values()] == ["done"]


def test_who_is_stuck_is_named(world):
    for _ in range(40):
        # No step for long, as in a compilation: only a run that has begun can be stuck.
        assert world.beat(0, 1, 2) is None
    for watch, step in zip(world.watches, (8, 7, 8), strict=True):
        watch.step(step)
    found = [world.beat(0, 1, 2) for _ in world.beats(100 + 2 * BEAT_S)]
    assert found[0] is None and found[-1].code == RESUME
    assert "no step for" in found[-1].text and "process 1 behind at step 7, the others at 8" in found[-1].text


def test_a_coordinator_that_never_answers_is_lost(monkeypatch):
    monkeypatch.setattr(peers, "BEAT_S", 0.01)
    monkeypatch.setattr(peers, "SILENT_S", 0.1)
    store, ended = Store(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch = Watch(store, f"127.0.0.1:{server.getsockname()[1]}", 1, 2)
        watch.stop = lambda verdict: (said.append(verdict), ended.wait(30))
        said = []
        monkeypatch.setattr(peers, "catch_abort", lambda explain, stop: None)
        watch.start()
        assert not said
        store.key_value_set = lambda *args, **settings: ended.wait(30)  # As a frozen process does.
        for _ in range(500):
            if said:
                break
            time.sleep(0.01)
    ended.set()
    watch.finish()
    assert said[0].code == RESUME and "does not answer" in said[0].text


def test_the_first_verdict_counts(world):
    first, second = Verdict(1, "disk full"), Verdict(RESUME, "lost")
    assert world.watches[1].verdict() is None
    assert world.watches[1].announce(first) == first
    assert world.watches[2].announce(second) == first
    assert world.watches[0].explain() == first


@pytest.fixture
def ends(monkeypatch):
    """`ends(error, text)`: the verdict by which a process ends on an error, where its only peer has died."""

    def stop(verdict):
        stopped.append(verdict)
        raise SystemExit(verdict.code)

    stopped, lost = [], Verdict(RESUME, "process 0 of 2 died")
    watch = types.SimpleNamespace(
        explain=lambda: lost, name=lambda: "process 1 of 2", announce=lambda verdict: verdict, stop=stop
    )
    monkeypatch.setattr(processes, "join", lambda cluster: watch)

    def run(error, text):
        with pytest.raises(SystemExit), processes.joined(None, lambda error: (1, text)):
            raise error
        return stopped.pop()

    return run


def test_a_save_that_a_dead_process_broke_is_to_be_resumed(ends):
    assert ends(OSError("disk full"), "disk full") == Verdict(1, "disk full")
    assert ends(ValueError(), "") == Verdict(1, "ValueError")
    broken = CheckpointError("cannot write checkpoint 20")
    broken.__cause__ = jax.errors.JaxRuntimeError("connection reset by peer")
    assert ends(broken, str(broken)) == Verdict(RESUME, "process 0 of 2 died")


def test_a_single_process_reads_all_rows():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    assert processes.input_share(NamedSharding(mesh, P("data")), 16) == (0, 1)


class Places:
    """A sharding of which this process holds the given rows."""

    def __init__(self, *spans):
        self.spans = spans

    def addressable_devices_indices_map(self, shape):
        return {i: (slice(*span),) for i, span in enumerate(self.spans)}


def test_rows_of_a_process():
    assert processes.input_share(Places((8, 12), (12, 16)), 16) == (1, 2)
    assert processes.input_share(Places((4, 8), (4, 8)), 16) == (1, 4)  # tensor parallel over both devices
    assert processes.input_share(Places((0, None), (0, None)), 16) == (0, 1)
    for scattered in (Places((0, 4), (8, 12)), Places((4, 12))):
        with pytest.raises(ConfigError, match="scatters the rows of a batch of 16"):
            processes.input_share(scattered, 16)


def test_a_launcher_says_which_place_without_joining():
    place = processes.place
    assert place({}) == (0, 1)
    told = {"DIFFJAX_COORDINATOR": "host:1234", "DIFFJAX_NUM_PROCESSES": "4", "DIFFJAX_PROCESS_ID": "2"}
    assert place(told) == (2, 4)
    assert place({}, coordinator="host:1234", num_processes=4, process_id=3) == (3, 4)
    # Nobody needs to know where process 0 runs.
    assert place({}, num_processes=4, process_id=1) == (1, 4)
    assert place({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}) == (2, 4)
    with pytest.raises(ConfigError, match="own detection does not say.*--process_id=I"):
        place({}, coordinator="auto")


def test_the_chips_of_a_tpu_host_know_their_place(monkeypatch):
    monkeypatch.setattr(cluster, "_tpu", lambda environ: Cluster("TPU", None, None, None, None))
    assert processes.place({}) == (0, 1)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert processes.place({}) == (2, 4)
    assert processes.place({}, num_processes=8, process_id=5) == (5, 8)
