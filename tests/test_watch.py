"""A process that hangs ends itself and says where it was; what is to be saved on a warning is saved."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from helpers import ROOT

from ipt2v import watch
from ipt2v.watch import END_TIME, STALL_SECONDS, collective_timeout, interrupted, on_interruption, seconds_left

HANG = """
import threading, time
from ipt2v.watch import beat, rest

def the_place_where_it_hangs():
    time.sleep(60)

for _ in range(4):
    beat()
    time.sleep(0.6)  # twice that is more than the limit: each sign of life counts
print("lived", flush=True)
{then}
the_place_where_it_hangs()
"""


def run_hanging(then: str, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {STALL_SECONDS: "1"}
    command = [sys.executable, "-c", HANG.format(then=then)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def test_a_process_without_a_sign_of_life_ends_with_all_stacks() -> None:
    done = run_hanging("", 30)
    assert (done.returncode, done.stdout) == (1, "lived\n")
    assert done.stderr.startswith("Timeout (0:00:01)!\n") and "in the_place_where_it_hangs" in done.stderr


def test_at_rest_nothing_is_due() -> None:
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        run_hanging("rest()", 6)
    assert b"lived" in (raised.value.stdout or b"")


@pytest.mark.slow
def test_two_ranks_of_which_one_hangs_both_say_where_they_were() -> None:
    code = (
        "import os, time, torch, torch.distributed as dist\n"
        "from ipt2v.parallel import group_from_environment\n"
        "from ipt2v.watch import beat\n"
        "with group_from_environment() as group:\n"
        "    group.meet(); beat()\n"
        "    if group.rank == 1: time.sleep(60)\n"
        "    group.meet()\n"
    )
    port = str(20000 + os.getpid() % 20000)
    environment = os.environ | {STALL_SECONDS: "3", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert all("Timeout (0:00:03)!" in error for error in errors)
    assert "in meet" in errors[0] and "distributed_c10d.py" in errors[0]


def test_a_collective_outlasts_the_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STALL_SECONDS, raising=False)
    assert collective_timeout().total_seconds() == 1800
    monkeypatch.setenv(STALL_SECONDS, "7200")
    assert collective_timeout().total_seconds() == 7500


def test_time_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(END_TIME, raising=False)
    assert seconds_left() == float("inf")
    monkeypatch.setenv(END_TIME, str(time.time() + 100))
    assert 99 < seconds_left() <= 100


def test_on_a_warning_everything_is_saved_that_can_be(caplog: pytest.LogCaptureFixture) -> None:
    saved: list[str] = []

    def fail() -> None:
        raise RuntimeError("disk gone")

    outer, inner = (on_interruption(partial(saved.append, name)) for name in ("outer", "inner"))
    with caplog.at_level(logging.ERROR), outer, on_interruption(fail), inner:
        interrupted()
    interrupted()  # nothing is left of them
    assert saved == ["inner", "outer"] and "disk gone" in caplog.text
    assert watch._on_interruption == []


def test_a_signal_in_the_middle_of_work_finds_them() -> None:
    saved: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda *_: interrupted())
    try:
        with on_interruption(lambda: saved.append(1)):
            os.kill(os.getpid(), signal.SIGUSR2)
            sum(range(1000))
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert saved == [1]
