"""How far a run is, from its record files alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ipt2v.run_dir import STAGES, RunDir, StageCount
from launch.queue import is_idle

QUEUE_POLL_SECONDS = 2


def all_keys(run: RunDir) -> dict[int, tuple[str, ...]]:
    """The keys of every shard."""
    return {shard: run.shard_keys(shard) for shard in range(run.environment().num_shards)}


def count_all(run: RunDir, keys: Mapping[int, tuple[str, ...]] | None = None) -> list[StageCount]:
    """Progress of every stage of every shard; `keys` of each, where they have been read already."""
    counts, stages = [], run.stages()
    for shard in range(run.environment().num_shards) if keys is None else keys:
        mine = run.shard_keys(shard) if keys is None else keys[shard]
        counts += [run.count(stage, shard, mine) for stage in stages]
    return sorted(counts, key=lambda count: (STAGES.index(count.stage), count.shard))


def summary(counts: list[StageCount]) -> str:
    """One line: how much of each stage is done, of how many, and what failed."""
    parts = []
    for stage in dict.fromkeys(count.stage for count in counts):
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


def wait_for_queue(run: RunDir) -> None:
    """Return when no element of the run waits or runs any more; prints meanwhile how far it is."""
    tick = ProgressLine(run)
    while not is_idle(run):
        tick()
        time.sleep(QUEUE_POLL_SECONDS)


def shard_lines(counts: list[StageCount], live: Mapping[tuple[str, int], str]) -> list[str]:
    """A line for each shard that is not finished, with its state in the queue, and one for all that are, by stage."""
    lines = [_status_line("stage", "shards", "done", "failed", "missing", "queue")]
    for stage in STAGES:
        mine = [count for count in counts if count.stage == stage]
        finished = [count for count in mine if not count.failed and not count.missing]
        if finished:
            shards, done = ranges([count.shard for count in finished]), sum(count.done for count in finished)
            lines.append(_status_line(stage, shards, done, 0, 0, ""))
        for count in mine:
            if count.failed or count.missing:
                state = live.get((stage, count.shard), "").lower()
                lines.append(_status_line(stage, count.shard, count.done, count.failed, count.missing, state))
    return lines


def _status_line(stage: str, shards: object, *numbers: object) -> str:
    done, failed, missing, state = numbers
    return f"{stage:<12} {shards!s:<9} {done:>6} {failed:>7} {missing:>8}  {state}".rstrip()


def ranges(shards: Sequence[int]) -> str:
    """0-3,7 for (0, 1, 2, 3, 7)."""
    runs: list[list[int]] = []
    for shard in shards:
        if runs and shard == runs[-1][-1] + 1:
            runs[-1].append(shard)
        else:
            runs.append([shard])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
