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
    """Videos that wait for first frames in the queue, first frames, the videos that wait for those, and videos that need not.

    What is in the queue is left alone. A shard whose first frames are there, and its videos are not, gets its videos: so it is
    when a driver has died between the two arrays, or an element of the second was cancelled.
    """
    living = tuple(living)
    in_queue = {stage: {shard for one in living if one.stage == stage for shard in one.live} for stage in STAGES}
    missing = {(count.stage, count.shard) for count in counts if count.missing and count.shard not in in_queue["video"]}
    orphans = {shard for stage, shard in missing if stage == "video"} & in_queue["first_frame"]
    missing = {(stage, shard) for stage, shard in missing if shard not in in_queue["first_frame"]}
    submissions = []
    for array in reversed(living):  # of two with the same shard the later one, which was submitted because it had to be
        mine = tuple(shard for shard in array.shards if shard in orphans & array.live)
        if array.stage == "first_frame" and array.job_id is not None and mine:
            orphans -= set(mine)
            submissions.append(Submission(stage="video", shards=mine, after=False, living=array))
    submissions.reverse()
    first_frames = tuple(sorted(shard for stage, shard in missing if stage == "first_frame"))
    ready = tuple(sorted(shard for stage, shard in missing if stage == "video" and shard not in first_frames))
    if first_frames:
        submissions.append(Submission(stage="first_frame", shards=first_frames, after=False))
        submissions.append(Submission(stage="video", shards=first_frames, after=True))
    if ready:
        submissions.append(Submission(stage="video", shards=ready, after=False))
    return tuple(submissions)
