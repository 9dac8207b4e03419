"""A plan as the arrays that sbatch is given, one by one. Pure: reads no file, talks to no scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from launch.plan import Submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """One array: index tasks[i] of it makes shards[i]."""

    stage: str
    shards: tuple[int, ...]
    tasks: tuple[int, ...]
    submission: int  # which one of the plan this is a window of
    window: int
    parallelism: int  # elements that may run at once
    after: bool  # each index waits for the same index of the array before this one
    parent: str | None  # each index waits for the same index of this array, which is in the queue


def plan_arrays(plan: Iterable[Submission], *, max_array_size: int, parallelism: Mapping[str, int]) -> tuple[Array, ...]:
    """The arrays of a plan, none longer than the site allows, each with indices from 0: MaxArraySize limits the index itself.

    An array that waits comes right after the one that it waits for: a driver that dies leaves few of them apart. One that
    waits for an array in the queue has indices of that one: `aftercorr` pairs elements by index. The `parallelism` of a stage
    is divided over its arrays, since all may run at once.
    """
    columns: list[list[Array]] = []  # a window of each submission of a chain, in the order of waiting
    chained: list[list[Array]] = []  # those of the present chain
    for number, submission in enumerate(plan):
        if submission.after:
            for column in chained:
                # the same indices, whatever they are: `aftercorr` pairs by index
                column.append(replace(column[-1], stage=submission.stage, submission=number, after=True, parent=None))
        else:
            chained = [[window] for window in _windows(number, submission, max_array_size)]
            columns += chained
    arrays = list(chain.from_iterable(columns))
    throttles = {stage: iter(divided(parallelism[stage], _sizes(stage, arrays))) for stage in {one.stage for one in arrays}}
    return tuple(replace(one, parallelism=next(throttles[one.stage])) for one in arrays)


def divided(total: int, sizes: list[int]) -> list[int]:
    """`total` divided by size: at least 1 for each, so more in all where there are more sizes than that; at most its size."""
    if total >= sum(sizes):
        return sizes
    parts = [1] * len(sizes)
    for _ in range(total - len(sizes)):
        parts[min(range(len(sizes)), key=lambda index: ((parts[index] + 1) / sizes[index], index))] += 1
    return parts


def _windows(number: int, submission: Submission, max_array_size: int) -> list[Array]:
    shards, living = submission.shards, submission.living
    size = len(shards) if living else max_array_size  # what waits for an array in the queue is no longer than that one
    task = dict(zip(living.shards, living.tasks, strict=True)) if living else {}
    windows = []
    for window, start in enumerate(range(0, len(shards), size)):
        mine = shards[start : start + size]
        tasks = tuple(task[shard] for shard in mine) if living else tuple(range(len(mine)))
        windows.append(
            Array(
                stage=submission.stage,
                shards=mine,
                tasks=tasks,
                submission=number,
                window=window,
                parallelism=len(mine),
                after=submission.after,
                parent=living.job_id if living else None,
            )
        )
    return windows


def _sizes(stage: str, arrays: Iterable[Array]) -> list[int]:
    return [len(array.shards) for array in arrays if array.stage == stage]
