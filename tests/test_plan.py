"""Claims about what is submitted, for any progress and any queue."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ipt2v.run_dir import STAGES, StageCount
from launch.plan import Submission, plan_submissions

# a shard: (first frames missing, videos missing); a video is missing at least where its first frame is
Shards = list[tuple[int, int]]
SHARDS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)).map(lambda pair: (pair[0], max(pair))), max_size=12)
BUSY = st.frozensets(st.integers(0, 12))


def counts(shards: Shards) -> list[StageCount]:
    return [
        StageCount(stage=stage, shard=shard, done=3 - missing[index], failed=0, missing=missing[index])
        for index, stage in enumerate(STAGES)
        for shard, missing in enumerate(shards)
    ]


def places(plan: tuple[Submission, ...], stage: str) -> list[int]:
    """Every shard as often as the plan makes it."""
    return sorted(shard for submission in plan if submission.stage == stage for shard in submission.shards)


@given(SHARDS, BUSY)
def test_every_shard_with_something_missing_is_made_once_in_each_stage_that_misses_it(
    shards: Shards, busy: frozenset[int]
) -> None:
    plan = plan_submissions(counts(shards), busy)
    for index, stage in enumerate(STAGES):
        assert places(plan, stage) == [shard for shard, missing in enumerate(shards) if missing[index] and shard not in busy]


@given(SHARDS, BUSY)
def test_a_shard_in_the_queue_is_left_alone(shards: Shards, busy: frozenset[int]) -> None:
    assert not any(busy & set(submission.shards) for submission in plan_submissions(counts(shards), busy))


@given(SHARDS, BUSY)
def test_the_array_that_waits_has_the_elements_of_the_one_before_it_in_its_order(shards: Shards, busy: frozenset[int]) -> None:
    plan = plan_submissions(counts(shards), busy)
    for before, submission in zip((None, *plan), plan, strict=False):
        assert submission.after == (before is not None and before.stage == "first_frame")
        assert not submission.after or (before is not None and submission.shards == before.shards)


@given(SHARDS, BUSY)
def test_videos_whose_first_frames_are_missing_wait_for_them(shards: Shards, busy: frozenset[int]) -> None:
    plan = plan_submissions(counts(shards), busy)
    at_once = [
        shard for submission in plan if submission.stage == "video" and not submission.after for shard in submission.shards
    ]
    assert [shard for shard in at_once if shards[shard][0]] == []


@given(SHARDS, BUSY)
def test_there_are_at_most_three_arrays_and_none_is_empty(shards: Shards, busy: frozenset[int]) -> None:
    plan = plan_submissions(counts(shards), busy)
    assert len(plan) <= 3
    assert all(submission.shards for submission in plan)


@given(SHARDS, st.randoms(use_true_random=False))
def test_the_order_of_the_counts_does_not_matter(shards: Shards, random: object) -> None:
    shuffled = counts(shards)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan_submissions(shuffled) == plan_submissions(counts(shards))


@given(st.integers(0, 12))
def test_a_finished_run_needs_nothing(num_shards: int) -> None:
    assert plan_submissions(counts([(0, 0)] * num_shards)) == ()


def test_a_run_whose_items_all_failed_needs_nothing() -> None:
    failed = [StageCount(stage=stage, shard=0, done=0, failed=5, missing=0) for stage in STAGES]
    assert plan_submissions(failed) == ()


def test_a_new_run_is_two_arrays() -> None:
    assert plan_submissions(counts([(3, 3), (3, 3)])) == (
        Submission(stage="first_frame", shards=(0, 1), after=False),
        Submission(stage="video", shards=(0, 1), after=True),
    )
