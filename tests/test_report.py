"""Claims about the page to look at a run: it shows what is there, why the rest is not, and runs nothing that a prompt says."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers import first_frame, frozen_run, noise_frames, provenance, write_tree
from PIL import Image

from ipt2v import hdf5
from ipt2v.mp4 import write_mp4
from ipt2v.records import Failure
from ipt2v.report import write_report
from ipt2v.run_dir import RunDir, seal_shard

EVIL = "<script>alert('1')</script> & \"quotes\" {{ 7 * 7 }}"


class Page(HTMLParser):
    """What a browser makes of a page: its text, images, links and tags."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.text, self.images, self.links, self.tags = file, "", dict[str, str](), list[str](), set[str]()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        if tag == "img":
            self.images[values["alt"]] = values["src"]
        if tag == "a":
            self.links.append(values["href"])

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return frozen_run(tmp_path)


def make(run: RunDir, key: str, **fields: str) -> None:
    """One finished item."""
    digest = run.environment().run_digest
    hdf5.save_first_frame(run.part_path("first_frame", key), first_frame(key, **fields), provenance(digest))
    write_mp4(run.mp4_path(key), noise_frames(5), fps=16, crf=18)


def evil_run(tmp_path: Path, identity: str) -> RunDir:
    """A run of one identity with a name and a prompt that try to leave the page."""
    write_tree(tmp_path / "testset", (identity,), num_prompts=1)
    (tmp_path / "testset" / identity / "prompt1.txt").write_text(EVIL)
    return frozen_run(tmp_path)


def test_a_page_of_nothing_made_lists_every_item_with_its_photo(run: RunDir) -> None:
    page = Page(write_report(run))
    assert [item.key for item in run.manifest() if item.key not in page.text or item.prompt not in page.text] == []
    assert sorted(page.images) == [f"reference photo of {item.key}" for item in run.manifest()]
    assert page.links == []
    assert "4 items: 0 first frames, 0 videos" in " ".join(page.text.split())


def test_a_page_shows_what_is_made(run: RunDir) -> None:
    make(run, "id001/prompt2", spatial_prompt="a green hat")
    page = Page(write_report(run))
    assert "a green hat" in page.text and "She walks as id001/prompt2." in page.text
    expected = {"id001/prompt2, cut out on white", "first frame of id001/prompt2", "middle frame of id001/prompt2"}
    assert expected <= set(page.images)
    assert [run.root / link for link in page.links] == [run.mp4_path("id001/prompt2")]


def test_a_page_of_a_sealed_shard_is_the_same(run: RunDir) -> None:
    make(run, "id001/prompt1")
    before = write_report(run).read_bytes()
    seal_shard(run, "first_frame", 0, run.shard_keys(0))
    assert write_report(run).read_bytes() == before


def test_every_picture_is_in_the_page_itself(run: RunDir) -> None:
    make(run, "id001/prompt1")
    for source in Page(write_report(run)).images.values():
        head, _, data = source.partition(",")
        assert head == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= 240


def test_a_page_says_why_an_item_failed(run: RunDir) -> None:
    run.save_failure(Failure(key="id002/prompt1", stage="first_frame", reason="no face larger than 64 px <b>"))
    page = Page(write_report(run))
    assert "first_frame: no face larger than 64 px <b>" in page.text
    assert "b" not in page.tags


def test_a_photo_that_is_gone_is_told_and_spoils_no_page(run: RunDir) -> None:
    photo = Path(run.manifest()[0].reference)
    photo.unlink()
    page = Page(write_report(run))
    assert f"reference {photo} cannot be read" in page.text
    assert len(page.images) == 2


def test_prompts_and_identities_are_text_never_markup(tmp_path: Path) -> None:
    identity = '"><script>alert(2)<'
    run = evil_run(tmp_path, identity)
    make(run, f"{identity}/prompt1", spatial_prompt=EVIL)
    page = Page(write_report(run))
    assert "script" not in page.tags
    assert page.text.count(EVIL) == 2  # of the test set, and as spatial prompt
    assert identity in page.text


@pytest.mark.parametrize("identity", ["a#b", "a?b", "100%41", "with blank", "anna & bob", "名前"])
def test_the_link_to_a_video_leads_to_its_file(tmp_path: Path, identity: str) -> None:
    run = evil_run(tmp_path, identity)
    make(run, f"{identity}/prompt1")
    [link] = Page(write_report(run)).links
    assert run.root / unquote(link.partition("#")[0].partition("?")[0]) == run.mp4_path(f"{identity}/prompt1")


def test_toy_weights_are_announced(run: RunDir) -> None:
    assert "Toy weights" not in Page(write_report(run)).text
    (Path(run.environment().weights_dir) / "Qwen3-8B" / "TOY.txt").touch()
    assert "Toy weights" in Page(write_report(run)).text
