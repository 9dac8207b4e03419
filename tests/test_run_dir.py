"""Claims about a run folder: what counts as done, what is refused, and that counting a large run is quick."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import first_frame, frozen_run, keys_of, provenance, run_python, video_latents
from hypothesis import given, settings
from hypothesis import strategies as st

from ipt2v import hdf5
from ipt2v.config import run_digest
from ipt2v.records import Failure, Item
from ipt2v.run_dir import STAGES, RunDir, StageCount, seal_leftovers, seal_shard

STATES = ("nothing", "first_frame failed", "first_frame", "latents", "mp4 only", "video", "video failed")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two identities with two prompts each in one shard, nothing made."""
    return frozen_run(tmp_path, num_shards=1)


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def put(run: RunDir, key: str, state: str) -> None:
    """Files that are there in one state of an item; counting opens no part, so that empty ones do."""
    if state in ("first_frame", "latents", "video", "video failed"):
        touch(run.part_path("first_frame", key))
    if state in ("latents", "video"):
        touch(run.part_path("video", key))
    if state in ("mp4 only", "video"):
        touch(run.mp4_path(key))
    if state.endswith(" failed"):
        stage = state.removesuffix(" failed")
        run.save_failure(Failure(key=key, stage=stage, reason="no face"))


def make_first_frames(run: RunDir, items: tuple[Item, ...]) -> None:
    digest = run.environment().run_digest
    for item in items:
        hdf5.save_first_frame(run.part_path("first_frame", item.key), first_frame(item.key), provenance(digest))


def error_of(run: RunDir, what: str, *arguments: int) -> str:
    with pytest.raises(ValueError) as caught:
        getattr(run, what)(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- counting -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(states=st.lists(st.sampled_from(STATES), min_size=1, max_size=9))
def test_an_item_is_done_failed_or_missing_by_its_files_alone(states: list[str]) -> None:
    items = tuple(
        Item(identity=f"id{n // 3}", prompt_id=f"p{n % 3}", prompt="p", reference="r", reference_sha256="s")
        for n in range(len(states))
    )
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        for item, state in zip(items, states, strict=True):
            put(run, item.key, state)
        first_frames, videos = (run.count(stage, 0, keys_of(items)) for stage in run.stages())
    made, failed = (
        sum(state in ("first_frame", "latents", "video", "video failed") for state in states),
        states.count("first_frame failed"),
    )
    assert first_frames == StageCount(
        stage="first_frame", shard=0, done=made, failed=failed, missing=len(states) - made - failed
    )
    made, failed = states.count("video"), failed + states.count("video failed")
    assert videos == StageCount(stage="video", shard=0, done=made, failed=failed, missing=len(states) - made - failed)


def test_a_video_counts_only_with_its_mp4(run: RunDir) -> None:
    items = run.shard(0)
    for item in items:
        touch(run.part_path("video", item.key))
    touch(run.mp4_path(items[0].key))
    assert run.done("video", 0, keys_of(items)) == {items[0].key}


def test_what_failed_as_first_frame_has_failed_as_video(run: RunDir) -> None:
    items = run.shard(0)
    run.save_failure(Failure(key=items[0].key, stage="first_frame", reason="no face"))
    assert (run.count("video", 0, keys_of(items)).failed, run.count("video", 0, keys_of(items)).missing) == (1, 3)


def test_an_item_that_failed_once_and_was_made_later_is_done(run: RunDir) -> None:
    items = run.shard(0)
    run.save_failure(Failure(key=items[0].key, stage="first_frame", reason="no face"))
    put(run, items[0].key, "video")
    assert [run.count(stage, 0, keys_of(items)).done for stage in run.stages()] == [1, 1]
    assert [run.count(stage, 0, keys_of(items)).failed for stage in run.stages()] == [0, 0]


def test_scratch_files_are_no_records(run: RunDir) -> None:
    items = run.shard(0)
    for path in (
        run.part_path("first_frame", items[0].key),
        run.mp4_path(items[0].key),
        run.failure_path("video", items[0].key),
    ):
        touch(path.with_name(f".{path.name}.77-0a1b2c3d.tmp"))
        touch(path.with_name(f".{path.name}"))
        touch(path.with_name(f"{path.name}.tmp"))
    assert [run.count(stage, 0, keys_of(items)).missing for stage in run.stages()] == [4, 4]


def test_a_neighbour_shard_of_the_same_run_is_not_counted(tmp_path: Path) -> None:
    run = frozen_run(tmp_path, num_shards=2)
    for item in run.shard(0):
        put(run, item.key, "video")
    assert [run.count("video", shard, run.shard_keys(shard)).done for shard in (0, 1)] == [2, 0]


def test_sealing_changes_no_count_and_leaves_no_part(run: RunDir) -> None:
    items = run.shard(0)
    make_first_frames(run, items[:3])
    before = run.count("first_frame", 0, keys_of(items))
    seal_shard(run, "first_frame", 0, keys_of(items))
    assert run.count("first_frame", 0, keys_of(items)) == before
    assert list((run.root / "first_frame" / "parts").rglob("*.h5")) == []


def test_a_shard_is_sealed_again_with_what_was_made_later(run: RunDir) -> None:
    items = run.shard(0)
    for made in (items[:1], items[1:]):
        make_first_frames(run, made)
        seal_shard(run, "first_frame", 0, keys_of(items))
    assert hdf5.sealed_keys(run.sealed_path("first_frame", 0)) == tuple(item.key for item in items)


def test_sealing_a_sealed_shard_does_not_touch_it(run: RunDir) -> None:
    items = run.shard(0)
    make_first_frames(run, items)
    seal_shard(run, "first_frame", 0, keys_of(items))
    before = run.sealed_path("first_frame", 0).stat()
    seal_shard(run, "first_frame", 0, keys_of(items))
    assert run.sealed_path("first_frame", 0).stat() == before


def test_a_record_is_found_in_its_part_then_in_its_shard_then_not(run: RunDir) -> None:
    items = run.shard(0)
    key = items[0].key
    with pytest.raises(KeyError, match=key):
        run.record_path("first_frame", 0, key)
    make_first_frames(run, items[:1])
    assert run.record_path("first_frame", 0, key) == run.part_path("first_frame", key)
    seal_shard(run, "first_frame", 0, keys_of(items))
    assert run.record_path("first_frame", 0, key) == run.sealed_path("first_frame", 0)


def test_a_sealed_shard_of_videos_counts_with_the_mp4s(run: RunDir) -> None:
    items = run.shard(0)
    for item in items:
        hdf5.save_video_latents(run.part_path("video", item.key), video_latents(item.key), provenance("0" * 64))
    seal_shard(run, "video", 0, keys_of(items))
    touch(run.mp4_path(items[2].key))
    assert run.done("video", 0, keys_of(items)) == {items[2].key}


def test_failures_are_read_as_they_were_saved(run: RunDir) -> None:
    failures = [Failure(key=item.key, stage=stage, reason='no "face"\n人') for stage in STAGES for item in run.shard(0)]
    for failure in reversed(failures):
        run.save_failure(failure)
    assert run.failures() == failures


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_changed_settings_are_refused_with_both_digests(run: RunDir) -> None:
    frozen = run.environment()
    run.config_path.write_text(run.config_path.read_text().replace("fps: 16", "fps: 17"))
    text = error_of(run, "config")
    assert text.startswith(f"{run.config_path}: digest ") and f"frozen as {frozen.run_digest[:12]}" in text
    assert text.split("digest ")[1][:12] != frozen.run_digest[:12]


def test_a_changed_manifest_is_refused_with_both_digests(run: RunDir) -> None:
    frozen = run.environment()
    run.manifest_path.write_text(run.manifest_path.read_text().replace("walks", "runs"))
    text = error_of(run, "manifest")
    assert text.startswith(f"{run.manifest_path}: digest ") and f"frozen as {frozen.manifest_digest[:12]}" in text


def test_a_run_reads_back_what_it_was_frozen_with(run: RunDir) -> None:
    environment = run.environment()
    assert (
        run_digest(run.config(), manifest_digest=environment.manifest_digest, weights=environment.weights)
        == environment.run_digest
    )
    assert run.manifest() == run.shard(0)


@pytest.mark.parametrize("shard", [-1, 1, 999])
def test_an_unknown_shard_names_those_that_there_are(run: RunDir, shard: int) -> None:
    assert error_of(run, "shard", shard) == f"{run.root}: no shard {shard}; the run has 1: 0..0"


@pytest.mark.parametrize("what", ["environment", "manifest", "config"])
def test_a_folder_that_is_no_run_is_named(tmp_path: Path, what: str) -> None:
    assert error_of(RunDir(tmp_path), what).startswith(str(tmp_path))


def test_a_file_in_place_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert error_of(RunDir(tmp_path / "file"), "environment").startswith(f"{tmp_path / 'file'}: not a run folder")


@pytest.mark.parametrize("content", ["", "x", '{"run_digest": ', "[]", '{"of": "another version"}'])
def test_a_damaged_environment_is_named_with_what_to_do(run: RunDir, content: str) -> None:
    run.environment_path.write_text(content)
    text = error_of(run, "environment")
    assert text.startswith(f"{run.environment_path}: damaged (") and "; restore it from a copy, or " in text


@pytest.mark.parametrize("content", [b"x", b'{"identity": "id001"', b'{"identity": "id001"}\n', b"3\n", b"\xff\n"])
def test_a_damaged_shard_is_named_with_what_to_do(run: RunDir, content: bytes) -> None:
    run.shard_path(0).write_bytes(content)
    text = error_of(run, "shard_keys", 0)
    assert text.startswith(f"{run.shard_path(0)}: damaged (") and "; restore it from a copy, or " in text
    run.shard_path(0).unlink()
    assert error_of(run, "shard_keys", 0).startswith(f"{run.shard_path(0)}: missing; restore it from a copy")


# --- a large run --------------------------------------------------------------------------------------------------------

NUM_SHARDS, IDENTITIES_PER_SHARD, PROMPTS = 1000, 20, 5
COUNT = """
import collections, sys
from pathlib import Path
from ipt2v.run_dir import RunDir
from launch.progress import count_all
total, looks = collections.Counter(), []
sys.addaudithook(lambda event, _: looks.append(event) if event in {"open", "os.scandir", "os.listdir"} else None)
for count in count_all(RunDir(Path(sys.argv[1]))):
    total.update({f"{count.stage} {name}": getattr(count, name) for name in ("done", "failed", "missing")})
print(dict(total), len(looks), sep="\\n")
"""


@pytest.fixture
def large_run() -> Iterator[Path]:
    """100,000 items, half done: shards sealed, in parts, failed in part, and not begun."""
    folder = Path(tempfile.mkdtemp(prefix="ipt2v", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    run = RunDir(folder)
    for sub in ("shards", "first_frame/parts", "video/parts", "failure/first_frame"):
        (folder / sub).mkdir(parents=True)
    for shard in range(NUM_SHARDS):
        _fill_shard(run, shard)
    fields = dict.fromkeys(("run_digest", "manifest_digest", "weights_dir", "testset_format", "code_version", "created"), "")
    run.environment_path.write_text(json.dumps(fields | {"num_shards": NUM_SHARDS, "weights": {}, "packages": {}}))
    yield folder
    shutil.rmtree(folder)


def _fill_shard(run: RunDir, shard: int) -> None:
    """Of ten shards four are sealed in both stages, two in one, two are parts, two not begun; an item of each fails."""
    identities = [f"id{shard * IDENTITIES_PER_SHARD + number:05d}" for number in range(IDENTITIES_PER_SHARD)]
    keys = [f"{identity}/prompt{number}" for identity in identities for number in range(1, PROMPTS + 1)]
    line = (
        '{{"identity": "{}", "prompt": "A man walks.", "prompt_id": "{}", "reference": "/r.png", "reference_sha256": "{}"}}\n'
    )
    run.shard_path(shard).write_text("".join(line.format(*key.split("/"), "0" * 64) for key in keys))
    for identity in identities:
        if shard % 10 in (6, 7):
            (run.root / "first_frame" / "parts" / identity).mkdir()
        if shard % 10 < 4:
            (run.root / "video" / identity).mkdir()
    touch(run.failure_path("first_frame", keys[-1]))
    if shard % 10 < 6:
        _write_keys(run.sealed_path("first_frame", shard), keys[:-1])
    elif shard % 10 < 8:
        _touch_all(f"{run.root}/first_frame/parts", keys[:-1], ".h5")
    if shard % 10 < 4:
        _write_keys(run.sealed_path("video", shard), keys[:-1])
        _touch_all(f"{run.root}/video", keys[:-1], ".mp4")


def _write_keys(path: Path, keys: list[str]) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("keys", data=np.frombuffer("\n".join(keys).encode(), dtype=np.uint8))


def _touch_all(folder: str, keys: list[str], suffix: str) -> None:
    for key in keys:
        os.close(os.open(f"{folder}/{key}{suffix}", os.O_CREAT | os.O_WRONLY))


def test_a_hundred_thousand_items_are_counted_by_looking_at_their_folders(large_run: Path) -> None:
    """Not at each item: three folders of an identity at most, a few files of a shard."""
    counts, num_looks = run_python(COUNT, str(large_run)).splitlines()
    assert counts == str(
        {"first_frame done": 79_200, "first_frame failed": 1000, "first_frame missing": 19_800}
        | {"video done": 39_600, "video failed": 1000, "video missing": 59_400}
    )
    assert int(num_looks) < NUM_SHARDS * (3 * IDENTITIES_PER_SHARD + 5)


def test_a_whole_shard_that_nobody_has_sealed_is_sealed_unless_its_stage_is_busy(tmp_path: Path) -> None:
    """As an element leaves it that was killed between its last item and its end."""
    run = frozen_run(tmp_path, num_shards=2)
    digest, keys = run.environment().run_digest, run.shard_keys(0)
    for key in (*keys, run.shard_keys(1)[0]):  # of the other shard one is missing
        hdf5.save_first_frame(run.part_path("first_frame", key), first_frame(key), provenance(digest))
    counts = [run.count("first_frame", shard, run.shard_keys(shard)) for shard in range(2)]
    assert seal_leftovers(run, counts, {"first_frame"}) == [] and not run.sealed_path("first_frame", 0).exists()
    assert seal_leftovers(run, counts, {"video"}) == []
    assert hdf5.sealed_keys(run.sealed_path("first_frame", 0)) == keys
    assert not run.sealed_path("first_frame", 1).exists()


def test_a_damaged_part_is_told_and_stops_nobody(tmp_path: Path) -> None:
    run = frozen_run(tmp_path, num_shards=1)
    for key in run.shard_keys(0):
        touch(run.part_path("first_frame", key))
    (problem,) = seal_leftovers(run, [run.count("first_frame", 0, run.shard_keys(0))], ())
    assert problem.startswith("first_frame shard 0 is not sealed: ") and "ipt2v verify" in problem
