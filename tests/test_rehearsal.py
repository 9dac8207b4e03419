"""A rehearsal makes the same records and files as the real stages, without weights, and never mixes with them."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, demo_config, write_tree
from main_job import BIN, ipt2v, run_folder

from ipt2v.models.catalogue import folders
from ipt2v.mp4 import inspect_mp4
from ipt2v.parallel import Group
from ipt2v.records import Failure, FirstFrame, Item, Made
from ipt2v.run import run_shard
from ipt2v.run_dir import RunDir
from ipt2v.stages.rehearsal import (
    CAPTION_SHARE,
    NOTE,
    RehearsalStage,
    canvas,
    make_first_frames,
    panned,
    position_after,
    seconds_of,
)
from ipt2v.testsets import read_testset
from launch.freeze import freeze, prepare

CONFIG = "configs/demo.yaml"
ALONE = Group(rank=0, world_size=1, num_nodes=1, device=torch.device("cpu"))


def config_of(tmp_path: Path, *words: str):  # type: ignore[no-untyped-def]
    if not (tmp_path / "testset").exists():
        write_tree(tmp_path / "testset")
    return demo_config(tmp_path / "testset", "rehearsal.enabled=true", *words)


def first_frames(tmp_path: Path, *words: str) -> tuple[list[FirstFrame], list[Item]]:
    items = list(read_testset(tmp_path / "testset"))
    made = list(make_first_frames(items, config_of(tmp_path, *words), ALONE))
    assert all(isinstance(one, Made) for one in made)
    return [one.record for one in made if isinstance(one, Made)], items


def test_the_canvas_shows_the_photo_whole_above_its_prompt() -> None:
    photo = np.full((50, 30, 3), (200, 0, 0), dtype=np.uint8)
    picture = canvas(photo, "a walk on the beach", (96, 64))
    caption = round(64 * CAPTION_SHARE)
    assert picture.shape == (64, 96, 3)
    reds = (picture == (200, 0, 0)).all(axis=2)
    assert abs(int(reds.sum()) - (64 - caption) ** 2 * 30 / 50) < 64 and not reds[64 - caption :].any()
    assert (picture[64 - caption :] > 200).any() and not (canvas(photo, "", (96, 64))[64 - caption :] > 200).any()


def test_the_window_wanders_from_the_left_edge_to_the_right_one() -> None:
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 40, axis=0).repeat(3, axis=2)
    frames = panned(ramp, 5)
    assert frames.shape == (5, 40, 200, 3)
    left, right = frames[:, 20, 0, 0].astype(int), frames[:, 20, -1, 0].astype(int)
    assert left[0] <= 1 and right[-1] >= 198 and (np.diff(left) > 0).all() and (np.diff(right) > 0).all()


def test_a_prompt_of_any_kind_is_only_a_caption(tmp_path: Path) -> None:
    for prompt in ("", "x" * 5000, "<img src=x>", "日本語\x00\n\t", "🙂"):
        assert canvas(np.zeros((20, 20, 3), dtype=np.uint8), prompt, (96, 64)).shape == (64, 96, 3)


def test_videos_take_as_long_as_they_are_told(tmp_path: Path) -> None:
    config = config_of(tmp_path, "rehearsal.seconds=2", "rehearsal.spread=10")
    seconds = [seconds_of(f"id{number}/prompt", config) for number in range(500)]
    assert min(seconds) >= 2 and max(seconds) <= 20 and max(seconds) / min(seconds) > 9
    assert abs(float(np.mean(np.log10(np.array(seconds) / 2))) - 0.5) < 0.05
    assert seconds_of("id1/prompt", config) == seconds[1]


def test_a_video_goes_through_the_runs_steps_and_on_from_a_saved_one(tmp_path: Path) -> None:
    write_tree(tmp_path / "testset")
    config = config_of(tmp_path, "rehearsal.seconds=0.2", "video.num_inference_steps=10")
    (first, *_), _ = first_frames(tmp_path)
    stage, steps = RehearsalStage(config=config, group=ALONE), list[int]()
    start = time.monotonic()
    (made,) = stage.make([(first, None)], lambda position: steps.append(position.num_done))
    assert time.monotonic() - start >= 0.2 and steps == list(range(1, 11))
    (resumed,) = stage.make([(first, position_after(7, 10))], lambda position: steps.append(position.num_done))
    assert steps[10:] == [8, 9, 10] and np.array_equal(made.record.latents_CTHW, resumed.record.latents_CTHW)
    video = stage.decode(made.record)
    assert video.frames_THWC.shape == (config.video.num_frames, config.video.height, config.video.width, 3)


def test_ranks_share_the_items_and_a_bad_photo_is_one_failure(tmp_path: Path) -> None:
    write_tree(tmp_path / "testset")
    items = list(read_testset(tmp_path / "testset"))
    config = config_of(tmp_path)
    shares: list[list[str]] = []
    for rank in range(3):
        group = Group(rank=rank, world_size=3, num_nodes=1, device=ALONE.device)
        shares.append([one.record.key for one in make_first_frames(items, config, group) if isinstance(one, Made)])
    assert sorted(key for share in shares for key in share) == sorted(item.key for item in items) and all(shares)
    Path(items[0].reference).write_bytes(b"\x89PNG\r\n\x1a\n")
    damaged = list(read_testset(tmp_path / "testset"))
    found = [isinstance(one, Failure) for one in make_first_frames(damaged, config, ALONE)]
    assert found == [item.identity == items[0].identity for item in damaged]


@pytest.mark.parametrize("condition", ["first_frame", "reference"])
def test_both_stages_run_without_weights_and_leave_the_usual_files(tmp_path: Path, condition: str) -> None:
    config = config_of(tmp_path, f"video.condition={condition}")
    assert folders(config) == {}
    run = freeze(prepare(config, weights_dir=tmp_path / "none", runs_dir=tmp_path / "runs", num_shards=1))
    assert run.root.name.startswith("demo-rehearsal-")
    for stage in ("first_frame", "video"):
        result = run_shard(run.root, stage, 0)
        assert (result.done, result.failed) == (4, 0)
    for item in run.manifest():
        found = inspect_mp4(run.mp4_path(item.key))
        assert (found.width, found.height, found.num_frames) == (
            config.video.width,
            config.video.height,
            config.video.num_frames,
        )


def test_the_third_array_is_rehearsed_too_and_makes_up_no_score(tmp_path: Path) -> None:
    config = config_of(tmp_path, "score.metrics=[arc_sim, dd, motion_amplitude]")
    run = freeze(prepare(config, weights_dir=tmp_path / "none", runs_dir=tmp_path / "runs", num_shards=1))
    assert run.stages() == ("first_frame", "video", "score")
    for stage in run.stages():
        result = run_shard(run.root, stage, 0)
        assert (result.done, result.failed) == (4, 0)
    store = run.scores()
    assert store is not None
    rows = store.rows(0, run.shard_keys(0))
    assert len(rows) == 12 and {(row.value, row.reason) for row in rows} == {(None, NOTE)}


@pytest.mark.slow
def test_a_rehearsal_has_a_folder_of_its_own_and_is_packed_like_a_run(tmp_path: Path) -> None:
    write_tree(tmp_path / "testset")
    words = ("submit", CONFIG, f"testset.path={tmp_path / 'testset'}", "--rehearse", "--on", "here")
    run = run_folder(ipt2v(*words, "--weights", tmp_path / "none", "--runs", tmp_path / "runs"))
    assert run.config().rehearsal.enabled
    assert "4 videos" in ipt2v("package", run.root)
    plan = ipt2v("plan", CONFIG, *words[2:4], "--on", "slurm", "--runs", tmp_path / "runs")
    assert "nothing to submit" in plan and "(goes on)" in plan
    assert "weights" in ipt2v("plan", CONFIG, words[2], "--on", "here", "--weights", tmp_path / "none", expect=2)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["here", "local"])
def test_cancel_ends_a_run_on_this_machine_with_who_drives_it(tmp_path: Path, place: str) -> None:
    write_tree(tmp_path / "testset")
    words = ["submit", CONFIG, f"testset.path={tmp_path / 'testset'}", "--rehearse", "rehearsal.seconds=60", "--on", place]
    words += ["--weights", str(tmp_path / "none"), "--runs", str(tmp_path / "runs"), "--shards", "2"]
    with subprocess.Popen([BIN / "ipt2v", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/video/leases/*/*.lease")):
            assert time.monotonic() < deadline and driver.poll() is None
            time.sleep(0.1)
        (run,) = (RunDir(path) for path in (tmp_path / "runs").iterdir() if not path.name.startswith("."))
        said = ipt2v("cancel", run.root)
        assert driver.wait(30) == -signal.SIGTERM
    assert f"`ipt2v submit --on {place}` (process {driver.pid})" in said
    assert "nothing to cancel" in ipt2v("cancel", run.root)
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(run.root) in read(path)]


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # a process that has ended
        return ""
