"""The clock against a clock that the test turns."""

import pytest

from diffjax.train.monitor import clock as clocks


@pytest.fixture
def turn(monkeypatch):
    """`turn(seconds)` lets time pass."""
    now = [100.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    return pass_time


def test_rates_leave_out_what_is_paused_and_count_waiting(turn):
    clock = clocks.Clock(100, 32)
    turn(6)
    with clock.waiting():
        turn(2)
    with clock.paused("checkpoints"):
        turn(50)
    # 16 steps in 8 seconds, 2 of them waiting.
    assert clock.lap(116) == {"steps_per_s": 2.0, "step_ms": 500.0, "images_per_s": 64.0, "data_wait": 0.25}
    turn(10)
    assert clock.lap(117) == {"steps_per_s": 0.1, "step_ms": 10000.0, "images_per_s": 3.2, "data_wait": 0.0}
    assert clock.seconds() == {"total": 68.0, "input": 2.0, "checkpoints": 50.0}
