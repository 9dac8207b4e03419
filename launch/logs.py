"""Logs of a run as a terminal may show them: which there are, and what is written to them from now on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ipt2v.run_dir import RunDir
from launch.evidence import Known, collect, tail
from launch.fault_text import ago, printable
from launch.fault_words import FINE_KINDS
from launch.faults import classify
from launch.queue import live_elements, log_files, newest, submissions

MAX_LISTED = 100
FOLLOW_POLL_SECONDS = 0.5
QUEUE_POLL_SECONDS = 10.0
LAST_LINES = 10  # of a file that is followed, as tail(1) shows


def list_logs(known: Known) -> list[str]:
    """A line for each log of each newest element that says something: its state, place, size, age and last line.

    Failed elements come first, then what was written to last.
    """
    found = []
    for stage, shard in sorted({(one.stage, shard) for one in known.submitted for shard in one.shards}):
        submitted = newest(known.submitted, stage, shard)
        if submitted is None:
            continue
        kind = classify(collect(known, stage, shard)).kind
        element = submitted.element(submitted.shards.index(shard))
        for rank in known.logs[stage].get(element, ()):
            for name in ("out", "err"):
                path = known.run.jobs_path(stage) / f"{element}_{rank}_log.{name}"
                found.append((kind in FINE_KINDS, f"{stage} {shard} rank {rank} {name}", str(kind), path))
    rows = sorted(
        ((fine, -stat.st_mtime, name, kind, path, stat.st_size) for fine, name, kind, path in found if (stat := _stat(path))),
    )
    now = time.time()
    lines = [f"{'element':<26} {'state':<18} {'size':>8} {'age':>7}  last line"] if rows else []
    for _, minus_time, name, state, path, size in rows[:MAX_LISTED]:
        last = printable((tail(path, 4096) or [""])[-1].strip(), 100)
        lines.append(f"{name:<26} {state:<18} {_size(size):>8} {ago(now + minus_time):>7}  {last}")
    if len(rows) > MAX_LISTED:
        lines.append(f"... and {len(rows) - MAX_LISTED} more in {known.run.root / 'jobs'}")
    return lines


def print_logs(files: list[Path]) -> None:
    """Every line of the files, without what would move a terminal's cursor."""
    for file in files:
        print(f"==> {file} <==")
        with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            for line in lines:
                print(printable(line, 4000))


@dataclass(slots=True)
class _Followed:
    """Files that grow, and how far they have been read."""

    read: dict[Path, int] = field(default_factory=dict)
    rest: dict[Path, str] = field(default_factory=dict)  # the beginning of a line that is not whole yet
    shown: Path | None = None

    def show(self, path: Path, lines: list[str]) -> None:
        if lines and path != self.shown:
            print(f"==> {path} <==")
            self.shown = path
        for line in lines:
            print(printable(line, 4000), flush=True)

    def more(self, path: Path) -> None:
        size = path.stat().st_size
        if path not in self.read:
            self.show(path, tail(path)[-LAST_LINES:])
            self.read[path] = size
        if size < self.read[path]:  # truncated: another file by that name
            self.read[path] = 0
        with path.open("rb") as file:
            file.seek(self.read[path])
            new = file.read()
        self.read[path] += len(new)
        *lines, self.rest[path] = (self.rest.get(path, "") + new.decode("utf-8", errors="replace")).split("\n")
        self.show(path, [line for line in lines if line.strip()])


def follow(run: RunDir, stage: str, shard: int, rank: int, sleep: Callable[[float], None] = time.sleep) -> str:
    """Print what a rank of the newest element writes, until the element is over; how it ended. Ctrl-C ends it sooner.

    Without squeue nobody can tell whether an element is over: then until Ctrl-C.
    """
    followed, asked, over = _Followed(), 0.0, False
    while True:
        for path in log_files(run, stage, shard, rank)[-2:]:
            followed.more(path)
        if over:
            return f"{stage} {shard} is not in the queue any more; `ipt2v why {run.root} {stage} {shard}` tells how it ended"
        if time.monotonic() - asked >= QUEUE_POLL_SECONDS or not asked:
            asked, over = time.monotonic(), _is_over(run, stage, shard)
        if not over:
            sleep(FOLLOW_POLL_SECONDS)


def _is_over(run: RunDir, stage: str, shard: int) -> bool:
    submitted = newest(submissions(run), stage, shard)
    if submitted is None:
        raise ValueError(f"{run.root}: {stage} shard {shard} was never submitted; nothing to follow")
    can_tell = submitted.place == "local" or shutil.which("squeue") is not None
    return can_tell and (stage, shard) not in live_elements(run)


def _stat(path: Path) -> os.stat_result | None:
    """None if the file is not there, or empty."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found if found.st_size else None


def _size(num_bytes: int) -> str:
    return f"{num_bytes} B" if num_bytes < 10_000 else f"{num_bytes / 1000:.0f} kB"
