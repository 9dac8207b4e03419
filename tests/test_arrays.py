"""Claims about how a plan is cut into arrays, for any plan and any site."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ipt2v.run_dir import STAGES
from launch.arrays import Array, divided, plan_arrays
from launch.plan import Living, Submission

SHARDS = st.sets(st.integers(0, 60), min_size=1, max_size=40).map(lambda shards: tuple(sorted(shards)))
SIZES = st.integers(1, 12)


def arrays(*plan: Submission, size: int, parallelism: int = 256) -> tuple[Array, ...]:
    return plan_arrays(plan, max_array_size=size, parallelism=dict.fromkeys(STAGES, parallelism))


def chained(shards: tuple[int, ...]) -> tuple[Submission, ...]:
    return tuple(Submission(stage=stage, shards=shards, after=stage != "first_frame") for stage in STAGES)


@given(SHARDS, SHARDS, SIZES)
def test_every_element_of_the_plan_is_in_one_array(shards: tuple[int, ...], ready: tuple[int, ...], size: int) -> None:
    plan = (*chained(shards), Submission(stage="video", shards=ready, after=False))
    cut = arrays(*plan, size=size)
    for number, submission in enumerate(plan):
        windows = [one for one in cut if one.submission == number]
        assert tuple(shard for one in windows for shard in one.shards) == submission.shards
        assert [one.window for one in windows] == list(range(len(windows)))


@given(SHARDS, SIZES)
def test_no_index_reaches_the_limit(shards: tuple[int, ...], size: int) -> None:
    for one in arrays(*chained(shards), size=size):
        assert one.tasks == tuple(range(len(one.shards)))
        assert len(one.tasks) <= size


@given(SHARDS, SIZES)
def test_an_array_that_waits_comes_right_after_the_one_it_waits_for_with_the_same_elements(
    shards: tuple[int, ...], size: int
) -> None:
    cut = arrays(*chained(shards), size=size)
    for start in range(0, len(cut), 3):
        column = cut[start : start + 3]
        assert [(one.stage, one.after) for one in column] == list(zip(STAGES, (False, True, True), strict=True))
        assert len({(one.shards, one.tasks, one.window) for one in column}) == 1


@given(SHARDS, st.data())
def test_an_array_that_joins_one_in_the_queue_has_indices_of_that_one(shards: tuple[int, ...], data: st.DataObject) -> None:
    tasks = tuple(index + 3 for index in range(len(shards)))
    some = tuple(sorted(data.draw(st.sets(st.sampled_from(shards), min_size=1))))
    alive = Living(stage="first_frame", job_id="17", shards=shards, tasks=tasks, live=frozenset(some))
    plan = Submission(stage="video", shards=some, after=False, living=alive), Submission(stage="score", shards=some, after=True)
    one, scores = arrays(*plan, size=3)
    assert (one.parent, one.after, one.shards) == ("17", False, some)
    assert [tasks[shards.index(shard)] for shard in some] == list(one.tasks)
    assert (scores.parent, scores.after, scores.shards, scores.tasks) == (None, True, some, one.tasks)


@given(st.integers(1, 300), st.lists(st.integers(1, 1001), min_size=1, max_size=20))
def test_what_may_run_at_once_is_divided_by_size_with_something_for_each(total: int, sizes: list[int]) -> None:
    parts = divided(total, sizes)
    assert sum(parts) == min(max(total, len(sizes)), sum(sizes))
    assert all(1 <= part <= size for part, size in zip(parts, sizes, strict=True))
    by_size = sorted(zip(sizes, parts, strict=True))
    assert all(fewer <= more for (small, fewer), (large, more) in pairwise(by_size) if small < large)


@given(SHARDS, SIZES, st.integers(1, 100))
def test_a_stage_never_runs_more_at_once_than_asked_for_unless_it_has_more_arrays(
    shards: tuple[int, ...], size: int, parallelism: int
) -> None:
    cut = arrays(*chained(shards), size=size, parallelism=parallelism)
    for stage in STAGES:
        mine = [one.parallelism for one in cut if one.stage == stage]
        assert sum(mine) == min(max(parallelism, len(mine)), len(shards))
