"""How fast a run is, what it has used and when it will be ready. Pure: reads no file, asks no scheduler, knows no clock.

Rates are of active time. A gap without a finished item that is longer than `pause_seconds` is a pause and does not count: so it
is when a run was resumed the day after. Each stretch between pauses begins one item's time before its first finished item.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ipt2v.effort import Effort

HOUR_SECONDS = 3600.0
# An element without a sign of life for so long is ended (stall_minutes of a cluster file): until then it may be loading a model
SHORTEST_PAUSE_SECONDS = 30 * 60.0
ITEMS_IN_A_PAUSE = 3  # gaps as long as the longest item are usual: one for each change of element
GAPS_IN_A_PAUSE = 15  # median gaps, of a sample, whose gaps are longer: of random ones one in 2**15 is so long


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """When something was finished, and how many items it stands for: more than one if it is of a sample."""

    at: float  # seconds of Unix time
    items: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Items per hour of active time."""

    last_hour: float  # the last hour of activity, or all of it if it was shorter
    overall: float
    active_hours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """Hours of GPUs, and of ranks on CPUs, that finished items have taken; not what was lost, and no start of an element."""

    gpu_hours: float
    cpu_rank_hours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds from now until all is made: between the two, if what was measured goes on."""

    low_seconds: float
    high_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds for which an element is at work on one item: most are between the two."""

    low_seconds: float
    high_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One that runs, or waits in the queue."""

    missing: int  # items of its own shard
    is_running: bool
    starts_in: float | None = None  # seconds, if something is known of one that waits


def rates(finished: Iterable[Finished], sampled: Sequence[Effort]) -> Rates | None:
    """Of one stage. None if nothing is finished, or nobody knows how long an item takes."""
    if not sampled:
        return None
    ends = active_ends(finished, sampled)
    if not ends or ends[-1][0] <= 0:
        return None
    active = ends[-1][0]
    window = min(active, HOUR_SECONDS)
    recent = _items_after(active - window, ends)
    total = sum(items for _, items in ends)
    per_hour = HOUR_SECONDS / window, HOUR_SECONDS / active
    return Rates(last_hour=recent * per_hour[0], overall=total * per_hour[1], active_hours=active / HOUR_SECONDS)


def active_ends(finished: Iterable[Finished], sampled: Sequence[Effort]) -> list[tuple[float, float]]:
    """(seconds of active time until then, items), in order of time."""
    events = sorted(finished, key=lambda one: one.at)
    lead = statistics.median(one.seconds for one in sampled)
    pause = pause_seconds(events, max(one.seconds for one in sampled))
    ends, active, before = [], 0.0, -math.inf
    for one in events:
        gap = one.at - before
        active += lead if gap > pause else gap
        ends.append((active, one.items))
        before = one.at
    return ends


def _items_after(start: float, ends: Sequence[tuple[float, float]]) -> float:
    """Items since then. What was begun before counts in part: else the last hour would jump by an item at its edge."""
    found, before = 0.0, 0.0
    for end, items in ends:
        if end > start or start <= 0:  # what took no time has ended when all began, in a window that is all there was
            found += items * (1.0 if before >= start else (end - start) / (end - before))
        before = end
    return found


def pause_seconds(events: Sequence[Finished], longest_item_seconds: float) -> float:
    """A gap between finished items, which are in order, is a pause if it is longer."""
    longest = max(SHORTEST_PAUSE_SECONDS, ITEMS_IN_A_PAUSE * longest_item_seconds)
    gaps = [after.at - before.at for before, after in pairwise(events)]
    if gaps and any(one.items > 1 for one in events):
        longest = max(longest, GAPS_IN_A_PAUSE * statistics.median_low(gaps))
    return longest


def used(sampled: Sequence[Effort], num_done: int) -> Used:
    """By `num_done` items, of which these are a sample, or all."""
    share = num_done / len(sampled) / HOUR_SECONDS if sampled else 0.0
    return Used(
        gpu_hours=share * sum(one.rank_seconds for one in sampled if one.on_gpu),
        cpu_rank_hours=share * sum(one.rank_seconds for one in sampled if not one.on_gpu),
    )


def pace(sampled: Sequence[Effort]) -> Pace | None:
    """The quartiles of what was measured; the mean, where that is outside of them: many items take its multiple."""
    seconds = sorted(one.pace_seconds for one in sampled)
    if not seconds:
        return None
    mean = statistics.fmean(seconds)
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return Pace(low_seconds=min(mean, first), high_seconds=max(mean, third))


def estimate_own(elements: Sequence[Element], each: Pace, at_once: int) -> Estimate | None:
    """Until every element has made its own shard. None if nothing runs and nothing is known of when it will.

    At best what waits starts at once, as far as `at_once` elements may run; at worst when it is expected to, or else in the
    place of one that has ended.
    """
    work = [one for one in elements if one.missing]
    if not work:
        return Estimate(low_seconds=0, high_seconds=0)
    places = _places(work, at_once)
    if not places:
        return None
    running = sum(one.is_running for one in work)
    best = [(0.0, (one.missing - one.is_running) * each.low_seconds) for one in work]
    worst = [(one.starts_in or 0.0, one.missing * each.high_seconds) for one in _in_order(work)]
    low = _last_end(best, [0.0] * min(len(work), max(at_once, running)))
    return _estimate(low, _last_end(worst, places))


def estimate_shared(num_missing: int, elements: Sequence[Element], each: Pace, at_once: int) -> Estimate | None:
    """Until all items are made, where elements that have made their own shard go on with others'. None as above.

    At best all that waits starts at once, and the items in work are almost done; at worst only what runs, or is expected, is
    there, and the last item is begun when all others are done.
    """
    if not num_missing:
        return Estimate(low_seconds=0, high_seconds=0)
    places = _places(elements, at_once)
    if not places:
        return None
    running = sum(one.is_running for one in elements)
    workers = min(len(elements), max(at_once, running))
    low = max(0, num_missing - running) * each.low_seconds / workers
    return _estimate(low, _filled((num_missing - 1) * each.high_seconds, places) + each.high_seconds)


def estimate_by_rate(num_missing: int, found: Rates) -> Estimate | None:
    """Until all is made if items are finished as in the last hour, or as all the time."""
    slow, fast = sorted((found.last_hour, found.overall))
    if slow <= 0:
        return None
    return Estimate(low_seconds=num_missing / fast * HOUR_SECONDS, high_seconds=num_missing / slow * HOUR_SECONDS)


def later(one: Estimate, other: Estimate) -> Estimate:
    """Until both are over."""
    return Estimate(low_seconds=max(one.low_seconds, other.low_seconds), high_seconds=max(one.high_seconds, other.high_seconds))


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0..count-1, evenly spread, both ends among them."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / max(1, most - 1)) for index in range(most)]


def _places(elements: Sequence[Element], at_once: int) -> list[float]:
    """Seconds until each place that can be counted on is there."""
    running = [0.0 for one in elements if one.is_running]
    expected = sorted(max(0.0, one.starts_in) for one in elements if not one.is_running and one.starts_in is not None)
    return [*running, *expected[: max(0, at_once - len(running))]]


def _in_order(elements: Sequence[Element]) -> list[Element]:
    """As they get their places: what runs, what is expected, the rest."""
    return sorted(elements, key=lambda one: (not one.is_running, one.starts_in is None, one.starts_in or 0.0))


def _last_end(work: Sequence[tuple[float, float]], places: Sequence[float]) -> float:
    """When the last of these (earliest start, seconds) ends, each in the place that is free first."""
    free = list(places)
    heapq.heapify(free)
    last = 0.0
    for start, seconds in work:
        end = max(heapq.heappop(free), start) + seconds
        heapq.heappush(free, end)
        last = max(last, end)
    return last


def _filled(seconds: float, places: Sequence[float]) -> float:
    """When so much work is done, shared evenly by all that are there by then."""
    starts = sorted(places)
    for count in range(1, len(starts) + 1):
        end = (seconds + sum(starts[:count])) / count
        if count == len(starts) or end <= starts[count]:
            return end
    return 0.0


def _estimate(low: float, high: float) -> Estimate:
    return Estimate(low_seconds=min(low, high), high_seconds=high)
