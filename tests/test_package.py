"""Claims about the leaderboard's archive: only videos that are right, under the right names, the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import frozen_run, noise_frames
from PIL import Image

from ipt2v.mp4 import write_mp4
from ipt2v.package import ARCHIVE_NAME, write_package
from ipt2v.run_dir import RunDir

TREE_NAMES = [f"submission/id00{identity}/prompt{number}.mp4" for identity in (1, 2) for number in (1, 2)]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two identities with two prompts each, of a test set in the layout of 2025; nothing made."""
    return frozen_run(tmp_path)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four videos as configs/demo.yaml asks for them."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        write_mp4(folder / f"{number}.mp4", noise_frames(seed=number), fps=16, crf=18)
    return sorted(folder.iterdir())


@pytest.fixture
def finished(run: RunDir, videos: list[Path]) -> RunDir:
    """The same, every video delivered."""
    return deliver(run, videos)


def deliver(run: RunDir, videos: list[Path]) -> RunDir:
    for item, video in zip(run.manifest(), videos, strict=False):
        run.mp4_path(item.key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(video, run.mp4_path(item.key))
    return run


def evaljson_run(tmp_path: Path) -> RunDir:
    """A run of a test set in the layout of 2026, with two prompts for one photo."""
    testset = tmp_path / "testset"
    (testset / "images").mkdir(parents=True)
    Image.new("RGB", (32, 24)).save(testset / "images" / "anna.png")
    entries = [{"img": "images/anna.png", "prompt": prompt} for prompt in ("She walks.", "She sits.")]
    (testset / "eval.json").write_text(json.dumps(entries))
    return frozen_run(tmp_path)


def entries(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as file:
        return {name: file.read(name) for name in file.namelist()}


def error_of(run: RunDir) -> str:
    with pytest.raises(ValueError) as caught:
        write_package(run)
    text = str(caught.value)
    assert "\n" not in text
    assert not run.package_path.exists()
    return text


def test_an_archive_of_2025_has_a_folder_for_each_identity(finished: RunDir) -> None:
    assert list(entries(write_package(finished).archive)) == TREE_NAMES


def test_an_archive_of_2026_numbers_its_videos(tmp_path: Path, videos: list[Path]) -> None:
    run = deliver(evaljson_run(tmp_path), videos)
    assert list(entries(write_package(run).archive)) == ["submission/1.mp4", "submission/2.mp4"]


def test_an_archive_holds_the_delivered_bytes(finished: RunDir) -> None:
    packed = entries(write_package(finished).archive)
    delivered = [finished.mp4_path(item.key).read_bytes() for item in finished.manifest()]
    assert [packed[name] for name in TREE_NAMES] == delivered


def test_videos_are_stored_not_deflated(finished: RunDir) -> None:
    with zipfile.ZipFile(write_package(finished).archive) as file:
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        assert file.testzip() is None


def test_equal_videos_give_equal_archives(tmp_path: Path, videos: list[Path]) -> None:
    one, two = (write_package(deliver(frozen_run(tmp_path / name), videos)) for name in ("one", "two"))
    assert one.archive.read_bytes() == two.archive.read_bytes()


def test_the_checksums_are_those_of_the_videos_and_the_archive(finished: RunDir) -> None:
    package = write_package(finished)
    listed = [line.split("  ") for line in (finished.package_path / "sha256.txt").read_text().splitlines()]
    expected = entries(package.archive) | {ARCHIVE_NAME: package.archive.read_bytes()}
    assert {name: digest for digest, name in listed} == {
        name: hashlib.sha256(data).hexdigest() for name, data in expected.items()
    }


def test_a_missing_video_is_named(finished: RunDir) -> None:
    finished.mp4_path("id001/prompt2").unlink()
    assert error_of(finished).startswith(f"{finished.root}: 1 of 4 videos are missing (id001/prompt2); ")


def test_many_missing_videos_are_counted(run: RunDir) -> None:
    assert "4 of 4 videos are missing (id001/prompt1, id001/prompt2, id002/prompt1, ...)" in error_of(run)


def test_what_is_missing_can_be_left_out(finished: RunDir) -> None:
    finished.mp4_path("id001/prompt2").unlink()
    package = write_package(finished, allow_missing=True)
    assert (package.num_videos, package.missing) == (3, ("id001/prompt2",))
    assert list(entries(package.archive)) == [name for name in TREE_NAMES if name != "submission/id001/prompt2.mp4"]


@pytest.mark.parametrize(
    ("frames_THWC", "fps", "reason"),
    [
        (noise_frames(13), 16, "num_frames: found 13, expected 17"),
        (noise_frames(17, 64, 112), 16, "width: found 112, expected 96"),
        (noise_frames(17, 48, 96), 16, "height: found 48, expected 64"),
        (noise_frames(17), 24, "fps: found 24.0, expected 16.0"),
        (noise_frames(13, 48, 96), 16, "num_frames: found 13, expected 17; height: found 48, expected 64"),
    ],
    ids=["frames", "width", "height", "fps", "both"],
)
def test_a_video_that_is_not_as_the_settings_say_is_named(
    finished: RunDir, frames_THWC: np.ndarray, fps: int, reason: str
) -> None:
    path = finished.mp4_path("id002/prompt1")
    write_mp4(path, frames_THWC, fps=fps, crf=18)
    assert error_of(finished) == f"{path}: {reason}; delete it and submit again to make it anew"


@pytest.mark.parametrize("size", [0, 100])
def test_a_video_that_does_not_decode_is_named(finished: RunDir, size: int) -> None:
    path = finished.mp4_path("id002/prompt1")
    path.write_bytes(path.read_bytes()[:size])
    assert error_of(finished).startswith(f"{path}: not a decodable MP4")


def test_a_package_of_changed_settings_is_refused(finished: RunDir) -> None:
    finished.config_path.write_text(finished.config_path.read_text().replace("fps: 16", "fps: 24"))
    assert f"{finished.config_path}: digest" in error_of(finished)


def test_packing_again_replaces_the_archive(finished: RunDir) -> None:
    before = write_package(finished).archive.read_bytes()
    write_mp4(finished.mp4_path("id001/prompt1"), noise_frames(seed=99), fps=16, crf=18)
    assert write_package(finished).archive.read_bytes() != before
    assert sorted(path.name for path in finished.package_path.iterdir()) == [ARCHIVE_NAME, "sha256.txt"]
