"""Seconds until Debian's Chromium shows a report of 1,000 items, and milliseconds of a search; ours and a plain page.

    python tests/bench/bench_report.py [--items 1000] [--runs 5]

Each item has four pictures of about 6 KB, three texts and a video. "plain" is what a template engine gives from the same items:
all of them laid out as markup, a search that hides what does not match. Medians of runs that take turns; the first, with cold
caches, is not counted.
"""

from __future__ import annotations

import argparse
import base64
import statistics
import sys
import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from chromium import chromium, set_field, wait_for  # noqa: E402
from helpers import noise_frames  # noqa: E402
from report_reader import made_up  # noqa: E402

from ipt2v.mp4 import write_mp4  # noqa: E402
from ipt2v.report_page import Card, Page, render  # noqa: E402

LOADED = "const t = performance.timing; return t.loadEventEnd > 0 ? (t.loadEventEnd - t.navigationStart) / 1000 : null"
SEARCHES = ("p", "pers", "person 42", "", "DOOR 777 person")
PLAIN_SEARCH = """
<script>
document.getElementById("query").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(" ");
  for (const card of document.querySelectorAll("article")) {
    const text = card.textContent.toLowerCase();
    card.hidden = !words.every((word) => text.includes(word));
  }
});
</script>
"""


def plain(cards: Mapping[str, Card]) -> str:
    """The items as markup and no more."""
    articles = []
    for key, card in cards.items():
        pictures = (card.reference, card.cutout, card.first_frame, card.still)
        images = "".join(f'<img src="data:image/jpeg;base64,{base64.b64encode(one).decode()}">' for one in pictures)
        texts = "".join(f"<p>{escape(text)}</p>" for text in (card.prompt, card.spatial_prompt, card.temporal_prompt))
        articles.append(f'<article><h3>{escape(key)}</h3>{images}{texts}<video src="{card.video}" controls></video></article>')
    return f'<!doctype html><meta charset="utf-8"><input id="query">{"".join(articles)}{PLAIN_SEARCH}'


def measured(browser: Any, page: Path) -> tuple[float, float]:
    """(seconds until it is loaded, milliseconds of the slowest search)."""
    browser.get("about:blank")
    browser.get(page.as_uri())
    seconds = float(wait_for(browser, LOADED, 60))
    return seconds, max(set_field(browser, "query", text) for text in SEARCHES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        folder = Path(name)
        videos = [f"{number}.mp4" for number in range(10)]
        for number, video in enumerate(videos):
            write_mp4(folder / video, noise_frames(33, 32, 48, seed=number), fps=16, crf=30)
        run = made_up("run", chosen.items, videos)
        pages = {"ours": render(Page(runs=(run,))), "plain": plain(run.cards)}
        for form, text in pages.items():
            (folder / f"{form}.html").write_text(text, encoding="utf-8")
        found: dict[str, list[tuple[float, float]]] = {form: [] for form in pages}
        for _ in range(chosen.runs + 1):
            for form in pages:
                found[form].append(measured(browser, folder / f"{form}.html"))
        print(f"{chosen.items} items\n| page | MB | seconds to load | ms of the slowest search |\n| --- | --- | --- | --- |")
        medians = {form: [statistics.median(values) for values in zip(*rows[1:], strict=True)] for form, rows in found.items()}
        for form, (seconds, milliseconds) in medians.items():
            print(f"| {form} | {len(pages[form]) / 1e6:.1f} | {seconds:.2f} | {milliseconds:.0f} |")
        ratios = [ours / theirs for ours, theirs in zip(medians["ours"], medians["plain"], strict=True)]
        print(f"| ours / plain | {len(pages['ours']) / len(pages['plain']):.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
