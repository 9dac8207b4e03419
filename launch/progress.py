"""How far a run is, from its record files alone."""

from __future__ import annotations

import time

from ipt2v.run_dir import STAGES, RunDir, StageCount
from launch.queue import live_elements

QUEUE_POLL_SECONDS = 2
MAX_REASONS = 20


def count_all(run: RunDir) -> list[StageCount]:
    """Progress of every stage of every shard."""
    counts = []
    for shard in range(run.environment().num_shards):
        keys = run.shard_keys(shard)
        counts += [run.count(stage, shard, keys) for stage in STAGES]
    return sorted(counts, key=lambda count: (STAGES.index(count.stage), count.shard))


def summary(counts: list[StageCount]) -> str:
    """One line: how much of each stage is done, of how many, and what failed."""
    parts = []
    for stage in STAGES:
        mine = [count for count in counts if count.stage == stage]
        done, failed = sum(count.done for count in mine), sum(count.failed for count in mine)
        total = done + failed + sum(count.missing for count in mine)
        parts.append(f"{stage} {done}/{total}" + (f" ({failed} failed)" if failed else ""))
    return "  ".join(parts)


class ProgressLine:
    """Prints the summary each time that it has changed, at most once a second."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.start, self.checked, self.last = run, time.monotonic(), 0.0, ""

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self.checked < 1:
            return
        self.checked, line = now, summary(count_all(self.run))
        if line != self.last:
            self.last = line
            print(f"{now - self.start:6.0f} s  {line}", flush=True)


def wait_for_queue(run: RunDir, tick: ProgressLine) -> None:
    """Return when no element of the run waits or runs any more."""
    while live_elements(run):
        tick()
        time.sleep(QUEUE_POLL_SECONDS)


def print_status(run: RunDir, counts: list[StageCount], live: dict[tuple[str, int], str]) -> None:
    """A line for each shard that is not finished, totals, and the reasons of failures."""
    open_counts = [count for count in counts if count.failed or count.missing]
    lines = [f"{'stage':<12} {'shard':>5} {'done':>6} {'failed':>6} {'missing':>7}  queue"] if open_counts else []
    for count in open_counts:
        state = live.get((count.stage, count.shard), "").lower()
        lines.append(
            f"{count.stage:<12} {count.shard:>5} {count.done:>6} {count.failed:>6} {count.missing:>7}  {state}".rstrip()
        )
    failures = run.failures()
    lines += [f"failed: {failure.key} ({failure.stage}): {failure.reason}" for failure in failures[:MAX_REASONS]]
    if len(failures) > MAX_REASONS:
        lines.append(f"... and {len(failures) - MAX_REASONS} more below {run.root / 'failure'}")
    print("\n".join([*lines, summary(counts)]))
