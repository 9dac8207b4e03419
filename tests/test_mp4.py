"""Claims about the examination of an MP4: whatever is damaged, it gives facts, and says so."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from helpers import noise_frames

from ipt2v.mp4 import examine_mp4, write_mp4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small MP4, 5 frames."""
    path = tmp_path_factory.mktemp("mp4") / "small.mp4"
    write_mp4(path, noise_frames(5, 32, 48), fps=16, crf=30)
    return path.read_bytes()


def test_a_whole_mp4_has_no_error(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(data)
    facts = examine_mp4(tmp_path / "a.mp4")
    assert (facts.num_frames, facts.error) == (5, "")


def test_no_flipped_bit_of_the_header_ends_the_examination(data: bytes, tmp_path: Path) -> None:
    path, at, found = tmp_path / "a.mp4", random.Random(0), Counter[str]()
    for place in range(data.index(b"mdat")):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << at.randrange(8)]) + data[place + 1 :])
        facts = examine_mp4(path)
        found["broken" if facts.error or not facts.num_frames else "decodes"] += 1
    assert min(found["broken"], found["decodes"]) > 100


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (b"avc1\0", b"avb1\0", "does not open (its codec is unknown)"),  # the sample entry, not the brand
        (b"\0\0\x02\0isom", b"\0\0\x02\0is\xefm", "does not open ('utf-8' codec can't decode byte 0xef"),
    ],
)
def test_a_header_that_pyav_does_not_expect_is_named(data: bytes, tmp_path: Path, old: bytes, new: bytes, error: str) -> None:
    assert data.count(old) == 1
    (tmp_path / "a.mp4").write_bytes(data.replace(old, new))
    facts = examine_mp4(tmp_path / "a.mp4")
    assert facts.error.startswith(error) and facts.num_frames == 0
