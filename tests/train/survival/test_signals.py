"""One signal is caught, its echo is ignored, and a later one has its usual effect."""

import signal
import subprocess
import sys
import types

import pytest

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
