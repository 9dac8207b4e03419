"""What to submit, decided from what is missing. Pure: reads no file, talks to no scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from ipt2v.run_dir import StageCount


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One job array: element i makes shards[i]."""

    stage: str
    shards: tuple[int, ...]
    after: bool  # element i starts when element i of the submission before it has succeeded


def plan_submissions(counts: Iterable[StageCount], busy: Set[int] = frozenset()) -> tuple[Submission, ...]:
    """At most three arrays: first frames, the videos that wait for them, and videos whose first frames are all there.

    The second has exactly the first's elements, in its order: `aftercorr` pairs elements by index. Shards in `busy` are in the
    queue already and left alone.
    """
    missing = {(count.stage, count.shard) for count in counts if count.missing and count.shard not in busy}
    first_frames = tuple(sorted(shard for stage, shard in missing if stage == "first_frame"))
    ready = tuple(sorted(shard for stage, shard in missing if stage == "video" and shard not in first_frames))
    submissions = []
    if first_frames:
        submissions.append(Submission(stage="first_frame", shards=first_frames, after=False))
        submissions.append(Submission(stage="video", shards=first_frames, after=True))
    if ready:
        submissions.append(Submission(stage="video", shards=ready, after=False))
    return tuple(submissions)
