"""Claims about what is submitted, for any progress and any queue."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ipt2v.run_dir import STAGES, StageCount
from launch.plan import Living, Submission, plan_submissions

# a shard: (first frames missing, videos missing); a video is missing at least where its first frame is
Shards = list[tuple[int, int]]
SHARDS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)).map(lambda pair: (pair[0], max(pair))), max_size=12)
SETS = st.frozensets(st.integers(0, 12), max_size=12)


def in_queue(stage: str, live: frozenset[int], job_id: str | None = "17") -> tuple[Living, ...]:
    """An array of all shards, of which some live."""
    everything = tuple(range(13))
    return (Living(stage=stage, job_id=job_id, shards=everything, tasks=everything, live=live),) if live else ()


def counts(shards: Shards) -> list[StageCount]:
    return [
        StageCount(stage=stage, shard=shard, done=3 - missing[index], failed=0, missing=missing[index])
        for index, stage in enumerate(STAGES)
        for shard, missing in enumerate(shards)
    ]


def places(plan: tuple[Submission, ...], stage: str) -> list[int]:
    """Every shard as often as the plan makes it."""
    return sorted(shard for submission in plan if submission.stage == stage for shard in submission.shards)


@given(SHARDS, SETS, SETS)
def test_every_shard_with_something_missing_is_in_the_queue_or_submitted_once_in_each_stage_that_misses_it(
    shards: Shards, first_frames: frozenset[int], videos: frozenset[int]
) -> None:
    plan = plan_submissions(counts(shards), in_queue("first_frame", first_frames) + in_queue("video", videos))
    busy = {"first_frame": first_frames | videos, "video": videos}
    for index, stage in enumerate(STAGES):
        expected = [shard for shard, missing in enumerate(shards) if missing[index] and shard not in busy[stage]]
        assert places(plan, stage) == expected


@given(SHARDS, SETS)
def test_shards_that_nothing_can_wait_for_are_left_alone(shards: Shards, live: frozenset[int]) -> None:
    plan = plan_submissions(counts(shards), in_queue("first_frame", live, job_id=None))
    assert not any(live & set(submission.shards) for submission in plan)


@given(SHARDS, SETS, SETS)
def test_videos_of_first_frames_in_the_queue_wait_for_those(
    shards: Shards, first_frames: frozenset[int], videos: frozenset[int]
) -> None:
    plan = plan_submissions(counts(shards), in_queue("first_frame", first_frames) + in_queue("video", videos))
    joined = [shard for one in plan if one.living and one.living.job_id == "17" for shard in one.shards]
    assert joined == [shard for shard, (_, missing) in enumerate(shards) if missing and shard in first_frames - videos]


def test_of_two_arrays_with_a_shard_the_later_is_waited_for() -> None:
    older, newer = in_queue("first_frame", frozenset({0, 1}), "17"), in_queue("first_frame", frozenset({1}), "18")
    plan = plan_submissions(counts([(1, 1), (1, 1)]), older + newer)
    assert [(one.living and one.living.job_id, one.shards) for one in plan] == [("17", (0,)), ("18", (1,))]


@given(SHARDS, SETS)
def test_the_array_that_waits_has_the_elements_of_the_one_before_it_in_its_order(shards: Shards, live: frozenset[int]) -> None:
    plan = plan_submissions(counts(shards), in_queue("first_frame", live))
    for before, submission in zip((None, *plan), plan, strict=False):
        assert submission.after == (before is not None and before.stage == "first_frame")
        assert not submission.after or (before is not None and submission.shards == before.shards)


@given(SHARDS, SETS)
def test_videos_whose_first_frames_are_missing_wait_for_them(shards: Shards, live: frozenset[int]) -> None:
    plan = plan_submissions(counts(shards), in_queue("video", live))
    at_once = [shard for one in plan if one.stage == "video" and not one.after for shard in one.shards]
    assert [shard for shard in at_once if shards[shard][0]] == []


@given(SHARDS, SETS)
def test_there_are_at_most_three_arrays_and_those_that_join_one_in_the_queue(shards: Shards, live: frozenset[int]) -> None:
    plan = plan_submissions(counts(shards), in_queue("first_frame", live))
    assert len(plan) <= 3 + (1 if live else 0)
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
