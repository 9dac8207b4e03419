"""Claims about rates and estimates: known answers, pauses that do not count, and more elements that never make it later."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt2v.effort import Effort
from ipt2v.records import reason_kind
from launch.rates import (
    Element,
    Estimate,
    Finished,
    Pace,
    Rates,
    active_ends,
    estimate_by_rate,
    estimate_own,
    estimate_shared,
    pace,
    rates,
    spread,
    used,
)

HOUR, DAY = 3600.0, 86400.0
START = 1.7e9
EACH = Pace(low_seconds=100, high_seconds=200)


def sampled(seconds: float, *, ranks: int = 1, on_gpu: bool = True) -> Effort:
    return Effort(
        stage="video", finished=START, seconds=seconds, rank_seconds=seconds * ranks, pace_seconds=seconds, on_gpu=on_gpu
    )


def one_after_the_other(count: int, seconds: float, begin: float = START) -> list[Finished]:
    """What one element finishes that began then."""
    return [Finished(at=begin + seconds * number) for number in range(1, count + 1)]


def found(finished: list[Finished], seconds: float) -> Rates:
    answer = rates(finished, [sampled(seconds)])
    assert answer is not None
    return answer


def running(*missing: int) -> list[Element]:
    return [Element(missing=num, is_running=True) for num in missing]


def waiting(*missing: int, starts_in: float | None = None) -> list[Element]:
    return [Element(missing=num, is_running=False, starts_in=starts_in) for num in missing]


# --- rates --------------------------------------------------------------------------------------------------------------


def test_ten_items_in_two_hours_are_five_an_hour() -> None:
    speed = found(one_after_the_other(10, 720), 720)
    assert (speed.last_hour, speed.overall, speed.active_hours) == pytest.approx((5, 5, 2))


def test_four_elements_at_once_are_four_times_as_fast() -> None:
    assert found(one_after_the_other(10, 720) * 4, 720).overall == pytest.approx(20)


def test_the_last_hour_tells_a_change_of_speed() -> None:
    slow = one_after_the_other(4, 1800)
    speed = found(slow + one_after_the_other(60, 60, slow[-1].at), 60)
    assert speed.last_hour == pytest.approx(60)
    assert speed.overall < 30


def test_a_run_that_is_younger_than_an_hour_has_one_rate() -> None:
    speed = found(one_after_the_other(5, 60), 60)
    assert speed.last_hour == speed.overall == pytest.approx(60)


def test_items_that_took_no_time_count_in_the_last_hour_too() -> None:
    speed = found([Finished(at=START + number) for number in (0, 0, 1, 2, 3)], 0)
    assert speed.last_hour == speed.overall == pytest.approx(5 / 3 * HOUR)


@pytest.mark.parametrize("pause", [HOUR, DAY, 30 * DAY])
def test_a_pause_does_not_spoil_the_rate(pause: float) -> None:
    first = one_after_the_other(10, 720)
    second = one_after_the_other(10, 720, first[-1].at + pause)
    speed = found(first + second, 720)
    assert (speed.last_hour, speed.overall, speed.active_hours) == pytest.approx((5, 5, 4))


def test_the_last_hour_of_activity_goes_back_beyond_a_pause() -> None:
    first = one_after_the_other(10, 720)
    assert found([*first, *one_after_the_other(1, 720, first[-1].at + DAY)], 720).last_hour == pytest.approx(5)


def test_long_items_are_no_pauses() -> None:
    speed = found(one_after_the_other(5, 2 * HOUR), 2 * HOUR)
    assert (speed.overall, speed.active_hours) == pytest.approx((0.5, 10))


def test_a_sample_tells_the_rate_of_all() -> None:
    every_fiftieth = [Finished(at=one.at, items=50) for one in one_after_the_other(10_000, 60)[::50]]
    assert found(every_fiftieth, 60).overall == pytest.approx(60, rel=0.02)


def test_a_pause_does_not_spoil_the_rate_of_a_sample() -> None:
    first = one_after_the_other(10_000, 60)
    second = one_after_the_other(10_000, 60, first[-1].at + 3 * DAY)
    every_fiftieth = [Finished(at=one.at, items=50) for one in (first + second)[::50]]
    assert found(every_fiftieth, 60).overall == pytest.approx(60, rel=0.05)


def test_nothing_finished_has_no_rate() -> None:
    assert rates([], []) is None
    assert rates([], [sampled(5)]) is None
    assert rates([Finished(at=START)], []) is None


EVENTS = st.lists(st.floats(0, 30 * DAY), min_size=1, max_size=40)


@given(offsets=EVENTS, seconds=st.floats(1, 3 * HOUR))
def test_active_time_is_never_longer_than_time_and_never_goes_back(offsets: list[float], seconds: float) -> None:
    ends = [end for end, _ in active_ends([Finished(at=START + one) for one in offsets], [sampled(seconds)])]
    assert ends == sorted(ends)
    assert ends[-1] <= max(offsets) - min(offsets) + seconds + 1e-3


@given(offsets=EVENTS, seconds=st.floats(1, 3 * HOUR), shift=st.floats(-DAY, DAY))
def test_rates_are_positive_and_do_not_depend_on_order_or_the_calendar(
    offsets: list[float], seconds: float, shift: float
) -> None:
    events = [Finished(at=START + round(one)) for one in offsets]
    speed = found(events, seconds)
    assert 0 < speed.last_hour < math.inf
    assert 0 < speed.overall < math.inf
    assert found([replace(one, at=one.at + round(shift)) for one in reversed(events)], seconds) == speed


# --- what was used ------------------------------------------------------------------------------------------------------


def test_gpu_hours_are_seconds_times_ranks_and_a_cpu_has_its_own() -> None:
    both = used([sampled(1800, ranks=8), sampled(1800, ranks=8), sampled(3600, ranks=2, on_gpu=False)], 3)
    assert (both.gpu_hours, both.cpu_rank_hours) == pytest.approx((8, 2))


def test_a_sample_stands_for_all() -> None:
    assert used([sampled(1800, ranks=8)] * 4, 1000).gpu_hours == pytest.approx(4000)


def test_nothing_is_used_by_nothing() -> None:
    assert used([], 0).gpu_hours == 0


# --- until when ---------------------------------------------------------------------------------------------------------


def test_nothing_finished_has_no_pace() -> None:
    assert pace([]) is None


def test_a_pace_has_the_mean_between_its_ends() -> None:
    skewed = pace([sampled(10)] * 9 + [sampled(1000)])
    assert skewed == Pace(low_seconds=10, high_seconds=109)
    assert pace([sampled(10)]) == Pace(low_seconds=10, high_seconds=10)


def test_the_longest_shard_decides_where_each_element_makes_its_own() -> None:
    even = Pace(low_seconds=60, high_seconds=60)
    skewed = estimate_own(running(100, 1, 1, 1), even, 4)
    assert skewed == Estimate(low_seconds=99 * 60, high_seconds=100 * 60)


def test_the_same_work_shared_takes_all_elements_a_quarter_of_it() -> None:
    even = Pace(low_seconds=60, high_seconds=60)
    shared = estimate_shared(103, running(100, 1, 1, 1), even, 4)
    assert shared is not None
    assert shared.low_seconds == pytest.approx(99 * 60 / 4)
    assert shared.high_seconds == pytest.approx(102 * 60 / 4 + 60)


def test_what_waits_takes_the_places_of_what_runs() -> None:
    even = Pace(low_seconds=60, high_seconds=60)
    assert estimate_own([*running(1), *waiting(1, 1)], even, 1) == Estimate(low_seconds=120, high_seconds=180)


def test_what_waits_is_at_best_started_at_once_as_far_as_the_array_allows() -> None:
    even = Pace(low_seconds=60, high_seconds=60)
    found = [estimate_own([*running(10), *waiting(10, 10, 10)], even, at_once) for at_once in (1, 2, 4)]
    assert [one.low_seconds for one in found if one] == [39 * 60, 20 * 60, 10 * 60]
    assert [one.high_seconds for one in found if one] == [40 * 60] * 3


def test_expected_starts_count_at_worst() -> None:
    estimate = estimate_shared(20, waiting(10, 10, starts_in=HOUR), EACH, 2)
    assert estimate is not None
    assert estimate.low_seconds == 1000
    assert estimate.high_seconds == HOUR + 19 * 200 / 2 + 200


@pytest.mark.parametrize("elements", [[], waiting(3, 3)])
def test_nothing_that_runs_or_is_expected_is_no_estimate(elements: list[Element]) -> None:
    assert estimate_shared(6, elements, EACH, 4) is None
    assert estimate_own(waiting(3, 3), EACH, 4) is None


def test_nothing_missing_takes_no_time() -> None:
    nothing = Estimate(low_seconds=0, high_seconds=0)
    assert estimate_shared(0, [], EACH, 1) == estimate_own([], EACH, 1) == nothing


def test_a_rate_that_goes_on_is_a_range_between_lately_and_always() -> None:
    estimate = estimate_by_rate(100, Rates(last_hour=20, overall=10, active_hours=9))
    assert estimate == Estimate(low_seconds=5 * HOUR, high_seconds=10 * HOUR)


ELEMENT = st.builds(
    Element,
    missing=st.integers(1, 30),
    is_running=st.booleans(),
    starts_in=st.one_of(st.none(), st.floats(0, DAY)),
).map(lambda one: replace(one, starts_in=None) if one.is_running else one)
ELEMENTS = st.lists(ELEMENT, min_size=1, max_size=12)


def ends(elements: list[Element], at_once: int) -> list[Estimate | None]:
    total = sum(one.missing for one in elements)
    return [estimate_own(elements, EACH, at_once), estimate_shared(total, elements, EACH, at_once)]


@given(elements=ELEMENTS, at_once=st.integers(1, 12))
def test_an_estimate_is_a_range_and_never_negative(elements: list[Element], at_once: int) -> None:
    for one in ends(elements, at_once):
        assert one is None or 0 <= one.low_seconds <= one.high_seconds < math.inf


@given(elements=ELEMENTS, more=ELEMENTS, at_once=st.integers(12, 24))
def test_elements_that_are_added_make_it_sooner_where_they_share(
    elements: list[Element], more: list[Element], at_once: int
) -> None:
    before = estimate_shared(100, elements, EACH, at_once)
    after = estimate_shared(100, [*elements, *more], EACH, at_once)
    if before is not None:
        assert after is not None
        assert after.low_seconds <= before.low_seconds + 1e-6
        assert after.high_seconds <= before.high_seconds + 1e-6


@given(elements=ELEMENTS, at_once=st.integers(12, 24), data=st.data())
def test_an_element_that_starts_makes_it_no_later(elements: list[Element], at_once: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(elements) - 1))
    started = [*elements]
    started[index] = Element(missing=elements[index].missing, is_running=True)
    for before, after in zip(ends(elements, at_once), ends(started, at_once), strict=True):
        if before is not None:
            assert after is not None
            assert after.low_seconds <= before.low_seconds + 1e-6
            assert after.high_seconds <= before.high_seconds + 1e-6


# --- small things -------------------------------------------------------------------------------------------------------


def test_reasons_that_differ_in_names_and_numbers_are_of_one_kind() -> None:
    first = reason_kind("id001/prompt1: face of 31 px in /data/id001/image.png, 'a.png'", "id001/prompt1")
    assert first == reason_kind("id2/p9: face of 7.5 px in /other/id2/image.png, 'b.png'", "id2/p9")
    assert first != reason_kind("id2/p9: no face in /other/id2/image.png", "id2/p9")


@given(count=st.integers(0, 3000), most=st.integers(1, 200))
def test_a_spread_is_ordered_without_doubles_and_as_large_as_asked_for(count: int, most: int) -> None:
    places = spread(count, most)
    assert places == sorted(set(places))
    assert len(places) == min(count, most)
    assert all(0 <= place < count for place in places)
