"""Leases: one holder at a time, given back by who ends, free again after who was killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from ipt2v import leases as module
from ipt2v.leases import Leases, leases


def lease(folder: Path, owner: str, seconds: float = 60) -> Leases:
    return Leases(folder=folder, owner=owner, seconds=seconds)


def make_old(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_one_owner_has_it_until_he_gives_it_back(tmp_path: Path) -> None:
    one, other = lease(tmp_path, "one"), lease(tmp_path, "other")
    assert one.take("id/prompt") and not other.take("id/prompt") and not one.take("id/prompt")
    assert other.take("id/other")
    one.drop("id/prompt")
    assert other.take("id/prompt") and other.held == {"id/prompt", "id/other"}


def test_a_lease_is_free_when_nobody_has_renewed_it(tmp_path: Path) -> None:
    one, other = lease(tmp_path, "one"), lease(tmp_path, "other")
    assert one.take("a")
    make_old(one.path("a"), 59)
    assert not other.take("a")
    make_old(one.path("a"), 61)
    assert other.take("a")
    one.renew()
    assert one.held == set()  # it hears of it
    one.drop("a")
    assert other.path("a").read_text(encoding="utf-8") == "other"  # and does not take it away


def test_renewing_keeps_it(tmp_path: Path) -> None:
    one, other = lease(tmp_path, "one"), lease(tmp_path, "other")
    assert one.take("a")
    make_old(one.path("a"), 1000)
    one.renew()
    assert not other.take("a")


def test_after_a_restart_an_owner_takes_its_own_back_at_once(tmp_path: Path) -> None:
    assert lease(tmp_path, "video element 3").take("a")
    assert lease(tmp_path, "video element 3").take("a")


def test_the_block_renews_in_time_and_gives_back_at_its_end(tmp_path: Path) -> None:
    other = lease(tmp_path, "other", 0.4)
    with pytest.raises(RuntimeError), leases(tmp_path, "one", 0.4) as mine:
        assert mine.take("a")
        for _ in range(10):
            time.sleep(0.1)
            assert not other.take("a")
        raise RuntimeError
    assert other.take("a")


def test_without_links_it_still_has_one_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module.os, "link", refuse)
    one, other = lease(tmp_path, "one"), lease(tmp_path, "other")
    assert one.take("a") and not other.take("a")
    make_old(one.path("a"), 61)
    assert other.take("a")


def test_a_fresh_lease_in_place_of_a_stale_one_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two want the same stale lease; the slower has looked before the faster took it."""
    assert lease(tmp_path, "dead").take("a")
    make_old(tmp_path / "a.lease", 61)
    real, fast = os.rename, lease(tmp_path, "fast")

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(module.os, "rename", real)
        assert fast.take("a")
        real(source, target)

    monkeypatch.setattr(module.os, "rename", late)
    assert not lease(tmp_path, "slow").take("a")
    assert (tmp_path / "a.lease").read_text(encoding="utf-8") == "fast"


def take_all(folder: Path, owner: str, names: list[str], start: Any, taken: Any) -> None:
    mine = lease(folder, owner)
    start.wait()
    for name in names:
        if mine.take(name):
            taken.append((name, owner))


@pytest.mark.slow
@pytest.mark.parametrize("is_stale", [False, True])
def test_many_processes_share_many_leases_without_a_double(tmp_path: Path, is_stale: bool) -> None:
    names = [f"id{number % 7}/prompt{number}" for number in range(150)]
    if is_stale:
        dead = lease(tmp_path, "dead")
        for name in names:
            assert dead.take(name)
            make_old(dead.path(name), 61)
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        start, taken = context.Event(), manager.list()
        workers = [context.Process(target=take_all, args=(tmp_path, f"p{one}", names, start, taken)) for one in range(6)]
        for worker in workers:
            worker.start()
        start.set()
        for worker in workers:
            worker.join()
        assert sorted(name for name, _ in taken) == sorted(names)
        assert len({owner for _, owner in taken}) > 1
    assert [path.name for path in tmp_path.rglob(".*")] == []  # no scratch left


HOLD = "import sys, time; from pathlib import Path; from ipt2v.leases import leases\n"
HOLD += "with leases(Path(sys.argv[1]), 'killed', 1.0) as mine:\n  print(mine.take('a'), flush=True); time.sleep(60)"


def test_after_a_sigkill_it_is_free_in_time(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        other = lease(tmp_path, "other", 1.0)
        time.sleep(1.5)
        assert not other.take("a")  # renewed meanwhile
        holder.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not other.take("a"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
