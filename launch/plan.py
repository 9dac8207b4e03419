"""What to submit, decided from what is missing and what is in the queue. Pure: reads no file, talks to no scheduler."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ipt2v.run_dir import STAGES, StageCount


@dataclass(frozen=True, slots=True, kw_only=True)
class Living:
    """An array in the queue: tasks[i] is the array index of the element that makes shards[i]."""

    stage: str
    job_id: str | None  # None: nothing can be made to wait for it
    shards: tuple[int, ...]
    tasks: tuple[int, ...]
    live: frozenset[int]  # those of its shards that wait or run


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One job array, or several if it is longer than the site allows: element i makes shards[i]."""

    stage: str
    shards: tuple[int, ...]
    after: bool  # element i starts when element i of the submission before it has succeeded
    living: Living | None = None  # each starts when the element of its shard in this array has succeeded


def plan_submissions(counts: Iterable[StageCount], living: Iterable[Living] = ()) -> tuple[Submission, ...]:
    """Arrays for all that is missing: for each shard a chain of its missing stages, after what of it is in the queue.

    What is in the queue is left alone. A shard that has a stage there, and none of a later one, gets the later ones: so it is
    when a driver has died between two arrays, or an element of the second was cancelled.
    """
    living = tuple(living)
    missing: dict[int, set[str]] = {}
    for count in counts:
        if count.missing:
            missing.setdefault(count.shard, set()).add(count.stage)
    chains: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for shard in sorted(missing):
        last, parent = _latest(shard, living)
        stages = tuple(stage for stage in STAGES[last + 1 :] if stage in missing[shard])
        if stages and (parent is None or living[parent].job_id is not None):
            chains.setdefault((-1 if parent is None else parent, stages), []).append(shard)
    # what waits for the queue first; then what has most to do, so that the longest way begins soonest
    ordered = sorted(chains.items(), key=lambda chain: (chain[0][0] < 0, chain[0][0], -len(chain[0][1])))
    submissions = []
    for (parent, stages), shards in ordered:
        for index, stage in enumerate(stages):
            array = living[parent] if parent >= 0 and not index else None
            submissions.append(Submission(stage=stage, shards=tuple(shards), after=bool(index), living=array))
    return tuple(submissions)


def _latest(shard: int, living: tuple[Living, ...]) -> tuple[int, int | None]:
    """The latest stage that the queue has of a shard, as its place in STAGES (-1: none), and the number of its array.

    Of two arrays with the same shard the later one, which was submitted because it had to be.
    """
    found = [(STAGES.index(array.stage), number) for number, array in enumerate(living) if shard in array.live]
    return max(found, default=(-1, None))
