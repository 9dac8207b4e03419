"""Claims about the leaderboard's archive: only videos that are right, under the right names, the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
import yaml
from conftest import Call
from helpers import first_frame, frozen_run, noise_frames, provenance, skip_if, video_latents, write_tree
from PIL import Image

from ipt2v import hdf5
from ipt2v.atomic import write_text
from ipt2v.config import AcceptConfig, RunConfig, load_settings, run_digest
from ipt2v.manifest import dumps_manifest, manifest_digest
from ipt2v.mp4 import read_mp4, write_mp4
from ipt2v.package import RefusedError, write_package
from ipt2v.package_settings import FOLDER, PackageRules, load_rules, member_name, shipped_rules
from ipt2v.package_zip import Member, split
from ipt2v.records import Item, Score, item_seed
from ipt2v.run_dir import RunDir, Scoring
from ipt2v.score_dir import write_scores

ARCHIVE_NAME = "facial_results.zip"
FILES = [ARCHIVE_NAME, "manifest.json", "sha256.txt"]
TREE_NAMES = [f"submission/id00{identity}/prompt{number}.mp4" for identity in (1, 2) for number in (1, 2)]
ITEM = "id002/prompt1"
FRAMES, HEIGHT, WIDTH = 17, 64, 96


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
    """The same, every video delivered, with its records in sealed shards."""
    return deliver(run, videos)


def deliver(run: RunDir, videos: Iterable[Path]) -> RunDir:
    """Each item's MP4 and records, sealed by shard."""
    mp4s = dict(zip((item.key for item in run.manifest()), videos, strict=False))
    for shard in range(run.environment().num_shards):
        keys = run.shard_keys(shard)
        for key in keys:
            run.mp4_path(key).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(mp4s[key], run.mp4_path(key))
            save_records(run, key)
        for stage in ("first_frame", "video"):
            hdf5.seal(run.sealed_path(stage, shard), [(key, run.part_path(stage, key)) for key in keys])
            for key in keys:
                run.part_path(stage, key).unlink()
    return run


def save_records(run: RunDir, key: str) -> None:
    """Parts of both stages, as the run would have made them."""
    environment, seed = run.environment(), item_seed(run.config().seed, key, "video")
    made = replace(provenance(environment.run_digest), weights=environment.weights, seed=seed)
    hdf5.save_first_frame(run.part_path("first_frame", key), first_frame(key), made)
    hdf5.save_video_latents(run.part_path("video", key), video_latents(key), made)


def evaljson_run(tmp_path: Path, num_entries: int = 2) -> RunDir:
    """A run of a test set in the layout of 2026; the photos alternate, so that the order by name is another."""
    testset = tmp_path / "testset"
    (testset / "images").mkdir(parents=True)
    for number, name in enumerate(("zoe", "anna")):
        Image.new("RGB", (32, 24), (90 * number, 60, 20)).save(testset / "images" / f"{name}.png")
    entries = [
        {"img": f"images/{('anna', 'zoe')[number % 2]}.png", "prompt": f"She walks {number}."}
        for number in range(1, num_entries + 1)
    ]
    (testset / "eval.json").write_text(json.dumps(entries))
    return frozen_run(tmp_path)


def entries(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as file:
        return {name: file.read(name) for name in file.namelist()}


def refusal(run: RunDir, **options: object) -> list[str]:
    """The lines of what is wrong with a run that is not packed."""
    with pytest.raises(RefusedError) as caught:
        write_package(run, **options)  # type: ignore[arg-type]
    assert not run.package_path.exists()
    assert not any("\n" in line for line in caught.value.lines)
    return caught.value.lines


def manifest_of(run: RunDir) -> dict:  # type: ignore[type-arg]
    return json.loads((run.package_path / "manifest.json").read_text())  # type: ignore[no-any-return]


def moving(num_frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture that is panned: [T,H,W,3] uint8 RGB."""
    ramp = np.add.outer(np.arange(height) * 2, np.arange(width + 2 * num_frames) * 3)
    picture_HWC = np.stack([ramp % 200 + 30, ramp // 3 % 180 + 40, ramp // 2 % 160 + 50], axis=-1).astype(np.uint8)
    return np.stack([picture_HWC[:, 2 * step : 2 * step + width] for step in range(num_frames)])


def encode(path: Path, codec: str = "libx264", **settings: object) -> None:
    """An MP4 by other means than ours: settings are pix_fmt, audio, faststart, container."""
    options = {"movflags": "faststart"} if settings.get("faststart", True) else {}
    with av.open(str(path), "w", format=str(settings.get("container", "mp4")), options=options) as container:
        stream = container.add_stream(codec, rate=16)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, str(settings.get("pix_fmt", "yuv420p"))
        sound = container.add_stream("aac", rate=44100) if settings.get("audio") else None
        for frame_HWC in moving():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode(None))
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), dtype=np.float32), format="fltp", layout="stereo")
            frame.sample_rate = 44100
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))


def still() -> np.ndarray:
    return np.repeat(moving()[:1], FRAMES, axis=0)


def rewrite(run: RunDir, frames_THWC: np.ndarray, fps: int = 16) -> None:
    write_mp4(run.mp4_path(ITEM), frames_THWC, fps=fps, crf=18)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def rename_codec(run: RunDir) -> None:
    """One bit of the header: the sample entry."""
    path = run.mp4_path(ITEM)
    path.write_bytes(path.read_bytes().replace(b"avc1\0", b"avb1\0"))


def flip_latents(run: RunDir, key: str = ITEM) -> None:
    """One bit of a video's latents, where they lie in the sealed shard."""
    path = run.sealed_path("video", 1)
    with h5py.File(path) as file:
        place = file[f"items/{key}/latents"].id.get_offset() + 101
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(bytes(data))


def put_in_record_of_another_run(run: RunDir) -> None:
    sealed, part = run.sealed_path("video", 1), run.part_path("video", ITEM)
    made = replace(provenance("b2" * 32), weights=run.environment().weights)
    hdf5.save_video_latents(part, video_latents(ITEM), made)
    hdf5.seal(sealed, [(key, part if key == ITEM else sealed) for key in hdf5.sealed_keys(sealed)])
    part.unlink()


def put_in_stray(run: RunDir) -> None:
    shutil.copyfile(run.mp4_path("id001/prompt1"), run.root / "video" / "id002" / "prompt9.mp4")


Plant = Callable[[RunDir], object]
VIDEO, SHARD = f"video/{ITEM}.mp4: ", "video/001.h5: "
# name -> (what somebody does to a finished run, how the lines must begin that say so)
VIDEO_FAULTS: dict[str, tuple[Plant, list[str]]] = {
    "truncated": (lambda run: cut(run.mp4_path(ITEM), 0.6), ["frames: found ", "motion"]),
    "empty": (lambda run: cut(run.mp4_path(ITEM), 0), ["does not open (Invalid data found when processing input)"]),
    "hevc": (lambda run: encode(run.mp4_path(ITEM), "libx265"), ["codec: found hevc, expected h264"]),
    "mpeg4": (lambda run: encode(run.mp4_path(ITEM), "mpeg4"), ["codec: found mpeg4, expected h264"]),
    "yuv444": (lambda run: encode(run.mp4_path(ITEM), pix_fmt="yuv444p"), ["pixel_format: found yuv444p, expected yuv420p"]),
    "quicktime": (lambda run: encode(run.mp4_path(ITEM), container="mov"), ["container: found ftyp qt, expected mp4"]),
    "index last": (lambda run: encode(run.mp4_path(ITEM), faststart=False), ["faststart: the index (moov) comes after"]),
    "audio": (lambda run: encode(run.mp4_path(ITEM), audio=True), ["audio_streams: found 1, expected 0"]),
    "fps": (lambda run: rewrite(run, moving(), fps=24), ["fps: found 24, expected 16", "seconds: found 0.708"]),
    "80 frames": (lambda run: rewrite(run, moving(80)), ["frames: found 80, expected 17", "seconds: found 5, expected 1.0625"]),
    "size": (
        lambda run: rewrite(run, moving(17, 48, 112)),
        ["width: found 112, expected 96", "height: found 48, expected 64"],
    ),
    "black": (
        lambda run: rewrite(run, np.zeros_like(moving())),
        ["luma: black: found 16, expected at least 18", "motion: frozen: found 0, expected at least 0.1"],
    ),
    "frozen": (lambda run: rewrite(run, still()), ["motion: frozen: found 0.0"]),
    "unknown codec": (rename_codec, ["does not open (its codec is unknown)"]),
    "missing": (lambda run: run.mp4_path(ITEM).unlink(), ["missing"]),
}
RECORD_FAULTS: dict[str, tuple[Plant, str]] = {
    "flipped bit": (flip_latents, f"{SHARD}{ITEM}: damaged (checksum "),
    "another digest": (put_in_record_of_another_run, f"{SHARD}{ITEM}: made by run b2b2b2b2b2b2, expected "),
    "no HDF5": (lambda run: cut(run.sealed_path("video", 1), 0.5), f"{SHARD}not a readable HDF5 file"),
    "stray": (put_in_stray, "video/id002/prompt9.mp4: of no item of the test set"),
}


# --- the archive --------------------------------------------------------------------------------------------------------


def test_an_archive_of_2025_has_a_folder_for_each_identity(finished: RunDir) -> None:
    assert list(entries(write_package(finished).archive)) == TREE_NAMES


def test_an_archive_of_2026_numbers_its_videos(tmp_path: Path, videos: list[Path]) -> None:
    run = deliver(evaljson_run(tmp_path), videos)
    assert list(entries(write_package(run).archive)) == ["submission/1.mp4", "submission/2.mp4"]


def test_a_video_of_2026_has_the_number_of_its_entry_in_eval_json(tmp_path: Path, videos: list[Path]) -> None:
    run = deliver(evaljson_run(tmp_path, 4), videos)
    packed = entries(write_package(run).archive)
    by_prompt = {item.prompt: run.mp4_path(item.key).read_bytes() for item in run.manifest()}
    assert [item.prompt_id for item in run.manifest()] != ["1", "2", "3", "4"]
    assert packed == {f"submission/{number}.mp4": by_prompt[f"She walks {number}."] for number in range(1, 5)}


def test_an_archive_holds_the_delivered_bytes(finished: RunDir) -> None:
    packed = entries(write_package(finished).archive)
    delivered = [finished.mp4_path(item.key).read_bytes() for item in finished.manifest()]
    assert [packed[name] for name in TREE_NAMES] == delivered


def test_videos_are_stored_not_deflated(finished: RunDir) -> None:
    with zipfile.ZipFile(write_package(finished).archive) as file:
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
        assert file.testzip() is None


def test_the_archive_has_the_order_in_which_people_count_and_fixed_modes(tmp_path: Path, videos: list[Path]) -> None:
    run = deliver(evaljson_run(tmp_path, 12), videos * 3)
    with zipfile.ZipFile(write_package(run).archive) as file:
        infos = file.infolist()
    assert [info.filename for info in infos] == [f"submission/{number}.mp4" for number in range(1, 13)]
    assert {(info.date_time, info.external_attr >> 16, info.create_system) for info in infos} == {
        ((1980, 1, 1, 0, 0, 0), 0o100644, 3)
    }


def test_other_programs_open_the_archive_and_play_what_is_in_it(finished: RunDir, tmp_path: Path) -> None:
    skip_if([name for name in ("ffmpeg", "unzip") if shutil.which(name) is None], "tests/apt.txt")
    archive = write_package(finished).archive
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "out")
    for name in TREE_NAMES:
        assert read_mp4(tmp_path / "out" / name).shape == (FRAMES, HEIGHT, WIDTH, 3)
        decode = ["ffmpeg", "-v", "error", "-xerror", "-i", str(tmp_path / "out" / name), "-f", "null", "-"]
        assert subprocess.run(decode, capture_output=True, text=True, check=True).stderr == ""
    tested = subprocess.run(["unzip", "-t", str(archive)], capture_output=True, text=True, check=True)
    assert "No errors detected" in tested.stdout


def test_equal_videos_give_equal_archives(tmp_path: Path, videos: list[Path]) -> None:
    one, two = (write_package(deliver(frozen_run(tmp_path / name), videos)) for name in ("one", "two"))
    assert one.archive.read_bytes() == two.archive.read_bytes()


def test_a_second_package_of_a_run_has_the_same_bytes(finished: RunDir) -> None:
    def packed() -> dict[str, bytes]:
        write_package(finished)
        return {path.name: path.read_bytes() for path in finished.package_path.iterdir()}

    first = packed()
    for item in finished.manifest():
        finished.mp4_path(item.key).touch()
    assert packed() == first
    assert sorted(first) == FILES


def test_the_checksums_are_those_of_the_videos_and_the_archive(finished: RunDir) -> None:
    package = write_package(finished)
    listed = [line.split("  ") for line in (finished.package_path / "sha256.txt").read_text().splitlines()]
    expected = entries(package.archive) | {ARCHIVE_NAME: package.archive.read_bytes()}
    assert {name: digest for digest, name in listed} == {
        name: hashlib.sha256(data).hexdigest() for name, data in expected.items()
    }


def test_packing_again_replaces_the_archive(finished: RunDir) -> None:
    before = write_package(finished).archive.read_bytes()
    write_mp4(finished.mp4_path("id001/prompt1"), noise_frames(seed=99), fps=16, crf=18)
    assert write_package(finished).archive.read_bytes() != before
    assert sorted(path.name for path in finished.package_path.iterdir()) == FILES


def test_an_archive_can_be_split_and_a_later_whole_one_leaves_no_parts(finished: RunDir) -> None:
    limit = 5000 + 2 * max(finished.mp4_path(item.key).stat().st_size for item in finished.manifest())
    rules = load_rules(None, "tree").model_copy(update={"max_part_bytes": limit})
    package = write_package(finished, rules=rules)
    assert [path.name for path in package.archives] == ["facial_results-1of2.zip", "facial_results-2of2.zip"]
    assert [name for path in package.archives for name in entries(path)] == TREE_NAMES
    assert all(path.stat().st_size <= limit for path in package.archives)
    write_package(finished)
    assert sorted(path.name for path in finished.package_path.iterdir()) == FILES


def test_a_video_that_is_larger_than_a_part_is_named(tmp_path: Path) -> None:
    member = Member(name="a.mp4", path=tmp_path / "a.mp4", sha256="", num_bytes=5000)
    with pytest.raises(ValueError, match=r"a\.mp4: 5000 bytes do not fit in an archive of at most 4000"):
        split([member], 4000)


def test_a_disk_without_room_is_told_before_anything_is_written(finished: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match=r"the package takes 0.00 GB, but the disk has 0.00 GB free"):
        write_package(finished)
    assert not finished.package_path.exists()


def test_a_video_that_changes_while_it_is_packed_is_noticed(finished: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")

    def changed(_: Path) -> object:
        rewrite(finished, moving())
        return usage(10**12, 0, 10**12)

    monkeypatch.setattr(shutil, "disk_usage", changed)  # called between the checks and the first byte of the archive
    with pytest.raises(ValueError, match=f"{finished.mp4_path(ITEM)}: has been changed since it was checked"):
        write_package(finished)
    assert list(finished.package_path.iterdir()) == []


# --- what is wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plant", "lines"), VIDEO_FAULTS.values(), ids=VIDEO_FAULTS)
def test_a_broken_video_is_named_with_what_is_wrong(finished: RunDir, plant: Plant, lines: list[str]) -> None:
    plant(finished)
    found = refusal(finished)
    assert all(line.startswith(VIDEO) for line in found)
    texts = [line.removeprefix(VIDEO) for line in found]
    if plant is VIDEO_FAULTS["truncated"][0]:
        assert "cut short or damaged" in texts[0] and texts[1].startswith("frames: found ")
    else:
        assert [text[: len(line)] for text, line in zip(texts, lines, strict=True)] == lines


@pytest.mark.parametrize(("plant", "line"), RECORD_FAULTS.values(), ids=RECORD_FAULTS)
def test_a_broken_record_or_a_stray_file_is_named(finished: RunDir, plant: Plant, line: str) -> None:
    plant(finished)
    assert [found[: len(line)] for found in refusal(finished)] == [line]


def test_all_problems_are_told_not_the_first_alone(finished: RunDir) -> None:
    finished.mp4_path("id001/prompt1").unlink()
    rewrite(finished, moving(), fps=24)
    put_in_stray_from = finished.mp4_path("id001/prompt2")
    shutil.copyfile(put_in_stray_from, finished.root / "video" / "id002" / "prompt9.mp4")
    flip_latents(finished)
    assert sorted(line.split(": ")[0] for line in refusal(finished)) == [
        "video/001.h5",
        "video/id001/prompt1.mp4",
        "video/id002/prompt1.mp4",
        "video/id002/prompt1.mp4",
        "video/id002/prompt9.mp4",
    ]


def test_a_video_without_its_records_is_refused(finished: RunDir) -> None:
    finished.sealed_path("video", 1).unlink()
    assert refusal(finished) == [f"video/id002/prompt{number}.mp4: no video record says how it was made" for number in (1, 2)]


def test_a_video_that_is_not_what_was_scored_is_refused(finished: RunDir) -> None:
    finished.save_scoring(Scoring(config=finished.config().score.model_copy(update={"metrics": ("ms",)}), weights={}))
    store = finished.scores()
    assert store is not None
    sha256 = hashlib.sha256(finished.mp4_path(ITEM).read_bytes()).hexdigest()
    values = {"key": ITEM, "metric": "ms", "scorer": "x", "device": "cpu", "created": "", "video_sha256": sha256}
    row = Score(**values, value=0.5, reason=None, seconds=1.0)
    store.finish(ITEM, [row])
    write_package(finished)
    assert {video["key"]: video["scores"] for video in manifest_of(finished)["videos"]}[ITEM] == {"ms": 0.5}
    shutil.rmtree(finished.package_path)
    store.finish(ITEM, [replace(row, video_sha256="0" * 64)])
    assert refusal(finished) == [f"{VIDEO}sha256 {sha256[:12]}, but its scores were measured of 000000000000"]


def test_what_is_missing_can_be_left_out(finished: RunDir) -> None:
    finished.mp4_path("id001/prompt2").unlink()
    package = write_package(finished, allow_missing=True)
    assert (package.num_videos, package.missing) == (3, ("id001/prompt2",))
    assert list(entries(package.archive)) == [name for name in TREE_NAMES if name != "submission/id001/prompt2.mp4"]


def test_what_is_broken_is_never_left_out(finished: RunDir) -> None:
    cut(finished.mp4_path(ITEM), 0.5)
    assert refusal(finished, allow_missing=True)


def test_a_package_of_changed_settings_is_refused(finished: RunDir) -> None:
    finished.config_path.write_text(finished.config_path.read_text().replace("fps: 16", "fps: 24"))
    with pytest.raises(ValueError, match=r"config\.yaml: digest"):
        write_package(finished)
    assert not finished.package_path.exists()


def test_a_check_can_be_a_warning_or_off(finished: RunDir, tmp_path: Path) -> None:
    rewrite(finished, still())
    text = (FOLDER / "ipvg2025-facial.yaml").read_text()
    for rule, expected in (("warn", 1), ("off", 0)):
        mine = tmp_path / f"{rule}.yaml"
        mine.write_text(text.replace("motion: {at_least: 0.1}", f"motion: {{rule: {rule}, at_least: 0.1}}"))
        package = write_package(finished, rules=load_rules(str(mine), "tree"))
        assert len(package.warnings) == expected and package.num_videos == 4


def test_limits_of_size_and_fixed_values_come_from_the_file(finished: RunDir, tmp_path: Path) -> None:
    text = (FOLDER / "ipvg2025-facial.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("at_most: null", "at_most: 1000").replace("fps: {value: null}", "fps: {value: 24}"))
    found = refusal(finished, rules=load_rules(str(mine), "tree"))
    assert sum("bytes: too large: found" in line for line in found) == 4
    assert sum("fps: found 16, expected 24" in line for line in found) == 4


def test_of_several_takes_the_one_that_is_delivered_is_packed(finished: RunDir) -> None:
    """A kept take that nothing has replaced yet, with its own records; a broken one is named by its own path."""
    folder = finished.takes_path(ITEM) / "1"
    folder.mkdir(parents=True)
    rewrite(finished, moving())
    finished.mp4_path(ITEM).rename(folder / "video.mp4")
    for stage in ("first_frame", "video"):
        hdf5.seal(folder / f"{stage}.h5", [(ITEM, finished.sealed_path(stage, 1))])
    packed = entries(write_package(finished).archive)
    assert packed[f"submission/{ITEM}.mp4"] == (folder / "video.mp4").read_bytes()
    shutil.rmtree(finished.package_path)
    cut(folder / "video.h5", 0.5)
    assert refusal(finished)[0].startswith(f"takes/{ITEM}/1/video.h5: not a readable HDF5 file")


def test_the_manifest_has_the_scores_of_the_take_that_is_delivered(finished: RunDir) -> None:
    accept = AcceptConfig(at_least={"ms": 0.5})
    config = finished.config().score.model_copy(update={"metrics": ("ms",), "accept": accept})
    finished.save_scoring(Scoring(config=config, weights={}))
    store, folder = finished.scores(), finished.takes_path(ITEM) / "1"
    assert store is not None
    folder.mkdir(parents=True)
    write_mp4(folder / "video.mp4", moving(), fps=16, crf=18)
    for stage in ("first_frame", "video"):
        hdf5.seal(folder / f"{stage}.h5", [(ITEM, finished.sealed_path(stage, 1))])
    for path, value in ((folder / "video.mp4", 0.4), (finished.mp4_path(ITEM), 0.1)):
        values = {"key": ITEM, "metric": "ms", "scorer": "x", "device": "cpu", "created": "", "reason": None, "seconds": 1.0}
        row = Score(**values, value=value, video_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        if path.parent == folder:
            write_scores(folder / "scores.csv", [row])
        else:
            store.finish(ITEM, [row])
    write_package(finished)
    [video] = [video for video in manifest_of(finished)["videos"] if video["key"] == ITEM]
    assert video["sha256"] == hashlib.sha256((folder / "video.mp4").read_bytes()).hexdigest()
    assert video["scores"] == {"ms": 0.4}


def test_a_folder_that_is_called_like_a_video_is_no_stray(tmp_path: Path, videos: list[Path]) -> None:
    write_tree(tmp_path / "testset", ("id001", "x.mp4"))
    run = deliver(frozen_run(tmp_path), videos)
    assert write_package(run).num_videos == 4


# --- names --------------------------------------------------------------------------------------------------------------


def test_every_shipped_profile_loads_and_states_each_check() -> None:
    assert shipped_rules() == ["ipvg2025-facial", "ipvg2025-fullbody", "ipvg2026-facial"]
    for name in shipped_rules():
        rules = load_settings(PackageRules, FOLDER / f"{name}.yaml")
        stated = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["checks"]
        assert list(stated) == list(type(rules.checks).model_fields)
        assert rules.checks == type(rules.checks)()
    assert load_rules("ipvg2025-fullbody", "tree").archive == "fullbody_results.zip"


def test_a_profile_for_another_layout_or_of_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="for test sets of layout evaljson, but this run's is tree"):
        load_rules("ipvg2026-facial", "tree")
    with pytest.raises(ValueError, match=r"no such file; give a YAML file, or one of ipvg2025-facial, "):
        load_rules("ipvg2027", "tree")


def item_of(identity: str) -> Item:
    return Item(identity=identity, prompt_id="prompt1", prompt="She walks.", reference="/a.png", reference_sha256="0" * 64)


@pytest.mark.parametrize(
    "identity", ["../../x", "..", "/etc", "a/../../b", "a\\b", "a\nb", "", " a", "a\0b", "\u202egpm", "C:"]
)
def test_a_name_that_leads_out_of_the_archive_is_refused(identity: str) -> None:
    rules = load_rules(None, "tree").model_copy(update={"root": None})
    with pytest.raises(ValueError, match="can lead out of its folder or cannot be a file name"):
        member_name(rules, item_of(identity), 1)


def test_a_name_that_looks_like_html_is_a_name() -> None:
    name = member_name(load_rules(None, "tree"), item_of("<img src=x onerror=alert(1)>"), 1)
    assert name == "submission/<img src=x onerror=alert(1)>/prompt1.mp4"


def test_a_run_whose_names_lead_elsewhere_is_not_packed(finished: RunDir, tmp_path: Path) -> None:
    """The readers of test sets refuse such names; a run folder that somebody else has made may have them all the same."""
    items = [replace(item, identity="../../x") if item.identity == "id001" else item for item in finished.manifest()]
    environment, digest = json.loads(finished.environment_path.read_text()), manifest_digest(items)
    config = load_settings(RunConfig, finished.config_path)
    of_run = run_digest(config, manifest_digest=digest, weights=environment["weights"])
    write_text(finished.environment_path, json.dumps(environment | {"manifest_digest": digest, "run_digest": of_run}))
    write_text(finished.manifest_path, dumps_manifest(items))
    for shard, identity in enumerate(("../../x", "id002")):
        write_text(finished.shard_path(shard), dumps_manifest(item for item in items if item.identity == identity))
    before = sorted(tmp_path.rglob("*"))
    assert any("'submission/../../x/prompt1.mp4' in the archive, which can lead out" in line for line in refusal(finished))
    assert sorted(tmp_path.rglob("*")) == before


def test_two_items_with_one_name_are_refused(finished: RunDir) -> None:
    rules = load_rules(None, "tree").model_copy(update={"member": "{prompt_id}.mp4"})
    found = refusal(finished, rules=rules)
    both = "'id002/prompt1' and 'id001/prompt1' would both be 'submission/prompt1.mp4' in the archive"
    assert len(found) == 2 and found[0].startswith(both)


# --- another run for what is missing ------------------------------------------------------------------------------------


@pytest.fixture
def fallback(tmp_path: Path, run: RunDir) -> RunDir:
    """A run of the same items with smaller videos."""
    other = frozen_run(tmp_path, "video.width=80", "video.num_frames=13", "seed=7")
    small = tmp_path / "small.mp4"
    write_mp4(small, moving(13, HEIGHT, 80), fps=16, crf=18)
    return deliver(other, [small] * 4)


def test_what_is_missing_or_broken_is_taken_from_the_other_run(finished: RunDir, fallback: RunDir) -> None:
    finished.mp4_path("id001/prompt1").unlink()
    rewrite(finished, moving(), fps=24)
    package = write_package(finished, fill=fallback)
    assert package.filled.keys() == {"id001/prompt1", ITEM} and package.num_videos == 4
    assert package.filled[ITEM] == f"{VIDEO}fps: found 24, expected 16"
    assert entries(package.archive)["submission/id001/prompt1.mp4"] == fallback.mp4_path("id001/prompt1").read_bytes()
    videos = {video["key"]: video for video in manifest_of(finished)["videos"]}
    filled = {key: video["filled_from"] for key, video in videos.items() if video["filled_from"]}
    assert filled == dict.fromkeys(("id001/prompt1", ITEM), fallback.root.name)
    assert videos[ITEM]["seed"] == item_seed(7, ITEM, "video")


def test_what_is_broken_in_the_other_run_too_is_named(finished: RunDir, fallback: RunDir) -> None:
    finished.mp4_path(ITEM).unlink()
    rewrite(fallback, moving())
    found = refusal(finished, fill=fallback)
    assert [line.partition(", expected")[0] for line in found] == [
        f"{VIDEO}missing: its latents are there, and are decoded by the next submission",
        f"{fallback.root}: {VIDEO}frames: found 17",
    ]


def test_what_is_missing_in_both_runs_can_be_left_out(finished: RunDir, fallback: RunDir) -> None:
    lost = "id001/prompt2"
    for key in ("id001/prompt1", lost):
        finished.mp4_path(key).unlink()
    rewrite(finished, moving(), fps=24)
    fallback.mp4_path(lost).unlink()
    assert len(refusal(finished, fill=fallback)) == 2  # it is missing here, and there
    package = write_package(finished, fill=fallback, allow_missing=True)
    assert (package.num_videos, package.missing, package.filled.keys()) == (3, (lost,), {"id001/prompt1", ITEM})
    assert manifest_of(finished)["missing"] == [lost]


def test_what_is_broken_here_and_not_whole_there_is_not_left_out(finished: RunDir, fallback: RunDir) -> None:
    rewrite(finished, moving(), fps=24)
    fallback.mp4_path(ITEM).unlink()
    found = refusal(finished, fill=fallback, allow_missing=True)
    assert any(line.startswith(f"{fallback.root}: {VIDEO}missing") for line in found)


def test_another_item_of_the_same_name_fills_nothing(finished: RunDir, tmp_path: Path, videos: list[Path]) -> None:
    finished.mp4_path(ITEM).unlink()
    elsewhere = tmp_path / "elsewhere"
    write_tree(elsewhere / "testset")
    (elsewhere / "testset" / "id002" / "prompt1.txt").write_text("Something else.")
    other = deliver(frozen_run(elsewhere), videos)
    assert refusal(finished, fill=other)[1] == f"{other.root}: {ITEM}: not to be filled from here: another prompt or photo"


# --- manifest and diff --------------------------------------------------------------------------------------------------


def test_the_manifest_says_how_each_video_was_made(finished: RunDir) -> None:
    archive, found = write_package(finished).archive, manifest_of(finished)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert found["archives"] == {ARCHIVE_NAME: {"sha256": sha256, "num_bytes": archive.stat().st_size}}
    data = finished.mp4_path(ITEM).read_bytes()
    [video] = [video for video in found["videos"] if video["key"] == ITEM]
    assert video == {
        "key": ITEM,
        "name": f"submission/{ITEM}.mp4",
        "archive": ARCHIVE_NAME,
        "sha256": hashlib.sha256(data).hexdigest(),
        "num_bytes": len(data),
        "run": finished.environment().run_digest,
        "filled_from": None,
        "prompt": "id002 walks, 1",
        "spatial_prompt": "a coat",
        "temporal_prompt": f"She walks as {ITEM}.",
        "seed": item_seed(finished.config().seed, ITEM, "video"),
        "code_version": "0.1.0+00000000",
        "scores": {},
    }
    assert found["runs"][video["run"]]["weights"] == finished.environment().weights


def test_diff_says_what_changed_and_why(finished: RunDir, fallback: RunDir, tmp_path: Path, ipt2v: Call) -> None:
    write_package(finished)
    old = shutil.copytree(finished.package_path, tmp_path / "old")
    same = ipt2v("diff", old, finished.root)
    assert (same.code, same.out) == (0, "the same\n")
    finished.mp4_path(ITEM).unlink()
    finished.mp4_path("id001/prompt1").unlink()
    write_package(finished, fill=fallback)
    changed = ipt2v("diff", old / "manifest.json", finished.package_path)
    assert changed.code == 1
    lines = changed.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["changed id001/prompt1", f"changed {ITEM}"]
    seeds = (item_seed(finished.config().seed, ITEM, "video"), item_seed(7, ITEM, "video"))
    assert f"seed: {seeds[0]} -> {seeds[1]}; filled_from: nothing -> {fallback.root.name}" in lines[1]
    write_package(finished, allow_missing=True)
    assert f"removed {ITEM} (submission/{ITEM}.mp4)" in ipt2v("diff", old, finished.root).out
    write_package(fallback)
    assert "config video.width: 96 -> 80" in ipt2v("diff", old, fallback.root).out
    assert ipt2v("diff", old, tmp_path / "nowhere").code == 2


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_packs_and_says_where(finished: RunDir, ipt2v: Call) -> None:
    answer = ipt2v("package", finished.root, "--testset", "ipvg2025-fullbody")
    assert answer.code == 0 and answer.err == ""
    assert answer.out.splitlines()[0] == f"{finished.package_path / 'fullbody_results.zip'}  4 videos"


def test_the_command_names_every_problem_and_exits_with_1(finished: RunDir, ipt2v: Call) -> None:
    finished.mp4_path(ITEM).unlink()
    put_in_stray(finished)
    answer = ipt2v("package", finished.root)
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (1, "", 3)
    assert answer.err.splitlines()[-1].startswith(f"error: {finished.root}: 2 problems, nothing packed; ")
