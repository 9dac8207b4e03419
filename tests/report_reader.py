"""A report as a program reads it: its markup, the items that its script lays out, and pages of items that no run has made."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from typing import Any

import numpy as np

from ipt2v.report import thumbnail
from ipt2v.report_page import Card, RunFacts, Shown, StageFacts

CELLS = {"td", "th", "tr", "small", "dt", "dd", "button"}  # no two of them run together on a screen


class Page(HTMLParser):
    """What a browser makes of a page before its script runs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source, self.text = text, ""
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self._inside = ""
        self.feed(text)
        self.data: dict[str, Any] = json.loads(self._script("data"))
        blocks = [json.loads(body) for attributes, body in self.scripts if attributes.get("class") == "block"]
        self.pictures = [base64.b64decode(picture) for block in blocks for picture in block]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        self._inside = tag
        self.text += " " if tag in CELLS else ""
        if tag == "script":
            self.scripts.append((attributes, ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes, body = self.scripts[-1]
            self.scripts[-1] = (attributes, body + data)
        elif self._inside != "style":
            self.text += data

    def _script(self, name: str) -> str:
        [body] = [body for attributes, body in self.scripts if attributes.get("id") == name]
        return body

    def names(self) -> set[str]:
        return {name for name, _ in self.tags}

    def items(self) -> dict[str, list[Any]]:
        """key -> takes."""
        return {item["key"]: item["takes"] for item in self.data["items"]}

    def take(self, key: str, run: int = 0) -> dict[str, Any]:
        return self.items()[key][run]


def facts(name: str = "run", *, done: int = 0) -> RunFacts:
    stages = ("first_frame", "video")
    return RunFacts(
        name=name,
        digest="0" * 64,
        code_version="0.1.0",
        frozen="2025-01-01T00:00:00+00:00",
        last_record="",
        num_frames=17,
        width=96,
        height=64,
        fps=16,
        is_toy=False,
        is_rehearsal=False,
        stages=tuple(
            StageFacts(stage=stage, done=done, failed=0, missing=0, seconds=60.0, gpu_hours=1.5, cpu_rank_hours=0.0)
            for stage in stages
        ),
        problems=(),
    )


def made_up(name: str, num_items: int, videos: list[str], *, seed: int = 0) -> Shown:
    """A run of so many items, five of each person, each with four pictures as large as those of a real run."""
    random = np.random.default_rng(seed)
    ramp_HW = np.add.outer(np.arange(135), np.arange(240)) % 256
    pictures = [thumbnail(_grainy(ramp_HW, random)) for _ in range(40)]
    cards = {}
    for index in range(num_items):
        key = f"person{index // 5:04d}/prompt{index % 5 + 1}"
        own = index.to_bytes(4, "big")  # behind the end of a JPEG nobody looks; it makes the bytes differ
        cards[key] = Card(
            prompt=f"Person {index // 5} opens door number {index} and smiles at whoever stands behind it. " * 3,
            spatial_prompt=f"a person in a coat of colour {index}, close-up, soft light " * 4,
            temporal_prompt=f"The person opens door {index}, pauses, looks up and begins to smile. " * 4,
            reference=pictures[index // 5 % 40] + (index // 5).to_bytes(4, "big"),
            cutout=pictures[index % 40] + own,
            first_frame=pictures[(index + 13) % 40] + own,
            still=pictures[(index + 29) % 40] + own,
            video=videos[index % len(videos)],
            failure="video: no face in frame 3" if index % 50 == 7 else "",
            scores={"arc_sim": None if index % 10 == 3 else float(random.normal(0.3, 0.1)), "aq": index / num_items},
            no_score={"arc_sim": "no face"} if index % 10 == 3 else {},
            seconds={"first_frame": float(random.gamma(9)), "video": 60 + float(random.gamma(9))},
            similarity=0.5,
            num_attempts=3,
        )
    return Shown(facts=facts(name, done=num_items), cards=cards)


def _grainy(ramp_HW: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A picture that a JPEG file of about 6 KB holds, like a frame of a real video."""
    noise_HWC = random.integers(0, 24, (*ramp_HW.shape, 3))
    return ((ramp_HW[..., None] + noise_HWC) % 256).astype(np.uint8)
