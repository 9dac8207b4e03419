"""Claims about record files: whole or not there, equal to what was saved, and telling when they are not."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import first_frame, noise_frames, provenance, run_python, video_latents

from ipt2v import hdf5
from ipt2v.atomic import replacing, write_text
from ipt2v.mp4 import inspect_mp4, read_mp4, write_mp4
from ipt2v.records import FirstFrame, TextEmbedding, VideoLatents

DIGEST, OTHER = "a1" * 32, "b2" * 32
KEYS = ("id010/prompt1", "id002/prompt2", "id002/prompt1", "anna karenina/prompt 1")


def same(left: object, right: object) -> bool:
    """Equality of records, arrays included, with their dtypes."""
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, FirstFrame | VideoLatents | TextEmbedding) and type(left) is type(right):
        return all(same(getattr(left, name), getattr(right, name)) for name in left.__slots__)
    return left == right


def save_parts(folder: Path, keys: tuple[str, ...] = KEYS, negative: str = "blurry") -> list[tuple[str, Path]]:
    """First frames of the keys as closed parts."""
    parts = [(key, folder / "parts" / f"{key}.h5") for key in keys]
    for key, path in parts:
        hdf5.save_first_frame(path, first_frame(key, negative=negative), provenance(DIGEST))
    return parts


def truncate(path: Path, share: float = 0.5) -> Path:
    os.truncate(path, int(path.stat().st_size * share))
    return path


# --- one file -----------------------------------------------------------------------------------------------------------


def test_a_file_appears_under_its_name_only_when_the_block_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    with replacing(target) as scratch:
        scratch.write_text("whole")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["file"]
    assert target.read_text() == "whole"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError, SystemExit])
def test_a_block_that_raises_leaves_the_old_content_and_no_scratch(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "file"
    write_text(target, "old")
    with pytest.raises(error), replacing(target) as scratch:
        scratch.write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"


def test_a_block_that_raises_leaves_nothing_where_nothing_was(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replacing(tmp_path / "file") as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_never_share_a_scratch(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as one, replacing(tmp_path / "file") as two:
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "file").read_text() == "one"  # the block that ends last


# --- HDF5 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", [None, 0.0, -0.25, 0.6180339887])
def test_a_first_frame_is_read_as_it_was_saved(tmp_path: Path, similarity: float | None) -> None:
    record = first_frame("id001/prompt1", similarity=similarity, spatial_prompt='a "red" coat, 红色, \u2028 {prompt}')
    hdf5.save_first_frame(tmp_path / "a.h5", record, provenance(DIGEST))
    assert same(hdf5.load_first_frame(tmp_path / "a.h5", record.key, run_digest=DIGEST), record)


def test_latents_and_their_provenance_are_read_as_they_were_saved(tmp_path: Path) -> None:
    record = video_latents("id001/prompt1")
    hdf5.save_video_latents(tmp_path / "a.h5", record, provenance(DIGEST))
    assert same(hdf5.load_video_latents(tmp_path / "a.h5", record.key, run_digest=DIGEST), record)
    assert hdf5.load_provenance(tmp_path / "a.h5", record.key, run_digest=DIGEST) == provenance(DIGEST)


def test_a_prompt_of_a_hundred_thousand_characters_is_kept(tmp_path: Path) -> None:
    record = first_frame("id001/prompt1", spatial_prompt="long " * 20_000)
    hdf5.save_first_frame(tmp_path / "a.h5", record, provenance(DIGEST))
    assert same(hdf5.load_first_frame(tmp_path / "a.h5", record.key, run_digest=DIGEST), record)


@pytest.mark.parametrize("load", [hdf5.load_first_frame, hdf5.load_provenance])
def test_a_record_of_another_run_is_refused_with_both_digests(tmp_path: Path, load: Callable[..., object]) -> None:
    [(key, path)] = save_parts(tmp_path, KEYS[:1])
    with pytest.raises(ValueError) as caught:
        load(path, key, run_digest=OTHER)
    assert str(caught.value).startswith(f"{path}: record {key} was made by run {DIGEST[:12]}, expected {OTHER[:12]}; ")


def test_a_record_without_a_first_frame_comes_back_without_one(tmp_path: Path) -> None:
    record = replace(first_frame(KEYS[0]), image_HWC=None)
    hdf5.save_first_frame(tmp_path / "a.h5", record, provenance(DIGEST))
    assert same(hdf5.load_first_frame(tmp_path / "a.h5", KEYS[0], run_digest=DIGEST), record)


def test_a_sealed_shard_lists_its_keys_in_the_order_given(tmp_path: Path) -> None:
    hdf5.seal(tmp_path / "000.h5", save_parts(tmp_path))
    assert hdf5.sealed_keys(tmp_path / "000.h5") == KEYS


def test_a_sealed_shard_of_nothing_has_no_keys(tmp_path: Path) -> None:
    hdf5.seal(tmp_path / "000.h5", [])
    assert hdf5.sealed_keys(tmp_path / "000.h5") == ()


def test_a_sealed_shard_holds_each_distinct_text_once(tmp_path: Path) -> None:
    hdf5.seal(tmp_path / "000.h5", save_parts(tmp_path))
    with h5py.File(tmp_path / "000.h5") as file:
        texts = sorted(dataset.attrs["text"] for dataset in file["texts"].values())
    assert texts == sorted(["blurry", *(f"She walks as {key}." for key in KEYS)])


def test_a_sealed_shard_holds_each_distinct_reference_photo_once(tmp_path: Path) -> None:
    hdf5.seal(tmp_path / "000.h5", save_parts(tmp_path))
    with h5py.File(tmp_path / "000.h5") as file:
        photos = [dataset[...] for dataset in file["references"].values()]
    distinct = {first_frame(key).reference_HWC.tobytes() for key in KEYS}
    assert 1 < len(distinct) < len(KEYS)
    assert sorted(photo.tobytes() for photo in photos) == sorted(distinct)


def test_a_sealed_record_equals_its_part(tmp_path: Path) -> None:
    hdf5.seal(tmp_path / "000.h5", save_parts(tmp_path))
    assert all(same(hdf5.load_first_frame(tmp_path / "000.h5", key, run_digest=DIGEST), first_frame(key)) for key in KEYS)
    assert {hdf5.load_provenance(tmp_path / "000.h5", key, run_digest=DIGEST).seed for key in KEYS} == {7}


def test_sealing_again_merges_a_new_part_with_what_is_sealed(tmp_path: Path) -> None:
    shard, parts = tmp_path / "000.h5", save_parts(tmp_path)
    hdf5.seal(shard, parts[:2])
    hdf5.seal(shard, [(key, shard) for key, _ in parts[:2]] + parts[2:])
    assert hdf5.sealed_keys(shard) == KEYS
    assert all(same(hdf5.load_first_frame(shard, key, run_digest=DIGEST), first_frame(key)) for key in KEYS)


def test_a_truncated_part_is_named_and_spoils_no_sealed_shard(tmp_path: Path) -> None:
    shard, parts = tmp_path / "000.h5", save_parts(tmp_path)
    hdf5.seal(shard, parts[:1])
    broken = truncate(parts[1][1])
    with pytest.raises(ValueError) as caught:
        hdf5.seal(shard, parts)
    assert str(caught.value).startswith(f"{broken}: not a readable HDF5 file")
    assert hdf5.sealed_keys(shard) == KEYS[:1]


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_record_is_named_with_what_to_do(tmp_path: Path, share: float) -> None:
    [(key, path)] = save_parts(tmp_path, KEYS[:1])
    with pytest.raises(ValueError) as caught:
        hdf5.load_first_frame(truncate(path, share), key, run_digest=DIGEST)
    assert str(caught.value).startswith(f"{path}: ") and "delete it and submit again" in str(caught.value)


# --- MP4 ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, 17 frames of 96x64."""
    path = tmp_path_factory.mktemp("mp4") / "noise.mp4"
    write_mp4(path, noise_frames(), fps=16, crf=18)
    return path


def test_a_video_is_what_a_browser_plays(mp4: Path) -> None:
    facts = inspect_mp4(mp4)
    assert (facts.codec, facts.pixel_format, facts.num_streams) == ("h264", "yuv420p", 1)
    assert (facts.num_frames, facts.width, facts.height, facts.fps) == (17, 96, 64, 16.0)


def test_a_video_starts_before_it_has_loaded(mp4: Path) -> None:
    data = mp4.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("num_frames", [1, 5, 81])
@pytest.mark.parametrize("fps", [16, 24])
def test_every_frame_is_delivered(tmp_path: Path, num_frames: int, fps: int) -> None:
    frames_THWC = noise_frames(num_frames, 32, 48)
    write_mp4(tmp_path / "a.mp4", frames_THWC, fps=fps, crf=18)
    assert read_mp4(tmp_path / "a.mp4").shape == frames_THWC.shape
    assert inspect_mp4(tmp_path / "a.mp4").fps == fps


def test_the_frames_of_a_video_look_like_those_given(tmp_path: Path) -> None:
    ramp_THW = np.add.outer(np.arange(9) * 8, np.add.outer(np.arange(64), np.arange(96))).astype(np.uint8)
    frames_THWC = np.stack([ramp_THW // 2, ramp_THW // 3 + 40, ramp_THW // 4 + 90], axis=-1)
    write_mp4(tmp_path / "a.mp4", frames_THWC, fps=16, crf=10)
    assert np.abs(read_mp4(tmp_path / "a.mp4").astype(int) - frames_THWC).mean() < 3


def test_equal_frames_give_equal_bytes(tmp_path: Path) -> None:
    digests = set()
    for number in range(20):
        write_mp4(tmp_path / f"{number}.mp4", noise_frames(), fps=16, crf=18)
        digests.add(hashlib.sha256((tmp_path / f"{number}.mp4").read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("share", [0, 0.01, 0.1])
def test_a_truncated_video_is_named_with_what_to_do(mp4: Path, tmp_path: Path, share: float) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(mp4.read_bytes()[: int(mp4.stat().st_size * share)])
    with pytest.raises(ValueError) as caught:
        inspect_mp4(broken)
    assert str(caught.value).startswith(f"{broken}: not a decodable MP4") and "delete it and submit again" in str(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
def test_a_video_that_lost_its_end_does_not_count_as_whole(mp4: Path, tmp_path: Path, share: float) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(mp4.read_bytes()[: int(mp4.stat().st_size * share)])
    try:
        assert inspect_mp4(broken).num_frames < 17
    except ValueError as error:
        assert str(error).startswith(f"{broken}: not a decodable MP4")


# --- a full disk --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path_factory.mktemp("tiny_disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a tmpfs here: needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def save_large_latents(path: Path, size: int) -> None:
    latents_CTHW = np.random.default_rng(0).normal(size=(16, 1, 1, size)).astype(np.float32)
    hdf5.save_video_latents(path, VideoLatents(key="id001/prompt1", latents_CTHW=latents_CTHW), provenance(DIGEST))


LARGE_FILES: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "x" * 400_000),
    "latents": lambda path: save_large_latents(path, 8_000),
    "latents that almost fit": lambda path: save_large_latents(path, 4_090),
    "video": lambda path: write_mp4(path, noise_frames(40, 128, 128), fps=16, crf=5),
}


@pytest.mark.parametrize("save", LARGE_FILES.values(), ids=LARGE_FILES)
def test_a_full_disk_leaves_nothing_half_and_says_what_to_do(tiny_disk: Path, save: Callable[[Path], None]) -> None:
    target = tiny_disk / "record"
    with pytest.raises(OSError) as caught:
        save(target)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.strerror == f"{target}: disk full; free space and submit again, finished items are kept"
    assert list(tiny_disk.iterdir()) == []


def test_a_full_disk_keeps_the_record_that_was_there(tiny_disk: Path) -> None:
    target = tiny_disk / "record"
    save_large_latents(target, 10)
    old = target.read_bytes()
    with pytest.raises(OSError):
        save_large_latents(target, 8_000)
    assert target.read_bytes() == old
    target.unlink()


SAVE_AND_GO_ON = """
import sys; sys.path.insert(0, "tests")
from pathlib import Path
from test_store import save_large_latents
try:
    save_large_latents(Path(sys.argv[1]), 8_000)
except OSError as error:
    print(error.errno)
"""


def test_a_process_outlives_a_full_disk(tiny_disk: Path) -> None:
    """HDF5 by itself cannot close its file then, and ends the process by a segmentation fault."""
    assert run_python(SAVE_AND_GO_ON, str(tiny_disk / "record")) == f"{errno.ENOSPC}\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_an_error_that_came_from_a_full_disk_or_quota_says_so(tmp_path: Path, number: int) -> None:
    with pytest.raises(OSError) as caught, replacing(tmp_path / "file"):
        try:
            raise OSError(number, "of the disk")
        except OSError as error:
            raise RuntimeError("of the library") from error
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path / "file") in str(caught.value)


def test_an_error_that_is_not_of_the_disk_comes_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="mine"), replacing(tmp_path / "file"):
        raise PermissionError("mine")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_for_a_moment_makes_no_record_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "part.h5"
    hdf5.save_video_latents(path, video_latents("id001/prompt1"), provenance("d"))

    def fail(**_: object) -> None:
        raise OSError(number, "the disk")

    monkeypatch.setattr(hdf5, "VideoLatents", fail)
    with pytest.raises(OSError, match="the disk"):
        hdf5.load_video_latents(path, "id001/prompt1", run_digest="d")
