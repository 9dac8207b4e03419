"""Claims about the page of a report in a real browser: a thousand items, videos play, keys work, no prompt is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium, lacks_of_chromium, set_field, wait_for
from helpers import noise_frames, skip_if
from report_reader import made_up

from ipt2v.mp4 import write_mp4
from ipt2v.report_page import Card, Page, Shown, render

pytestmark = pytest.mark.browser

NUM_ITEMS = 1000
STEP_SECONDS = 0.1
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages, and 20 videos beside them; those of the second run are a little longer."""
    folder = tmp_path_factory.mktemp("browser")
    for name, num_frames in (("a", 33), ("b", 41)):
        (folder / name).mkdir()
        for number in range(10):
            write_mp4(folder / name / f"{number}.mp4", noise_frames(num_frames, 32, 48, seed=number), fps=16, crf=30)
    one = made_up("one", NUM_ITEMS, [f"a/{number}.mp4" for number in range(10)])
    two = made_up("two", 40, [f"b/{number}.mp4" for number in range(10)], seed=1)
    few = Shown(facts=one.facts, cards=dict(list(one.cards.items())[:40]))
    evil = Card(prompt=HOSTILE, spatial_prompt=HOSTILE, failure=f"video: {HOSTILE}", notes=(HOSTILE,), troubles=(HOSTILE,))
    hostile = Shown(facts=replace(one.facts, name=HOSTILE), cards={f"{HOSTILE}/p1": evil})
    for name, runs in (("one", (one,)), ("pair", (few, two)), ("hostile", (hostile,)), ("hostile_pair", (hostile, hostile))):
        (folder / f"{name}.html").write_text(render(Page(runs=runs)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, one for all tests of this file."""
    skip_if(lacks_of_chromium(), "tests/apt.txt")
    with chromium() as driver:
        yield driver


@pytest.fixture
def page(browser: Any, folder: Path) -> Any:
    """The browser, at the page of a thousand items."""
    return opened(browser, folder, "one")


@pytest.fixture
def pair(browser: Any, folder: Path) -> Any:
    """The browser, at the page of two runs."""
    return opened(browser, folder, "pair")


def opened(browser: Any, folder: Path, name: str) -> Any:
    browser.get((folder / f"{name}.html").as_uri())
    browser.get_log("browser")
    return browser


def keys_shown(page: Any) -> list[str]:
    return page.execute_script("return [...document.querySelectorAll('.card')].map((card) => card.dataset.key)")


def press(page: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(*keys).perform()


def test_a_thousand_items_open(page: Any) -> None:
    assert len(keys_shown(page)) == NUM_ITEMS


def test_only_what_is_near_the_window_has_content(page: Any) -> None:
    count = "return document.querySelectorAll('.card:not(:empty)').length"
    assert 0 < page.execute_script(count) < 40
    last = "document.querySelector('.card:last-child')"
    page.execute_script(f"{last}.scrollIntoView()")
    wait_for(page, f"return {last}.firstChild !== null && document.querySelector('.card').firstChild === null")
    assert page.execute_script(count) < 40


def test_a_search_leaves_the_items_with_all_its_words(page: Any) -> None:
    for text in ("p", "pers", "person 42", "", "DOOR 777 person"):
        set_field(page, "query", text)
    assert keys_shown(page) == ["person0155/prompt3"]
    assert page.find_element("id", "count").text == f"1 of {NUM_ITEMS} items"


def test_items_of_one_person_and_of_one_state(page: Any) -> None:
    set_field(page, "identity", "person0007")
    assert keys_shown(page) == [f"person0007/prompt{number}" for number in range(1, 6)]
    set_field(page, "identity", "")
    set_field(page, "state", "failed")
    assert len(keys_shown(page)) == NUM_ITEMS // 50
    set_field(page, "state", "rejected")
    assert keys_shown(page) == []
    assert page.find_element("id", "nothing").is_displayed()


@pytest.mark.parametrize("is_descending", [False, True])
def test_items_without_a_score_are_last_in_either_order(page: Any, is_descending: bool) -> None:
    if is_descending:
        page.find_element("id", "direction").click()
    set_field(page, "sort", "scores arc_sim 0")
    values = page.execute_script(
        "return [...document.querySelectorAll('.card')].map((card) => card.item.takes[0].scores.arc_sim)"
    )
    num_known = NUM_ITEMS * 9 // 10
    assert values[:num_known] == sorted(values[:num_known], reverse=is_descending)
    assert values[num_known:] == [None] * (NUM_ITEMS - num_known)


def test_a_video_plays_when_asked_to_and_not_before(page: Any) -> None:
    assert page.execute_script("return document.querySelector('video').networkState") != 2  # preload=none
    press(page, "j", " ")
    wait_for(page, "return document.querySelector('video').currentTime > 0.2")
    press(page, " ")
    assert page.execute_script("return document.querySelector('video').paused")


def test_keys_search_walk_and_clear(page: Any) -> None:
    focused = "return document.activeElement.dataset.key"
    press(page, "j", "j", "k", "j", "j")
    assert page.execute_script(focused) == "person0000/prompt3"
    press(page, "/", "d", "o", "o", "r", " ", "9", "9", "9")
    assert keys_shown(page) == ["person0199/prompt5"]
    press(page, "\ue00c")  # Escape
    assert len(keys_shown(page)) == NUM_ITEMS
    press(page, "?")
    assert page.execute_script("return document.getElementById('keys').open")
    press(page, "\ue00c")
    assert not page.execute_script("return document.getElementById('keys').open")


def test_a_key_among_the_failures_leads_to_its_item(page: Any) -> None:
    set_field(page, "identity", "person0007")
    page.execute_script("document.querySelector('[data-item=\"57\"]').click()")
    assert page.execute_script("return document.activeElement.dataset.key") == "person0011/prompt3"


def test_two_videos_play_in_step_and_begin_again_together(pair: Any) -> None:
    wait_for(pair, "return document.querySelector('.play')").click()
    pair.execute_script("document.querySelector('.card video').playbackRate = 1.15")  # left alone, 0.3 s ahead after two
    wait_for(pair, "return [...document.querySelectorAll('.card video')].slice(0, 2).every((one) => one.currentTime > 0.3)")
    samples = pair.execute_async_script(
        """const done = arguments[0], videos = [...document.querySelector('.card').querySelectorAll('video')], found = [];
        const look = () => {
          found.push([...videos.map((one) => one.currentTime), videos.some((one) => one.seeking)]);
          if (found.length < 120) setTimeout(look, 30); else done(found);
        };
        look();"""
    )
    shorter = 33 / 16
    steady = [(a, b) for a, b, is_seeking in samples if not is_seeking and b < shorter - 0.1]
    apart = sorted(abs(a - b) for a, b in steady)
    assert len(steady) > 30
    assert apart[len(apart) // 2] < STEP_SECONDS  # a busy machine stalls one of them now and then
    leads = [b for _, b, _ in samples]
    assert any(after < before - 1 for before, after in pairwise(leads))  # it began again
    pair.find_element("css selector", ".play").click()
    a, b = pair.execute_script(
        "return [...document.querySelector('.card').querySelectorAll('video')].map((one) => one.currentTime)"
    )
    assert abs(min(a, shorter) - min(b, shorter)) < STEP_SECONDS


def test_two_runs_show_their_difference_and_sort_by_it(pair: Any) -> None:
    rows = pair.execute_script(
        "return [...document.querySelector('.card').querySelectorAll('.pair div')].map((row) => row.innerText.split(/\\s+/))"
    )
    [a, b, change] = [float(value) for value in next(row for row in rows if row[0] == "Arc-Sim↑")[1:]]
    assert change == pytest.approx(b - a, abs=2e-3)
    set_field(pair, "sort", "scores arc_sim change")
    changes = pair.execute_script(
        "const change = ({ item: { takes: [a, b] } }) => b.scores.arc_sim - a.scores.arc_sim;"
        "return [...document.querySelectorAll('.card')].map(change)"
    )[:36]
    assert changes == sorted(changes)


@pytest.mark.parametrize("name", ["hostile", "hostile_pair"])
def test_a_hostile_name_does_no_harm(browser: Any, folder: Path, name: str) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    page = opened(browser, folder, name)
    set_field(page, "query", "img")
    assert keys_shown(page) == [f"{HOSTILE}/p1"]
    assert page.execute_script("return document.querySelectorAll('img').length") == 0
    assert page.find_element("css selector", ".card h3").text == f"{HOSTILE}/p1"
    with pytest.raises(NoAlertPresentException):
        _ = page.switch_to.alert
    assert page.get_log("browser") == []


def test_nothing_but_its_own_script_runs(page: Any) -> None:
    page.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.harm = 1\">')")
    refused = wait_for(page, "return performance.now() > 300") and page.get_log("browser")
    assert any("Content Security Policy" in entry["message"] for entry in refused)
    assert page.execute_script("return window.harm") is None


def test_a_phone_scrolls_in_one_direction(browser: Any, folder: Path) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        for name in ("one", "pair"):
            assert opened(browser, folder, name).execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
