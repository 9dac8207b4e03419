"""What the records of a stage say of their making: a bounded number of them, so that 100,000 items cost no more than 1,000."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path

from ipt2v import hdf5
from ipt2v.effort import Effort, effort_of, effort_of_scores
from ipt2v.records import Score
from ipt2v.run_dir import RunDir, StageCount
from launch.rates import Finished, spread

MAX_RECORDS = 200  # of each stage that are opened
MAX_TABLES = 64  # of scores, one for each shard
MAX_TIMES = 2000  # files that are asked for their times


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is known of the finished items of one stage."""

    num_done: int
    sampled: tuple[Effort, ...]
    finished: tuple[Finished, ...]


def measure(run: RunDir, stage: str, counts: Sequence[StageCount], keys: Mapping[int, Sequence[str]]) -> Measured:
    """Open at most MAX_RECORDS records, evenly spread over all items; of more videos ask MAX_TIMES MP4s for their times.

    `keys` of each shard. Not a few whole shards: where shards were made one after the other, all else would look like pauses.
    """
    mine = [count for count in counts if count.stage == stage and count.done]
    num_done = sum(count.done for count in mine)
    sampled = sample_records(run, stage, mine, keys)
    times = [one.finished for one in sampled]
    if stage == "video" and num_done > MAX_RECORDS:
        mp4_times = _mp4_times(run, [key for count in mine for key in keys[count.shard]])
        if len(mp4_times) > len(times) and not _is_copied(mp4_times, times):
            times = mp4_times
    weight = num_done / len(times) if times else 1.0
    finished = tuple(Finished(at=at, items=weight) for at in times)
    return Measured(num_done=num_done, sampled=tuple(sampled), finished=finished)


def sample_records(run: RunDir, stage: str, counts: Sequence[StageCount], keys: Mapping[int, Sequence[str]]) -> list[Effort]:
    """What at most MAX_RECORDS records of these shards say; one that cannot be read says nothing."""
    if stage == "score":
        shards = [counts[place].shard for place in spread(len(counts), MAX_TABLES)]
        return [effort_of_scores(rows) for shard in shards for rows in _score_rows(run, shard, keys[shard])]
    digest = run.environment().run_digest
    ends = list(accumulate(count.done for count in counts))
    wanted: dict[StageCount, list[int]] = {}  # shard -> places among what is done of it
    for place in spread(ends[-1] if ends else 0, MAX_RECORDS):
        number = bisect_right(ends, place)
        wanted.setdefault(counts[number], []).append(place - ends[number] + counts[number].done)
    found = []
    for count, indices in wanted.items():
        paths = _paths(run, count, keys[count.shard])
        done = [key for key in keys[count.shard] if key in paths]
        for key in (done[index] for index in indices if index < len(done)):
            found += _sampled(paths[key], key, stage, digest)
    return found


def _paths(run: RunDir, count: StageCount, keys: Sequence[str]) -> dict[str, Path]:
    """key -> the file that should hold its record. A sealed shard of which all is done is not opened to ask what is in it."""
    sealed = run.sealed_path(count.stage, count.shard)
    if count.done == len(keys) and sealed.exists():
        return dict.fromkeys(keys, sealed)
    return run.record_paths(count.stage, count.shard, keys)


def _sampled(path: Path, key: str, stage: str, run_digest: str) -> list[Effort]:
    try:
        return [effort_of(hdf5.load_provenance(path, key, run_digest=run_digest), stage)]
    except (OSError, ValueError, KeyError, TypeError):  # damaged, of another run, or sealed at this moment
        return []


def _score_rows(run: RunDir, shard: int, keys: Sequence[str]) -> list[list[Score]]:
    """The scores of each item of a shard that has all."""
    scores = run.scores()
    try:
        rows = scores.rows(shard, keys) if scores else []
    except (OSError, ValueError):  # sealed at this moment, or damaged
        return []
    return [list(mine) for _, mine in groupby(rows, key=lambda row: row.key)]


def _mp4_times(run: RunDir, keys: Sequence[str]) -> list[float]:
    """When MP4s were written: of at most MAX_TIMES keys, those that have one."""
    times = []
    for index in spread(len(keys), MAX_TIMES):
        with contextlib.suppress(OSError):
            times.append(os.stat(f"{run.root}/video/{keys[index]}.mp4").st_mtime)
    return times


def _is_copied(times: Sequence[float], recorded: Sequence[float]) -> bool:
    """Whether files were all written in much less time than they were made: a copy of the run without its times."""
    return bool(recorded) and max(times) - min(times) < (max(recorded) - min(recorded)) / 2
