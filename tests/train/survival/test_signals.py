"""One signal is caught, its echo is ignored, and a later one has its usual effect."""

import os
import signal
import subprocess
import sys
import types

import pytest

from diffjax import commands
from diffjax.train.errors import RESUME
from diffjax.train.parallel import processes
from diffjax.train.survival import signals

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def usual():
    """The signals that have had the effect that they have outside of a run."""
    seen, before = [], {number: signal.getsignal(number) for number in BOTH}
    effect = lambda number, frame: seen.append(number)
    for number in BOTH:
        signal.signal(number, effect)
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(signals, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("second", BOTH)
def test_an_echo_is_ignored_and_a_later_signal_has_its_usual_effect(usual, clock, first, second):
    outside = signal.getsignal(signal.SIGINT)
    with signals.caught_signals() as caught:
        signal.raise_signal(first)
        for _ in range(3):
            clock.seconds += 0.3 * signals.ECHO_S
            signal.raise_signal(second)
        assert caught == [first] and usual == []
        clock.seconds += 0.3 * signals.ECHO_S
        signal.raise_signal(second)
        assert caught == [first] and usual == [second] and signal.getsignal(second) is outside
        signal.raise_signal(second)
        assert usual == [second, second]
    assert [signal.getsignal(number) for number in BOTH] == [outside, outside]


def test_of_several_processes_each_passes_an_interrupt_on_once(usual, clock):
    with processes.interrupt_is_terminate():
        for wait in (0, 0.5, 1):
            clock.seconds += wait * signals.ECHO_S
            signal.raise_signal(signal.SIGINT)
    assert usual == [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("ignored, other", [BOTH, BOTH[::-1]])
def test_what_is_ignored_stays_ignored(usual, ignored, other):
    signal.signal(ignored, signal.SIG_IGN)
    with signals.caught_signals() as caught:
        signal.raise_signal(ignored)
        assert caught == []
        signal.raise_signal(other)
        assert caught == [other]
    assert signal.getsignal(ignored) is signal.SIG_IGN and usual == []


@pytest.mark.parametrize("number", BOTH)
def test_a_later_signal_ends_a_program_at_once(number):
    program = """
import os, signal, sys, time
from diffjax.train.survival import signals
signals.ECHO_S = 1.0
with signals.caught_signals() as caught:
    os.kill(os.getpid(), int(sys.argv[1]))
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(1.1)
    print("alive", *caught, flush=True)
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program, str(int(number))], capture_output=True, text=True, timeout=50)
    # Python ends itself by the signal after a KeyboardInterrupt.
    assert done.returncode == -number and done.stdout == f"alive {int(number)}\n"


EARLY = """
import hashlib, os, signal, sys, threading, time
from diffjax import commands
from diffjax.train.parallel import processes
number, begun = int(sys.argv[1]), sys.argv[2] == "begun"
with processes.stop_requests(commands.leave_at_once) as asked:
    if begun:
        print("asked", asked(0), flush=True)
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    # Like a compilation: no Python in the main thread, and the others may run.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000 if begun else 100_000_000)
    while asked(1) is None:
        time.sleep(0.01)
    print("asked", asked(1), flush=True)
print("end", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.set_wakeup_fd(-1), threading.active_count())
"""


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_before_the_first_step_ends_the_program_although_no_python_runs(number):
    args = [sys.executable, "-c", EARLY, str(int(number)), "before"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=50)
    assert done.returncode == commands.stopped_by(number) == {signal.SIGTERM: RESUME, signal.SIGINT: 130}[number]
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"diffjax: {number.name} before the first step; nothing is lost")


def test_a_signal_after_it_is_caught_and_nothing_stays_behind():
    args = [sys.executable, "-c", EARLY, str(int(signal.SIGTERM)), "begun"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == ["asked None", "asked 15", "end True -1 1"]


def test_it_ends_although_nobody_reads_what_it_says():
    reads, writes = os.pipe()
    os.close(reads)
    args = [sys.executable, "-c", EARLY, str(int(signal.SIGINT)), "before"]
    done = subprocess.run(args, stdout=subprocess.PIPE, stderr=writes, timeout=50)
    os.close(writes)
    assert done.returncode == 130 and done.stdout == b""


SLOW_TO_TRACE = """
import hashlib, traceback
import jax.numpy as jnp
from diffjax.core import Model

def net(*, shape, num_classes):
    def apply(params, x, t, y, key=None):
        if any(frame.name == "compile_step" for frame in traceback.extract_stack()):
            hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
        return x + params["b"]

    return Model(lambda key: {"b": jnp.zeros(shape)}, apply, {})
"""


@pytest.mark.slow
def test_the_command_is_stopped_before_its_first_step_and_starts_again(tmp_path):
    (tmp_path / "slow_net.py").write_text(SLOW_TO_TRACE)
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict(dict(model=dict(name='slow_net:net'), num_steps=2, batch_size=4))\n"
    )
    command = [sys.executable, "-m", "diffjax", "train", "--config=config.py", "--workdir=run"]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if "compiling the training step" in line:
                    break
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == RESUME
            assert "diffjax: SIGTERM before the first step" in process.stderr.read()
        finally:
            process.kill()
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    (tmp_path / "slow_net.py").write_text(SLOW_TO_TRACE.replace("200_000_000", "1"))
    assert subprocess.run(command, cwd=tmp_path, env=environ, timeout=100).returncode == 0
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
