"""Claims about `ipt2v verify`: whatever is broken in a run is named, and after a repair the next submission makes just that."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
from pathlib import Path

import h5py
import pytest
from conftest import Answer, Call
from helpers import ROOT, demo_config, frozen_run, write_tree
from test_package import RECORD_FAULTS, VIDEO_FAULTS, Plant, cut, deliver, finished, flip_latents, put_in_stray, run, videos

from ipt2v import hdf5
from ipt2v.package import RefusedError, write_package
from ipt2v.package_look import frozen_faults, look_at
from ipt2v.package_reading import ToRead, Unreadable, read_all
from ipt2v.package_settings import load_rules
from ipt2v.records import Failure, Score
from ipt2v.run import run_shard
from ipt2v.run_dir import RECORDED_STAGES, RunDir, Scoring
from ipt2v.verify import failed_items, repair, strict, verdict
from launch.freeze import freeze, prepare

__all__ = ["finished", "run", "videos"]  # fixtures
ITEM = "id002/prompt1"
RULES = strict(load_rules(None, "tree"))


def lines_of(run: RunDir) -> list[str]:
    """What is wrong, without the line that sums up."""
    return verdict(look_at(run, RULES))[:-1]


# --- what is broken -----------------------------------------------------------------------------------------------------


def test_a_whole_run_is_whole(finished: RunDir, ipt2v: Call) -> None:
    answer = ipt2v("verify", finished.root)
    assert (answer.code, answer.out) == (0, f"{finished.root}: 8 files read: whole\n")


@pytest.mark.parametrize(("plant", "lines"), VIDEO_FAULTS.values(), ids=VIDEO_FAULTS)
def test_a_broken_video_is_named(finished: RunDir, ipt2v: Call, plant: Plant, lines: list[str]) -> None:
    plant(finished)
    answer: Answer = ipt2v("verify", finished.root)
    assert answer.code == 1
    assert all(f"video/{ITEM}.mp4: {line}" in answer.out for line in lines[:1])
    assert f"ipt2v verify {finished.root} --repair\n  ipt2v submit {finished.config_path}" in answer.out


@pytest.mark.parametrize(("plant", "line"), RECORD_FAULTS.values(), ids=RECORD_FAULTS)
def test_a_broken_record_or_a_stray_file_is_named(
    finished: RunDir,
    ipt2v: Call,
    plant: Plant,
    line: str,
) -> None:
    plant(finished)
    answer = ipt2v("verify", finished.root)
    assert answer.code == 1 and answer.out.startswith(line)


@pytest.mark.parametrize("name", ["config.yaml", "manifest.jsonl", "shards/001.jsonl", "environment.json"])
def test_a_changed_frozen_file_is_named_and_nothing_else_is_judged(
    finished: RunDir,
    ipt2v: Call,
    name: str,
) -> None:
    path = finished.root / name
    path.write_text(
        path.read_text().replace("id002 walks", "id002 runs").replace("fps: 16", "fps: 24").replace("packages", "x")
    )
    answer = ipt2v("verify", finished.root)
    assert answer.code == 1 and answer.out.splitlines()[0].startswith(f"{name}: ")
    assert {fault.kind for fault in frozen_faults(finished)} == {"frozen"}


@pytest.mark.parametrize("stage", ["first_frame", "video"])
def test_every_flipped_bit_of_a_record_is_noticed_or_changes_nothing(finished: RunDir, tmp_path: Path, stage: str) -> None:
    path, digest = finished.sealed_path(stage, 0), finished.environment().run_digest
    data, copy = path.read_bytes(), tmp_path / "copy.h5"
    good = hdf5.check_file(path, run_digest=digest)
    assert all(found.has_checksum and not found.problem for found in good.values())
    noticed = 0
    for place in range(48, len(data), len(data) // 60):
        copy.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        read = read_all([ToRead(copy, digest)])[ToRead(copy, digest)]
        assert not isinstance(read, dict) or read == good or any(one.problem or not one.is_listed for one in read.values())
        noticed += read != good
    assert noticed > 20


def test_a_file_that_kills_its_reader_is_named_and_the_others_are_read(
    finished: RunDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [finished.mp4_path(item.key) for item in finished.manifest()]

    def dies_of_the_second(path: Path) -> object:
        if path == paths[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return path.name

    monkeypatch.setattr("ipt2v.package_reading.examine_mp4", dies_of_the_second)
    read = read_all([ToRead(path) for path in paths])
    assert isinstance(read.pop(ToRead(paths[1])), Unreadable)
    assert {file.path: found for file, found in read.items()} == {path: path.name for path in paths if path != paths[1]}


def test_records_from_before_checksums_are_readable_and_said_to_be_no_more(finished: RunDir) -> None:
    for shard in (0, 1):
        with h5py.File(finished.sealed_path("video", shard), "r+") as file:
            for key in finished.shard_keys(shard):
                del file[f"items/{key}"].attrs["sha256"]
    assert verdict(look_at(finished, RULES))[-1].endswith(
        "whole; 4 older records have no checksum: known to be readable, no more"
    )
    assert write_package(finished).num_videos == 4


# --- repair -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of placeholder pictures, made by the stages themselves."""
    folder = tmp_path_factory.mktemp("rehearsal")
    config = demo_config(write_tree(folder / "testset"), "rehearsal.enabled=true")
    prepared = prepare(config, weights_dir=folder / "none", runs_dir=folder / "runs", num_shards=2)
    return made(freeze(prepared))


def made(run: RunDir) -> RunDir:
    """The run, with what was missing of it."""
    for stage in ("first_frame", "video"):
        for shard in range(run.environment().num_shards):
            run_shard(run.root, stage, shard)
    return run


@pytest.fixture
def rehearsed(rehearsal: RunDir, tmp_path: Path) -> RunDir:
    """A copy of it, to break."""
    return RunDir(shutil.copytree(rehearsal.root, tmp_path / "runs" / rehearsal.root.name))


def state(run: RunDir) -> dict[str, tuple[str, int]]:
    """Bytes and inode of each MP4 and time of each video record: what is made anew has others."""
    digest, found = run.environment().run_digest, {}
    for shard in range(run.environment().num_shards):
        for key, path in run.record_paths("video", shard, run.shard_keys(shard)).items():
            created = hdf5.load_provenance(path, key, run_digest=digest).created
            mp4 = run.mp4_path(key)
            found[f"record {key}"] = (created, 0)
            found[f"mp4 {key}"] = (hashlib.sha256(mp4.read_bytes()).hexdigest(), mp4.stat().st_ino)
    return found


def other_run_record(run: RunDir) -> None:
    sealed = run.sealed_path("video", 1)
    with h5py.File(sealed, "r+") as file:
        attributes = file[f"items/{ITEM}"].attrs
        attributes["provenance"] = attributes["provenance"].replace(run.environment().run_digest, "b2" * 32)


def lose_list(run: RunDir) -> None:
    with h5py.File(run.sealed_path("video", 1), "r+") as file:
        file["keys"][...] = ord("x")


MP4, RECORD = {f"mp4 {ITEM}"}, {f"record {ITEM}"}
NEIGHBOUR = {"mp4 id002/prompt2", "record id002/prompt2"}
REPAIRS: dict[str, tuple[Plant, set[str], list[str]]] = {
    "MP4": (lambda run: cut(run.mp4_path(ITEM), 0.5), MP4, [f"video/{ITEM}.mp4"]),
    "record": (flip_latents, MP4 | RECORD, ["video/001.h5", f"video/{ITEM}.mp4"]),
    "another run's record": (other_run_record, MP4 | RECORD, ["video/001.h5", f"video/{ITEM}.mp4"]),
    "shard": (
        lambda run: cut(run.sealed_path("video", 1), 0.5),
        MP4 | RECORD | NEIGHBOUR,
        ["video/001.h5", f"video/{ITEM}.mp4", "video/id002/prompt2.mp4"],
    ),
    "first frames": (lambda run: cut(run.sealed_path("first_frame", 1), 0.5), set(), ["first_frame/001.h5"]),
    "list of keys": (lose_list, set(), ["video/001.h5"]),
    "stray": (put_in_stray, set(), ["video/id002/prompt9.mp4"]),
}


@pytest.mark.parametrize(("plant", "anew", "aside"), REPAIRS.values(), ids=REPAIRS)
def test_after_a_repair_just_the_broken_is_made_again(
    rehearsed: RunDir, plant: Plant, anew: set[str], aside: list[str]
) -> None:
    before = state(rehearsed)
    plant(rehearsed)
    done = repair(look_at(rehearsed, RULES))
    assert sorted(path.relative_to(done.folder).as_posix() for path in done.folder.rglob("*") if path.is_file()) == sorted(
        aside
    )
    after = state(made(rehearsed))
    assert {name for name in before if after[name] != before[name]} == anew
    assert {name: value[0] for name, value in after.items() if "mp4" in name} == {
        name: value[0] for name, value in before.items() if "mp4" in name
    }  # the same bytes, from the same seed
    assert lines_of(rehearsed) == []


def test_a_folder_that_is_called_like_a_file_of_the_run_is_none(tmp_path: Path, videos: list[Path]) -> None:
    """Identities may have such names: nothing of theirs is put aside, and their scores are read."""
    write_tree(tmp_path / "testset", ("x.mp4", "y.csv"))
    run = deliver(frozen_run(tmp_path), videos)
    run.save_scoring(Scoring(config=run.config().score.model_copy(update={"metrics": ("ms",)}), weights={}))
    store = run.scores()
    assert store is not None
    for item in run.manifest():
        store.finish(item.key, [score_of(item.key, hashlib.sha256(run.mp4_path(item.key).read_bytes()).hexdigest())])
    assert lines_of(run) == []


def score_of(key: str, sha256: str) -> Score:
    values = {"key": key, "metric": "ms", "scorer": "x", "device": "cpu", "created": "", "video_sha256": sha256}
    return Score(**values, value=0.5, reason=None, seconds=1.0)


def test_a_repair_forgets_the_scores_of_what_it_puts_aside(rehearsed: RunDir) -> None:
    rehearsed.save_scoring(Scoring(config=rehearsed.config().score.model_copy(update={"metrics": ("ms",)}), weights={}))
    store = rehearsed.scores()
    assert store is not None
    for shard in (0, 1):
        for key in rehearsed.shard_keys(shard):
            sha256 = hashlib.sha256(rehearsed.mp4_path(key).read_bytes()).hexdigest()
            row = Score(
                key=key,
                metric="ms",
                value=0.5,
                reason=None,
                seconds=1.0,
                video_sha256=sha256,
                scorer="x",
                device="",
                created="",
            )
            store.finish(key, [row])
        store.seal(shard, rehearsed.shard_keys(shard))
    assert lines_of(rehearsed) == []
    cut(rehearsed.mp4_path(ITEM), 0.5)
    repair(look_at(rehearsed, RULES))
    assert store.done(1, rehearsed.shard_keys(1)) == {"id002/prompt2"}
    assert store.done(0, rehearsed.shard_keys(0)) == set(rehearsed.shard_keys(0))


def test_the_command_repairs_and_says_what_to_submit(rehearsed: RunDir, ipt2v: Call) -> None:
    cut(rehearsed.mp4_path(ITEM), 0.5)
    answer = ipt2v("verify", rehearsed.root, "--repair")
    assert answer.code == 1 and "put aside: 1 files, now in " in answer.out
    words = [str(ROOT / "configs" / "demo.yaml"), f"testset.path={rehearsed.config().testset.path}", "rehearsal.enabled=true"]
    submitted = ipt2v("submit", *words, "--on", "here", "--runs", rehearsed.root.parent, "--weights", rehearsed.root / "none")
    assert submitted.code == 0, submitted.err
    assert ipt2v("verify", rehearsed.root).code == 0
    assert ipt2v("package", rehearsed.root).code == 0


def test_nothing_is_put_aside_of_a_run_that_somebody_works_on(rehearsed: RunDir, ipt2v: Call) -> None:
    from launch.lock import run_lock

    cut(rehearsed.mp4_path(ITEM), 0.5)
    with run_lock(rehearsed, "submit"):
        assert ipt2v("verify", rehearsed.root, "--repair").code == 2
    assert not (rehearsed.root / "broken").exists()


def fail(run: RunDir, stage: str, reason: str) -> None:
    """id001/prompt1 has failed in a stage: it has no video."""
    run.save_failure(Failure(key="id001/prompt1", stage=stage, reason=reason))
    run.mp4_path("id001/prompt1").unlink()
    for made in RECORDED_STAGES[RECORDED_STAGES.index(stage) :]:
        hdf5.seal(run.sealed_path(made, 0), [("id001/prompt2", run.sealed_path(made, 0))])


def test_an_item_that_has_failed_in_video_is_made_after_a_retry(finished: RunDir, ipt2v: Call) -> None:
    fail(finished, "video", "3 elements crashed in it")
    lines = ipt2v("verify", finished.root).out.splitlines()
    remedy = f"`ipt2v retry {finished.root} --failed`, then submit, makes it"
    assert lines[0] == f"video/id001/prompt1.mp4: missing: failed in video: 3 elements crashed in it; {remedy}"
    assert lines[2:4] == ["made again by:", f"  ipt2v retry {finished.root} --failed"]
    assert lines[4].startswith(f"  ipt2v submit {finished.config_path} ") and len(lines) == 5


def test_the_commands_for_a_failed_item_make_it(rehearsed: RunDir, ipt2v: Call) -> None:
    fail(rehearsed, "video", "3 elements crashed in it")
    retry, submit = ipt2v("verify", rehearsed.root).out.splitlines()[-2:]
    assert ipt2v(*shlex.split(retry)[1:]).code == 0
    words = shlex.split(submit.removesuffix(" --cluster FILE"))
    words[words.index("--on") + 1] = "here"
    assert ipt2v(*words[1:]).code == 0
    assert ipt2v("verify", rehearsed.root).code == 0


def test_what_is_broken_is_put_aside_before_what_has_failed_is_retried(finished: RunDir, ipt2v: Call) -> None:
    fail(finished, "video", "3 elements crashed in it")
    cut(finished.mp4_path(ITEM), 0.5)
    commands = ipt2v("verify", finished.root).out.partition("made again by:\n")[2].splitlines()
    assert [command.split()[1] for command in commands] == ["verify", "retry", "submit"]
    commands = ipt2v("verify", finished.root, "--repair").out.partition("made again by:\n")[2].splitlines()
    assert [command.split()[1] for command in commands] == ["retry", "submit"]


def test_a_photo_that_failed_is_said_to_fail_again_and_a_changed_one_to_be_another_run(finished: RunDir) -> None:
    fail(finished, "first_frame", "it cannot be decoded; replace the photo")
    (line,) = lines_of(finished)
    assert f"failed in first_frame: it cannot be decoded; replace the photo; `ipt2v retry {finished.root} --failed`" in line
    assert "with the same photo it fails again" in line and f"`ipt2v package RUN2 --fill {finished.root}`" in line
    assert "made by the next submission" not in line


def test_a_video_that_failed_of_a_broken_first_frame_needs_the_repair_alone(finished: RunDir) -> None:
    fail(finished, "video", "its first frame cannot be read")
    lose_first_frame(finished)
    assert "made by the next submission" in "".join(lines_of(finished))
    assert failed_items(look_at(finished, RULES)) == {}


def lose_first_frame(run: RunDir) -> None:
    with h5py.File(run.sealed_path("first_frame", 0), "r+") as file:
        del file["items/id001/prompt1"]


def test_a_run_with_another_photo_is_packed_with_the_videos_of_the_one_that_failed(tmp_path: Path, videos: list[Path]) -> None:
    """As verify and `why` say: the other way round is refused, as the photos differ."""
    run = deliver(frozen_run(tmp_path), videos)
    fail(run, "first_frame", "it cannot be decoded; replace the photo")
    photo = tmp_path / "testset" / "id001" / "image.png"
    photo.write_bytes((tmp_path / "testset" / "id002" / "image.png").read_bytes())
    other = deliver(frozen_run(tmp_path), videos)
    assert other.root != run.root
    other.mp4_path(ITEM).unlink()
    assert write_package(other, fill=run).filled.keys() == {ITEM}
    with pytest.raises(RefusedError) as refused:
        write_package(run, fill=other)
    assert any("id001/prompt1: not to be filled from here: another prompt or photo" in line for line in refused.value.lines)
