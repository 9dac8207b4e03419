"""Claims about what is submitted, for any progress and any queue."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ipt2v.run_dir import STAGES, StageCount
from launch.plan import Living, Submission, plan_submissions

# a shard: first frames, videos, scores missing; a video is missing at least where its first frame is, its scores where it is
Shards = list[tuple[int, ...]]
SHARDS = st.lists(st.tuples(*[st.integers(0, 2)] * 3).map(lambda shard: tuple(sorted(shard))), max_size=12)
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


@given(SHARDS, SETS, SETS, SETS)
def test_every_shard_with_something_missing_is_in_the_queue_or_submitted_once_in_each_stage_that_misses_it(
    shards: Shards, first_frames: frozenset[int], videos: frozenset[int], scores: frozenset[int]
) -> None:
    queue = in_queue("first_frame", first_frames) + in_queue("video", videos) + in_queue("score", scores)
    plan = plan_submissions(counts(shards), queue)
    busy = {"first_frame": first_frames | videos | scores, "video": videos | scores, "score": scores}
    for index, stage in enumerate(STAGES):
        expected = [shard for shard, missing in enumerate(shards) if missing[index] and shard not in busy[stage]]
        assert places(plan, stage) == expected


@given(SHARDS, SETS)
def test_shards_that_nothing_can_wait_for_are_left_alone(shards: Shards, live: frozenset[int]) -> None:
    plan = plan_submissions(counts(shards), in_queue("first_frame", live, job_id=None))
    assert not any(live & set(submission.shards) for submission in plan)


@given(SHARDS, SETS, SETS)
def test_what_comes_after_a_stage_in_the_queue_waits_for_that(
    shards: Shards, first_frames: frozenset[int], videos: frozenset[int]
) -> None:
    plan = plan_submissions(counts(shards), in_queue("first_frame", first_frames) + in_queue("video", videos, "18"))
    for job_id, stage, live in (("17", 1, first_frames - videos), ("18", 2, videos)):
        joined = [shard for one in plan if one.living and one.living.job_id == job_id for shard in one.shards]
        assert sorted(joined) == [shard for shard, missing in enumerate(shards) if any(missing[stage:]) and shard in live]


def test_of_two_arrays_with_a_shard_the_later_is_waited_for() -> None:
    older, newer = in_queue("first_frame", frozenset({0, 1}), "17"), in_queue("first_frame", frozenset({1}), "18")
    plan = plan_submissions(counts([(1, 1, 0), (1, 1, 0)]), older + newer)
    assert [(one.living and one.living.job_id, one.shards) for one in plan] == [("17", (0,)), ("18", (1,))]


@given(SHARDS, SETS)
def test_the_array_that_waits_has_the_elements_of_the_one_before_it_in_its_order(shards: Shards, live: frozenset[int]) -> None:
    plan = plan_submissions(counts(shards), in_queue("first_frame", live))
    for before, submission in zip((None, *plan), plan, strict=False):
        assert not submission.after or (before is not None and submission.shards == before.shards)
        assert not submission.after or STAGES.index(submission.stage) > STAGES.index(before.stage if before else "score")


@given(SHARDS, SETS)
def test_no_stage_runs_before_the_one_that_it_needs(shards: Shards, live: frozenset[int]) -> None:
    plan = plan_submissions(counts(shards), in_queue("video", live))
    for index, stage in enumerate(STAGES[1:]):
        at_once = [shard for one in plan if one.stage == stage and not one.after and not one.living for shard in one.shards]
        assert [shard for shard in at_once if shards[shard][index]] == []


@given(SHARDS, SETS)
def test_shards_with_the_same_to_do_share_their_arrays(shards: Shards, live: frozenset[int]) -> None:
    plan = plan_submissions(counts(shards), in_queue("first_frame", live))
    assert len([one for one in plan if not one.after]) <= 3 + 2  # from each stage on, and what joins the queue
    assert all(submission.shards for submission in plan)


@given(SHARDS, st.randoms(use_true_random=False))
def test_the_order_of_the_counts_does_not_matter(shards: Shards, random: object) -> None:
    shuffled = counts(shards)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan_submissions(shuffled) == plan_submissions(counts(shards))


@given(st.integers(0, 12))
def test_a_finished_run_needs_nothing(num_shards: int) -> None:
    assert plan_submissions(counts([(0, 0, 0)] * num_shards)) == ()


def test_a_run_whose_items_all_failed_needs_nothing() -> None:
    failed = [StageCount(stage=stage, shard=0, done=0, failed=5, missing=0) for stage in STAGES]
    assert plan_submissions(failed) == ()


def test_a_new_run_is_an_array_for_each_stage() -> None:
    two = tuple(Submission(stage=stage, shards=(0, 1), after=stage != "first_frame") for stage in STAGES)
    assert plan_submissions(counts([(3, 3, 3), (3, 3, 3)])) == two
    assert plan_submissions(counts([(3, 3, 0), (3, 3, 0)])) == two[:2]
