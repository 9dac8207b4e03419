"""What an item took in one stage, by its record. The ranks of a first frame's element make an item each, of a video's one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from ipt2v.records import Provenance, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What one item took in one stage."""

    stage: str
    finished: float  # seconds of Unix time
    seconds: float  # of the item, on all ranks that made it together
    rank_seconds: float  # the same, of each of these ranks
    pace_seconds: float  # of its element, for an item more
    on_gpu: bool


def effort_of(made: Provenance, stage: str) -> Effort:
    """What a first frame or a video took. Raises ValueError if its record has no time."""
    together = stage == "video"
    return Effort(
        stage=stage,
        finished=datetime.fromisoformat(made.created).timestamp(),
        seconds=made.seconds,
        rank_seconds=made.seconds * (made.num_ranks if together else 1),
        pace_seconds=made.seconds / (1 if together else made.num_ranks),
        on_gpu=made.device.startswith("cuda"),
    )


def effort_of_scores(rows: Sequence[Score]) -> Effort:
    """What the scores of one video took, by one rank."""
    seconds = sum(row.seconds for row in rows)
    return Effort(
        stage="score",
        finished=max(datetime.fromisoformat(row.created).timestamp() for row in rows),
        seconds=seconds,
        rank_seconds=seconds,
        pace_seconds=seconds,
        on_gpu=any(row.device.startswith("cuda") for row in rows),
    )
