"""The main job in its four places, on one test set of 50 items: same videos everywhere, nothing lost, nothing made twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from main_job import (
    BIN,
    SMALL,
    MadeItem,
    assert_same_videos,
    call,
    collect,
    first_frames,
    ipt2v,
    pid_of_rank,
    real_testset,
    run_folder,
)
from PIL import Image

from ipt2v.hdf5 import sealed_keys
from ipt2v.mp4 import inspect_mp4
from ipt2v.records import Score
from ipt2v.run_dir import RunDir
from ipt2v.score_dir import read_scores
from ipt2v.testsets import read_testset
from slurm.devcluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CONFIG, CLUSTERS = ROOT / "configs" / "demo.yaml", ROOT / "configs" / "cluster"


@pytest.fixture(scope="module")
def testset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_testset(tmp_path_factory.mktemp("testset"))


@pytest.fixture(scope="module")
def bad_testset(testset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 50 items as JSONL, but id003/prompt2 has a photo without pixels."""
    folder = tmp_path_factory.mktemp("bad_testset")
    items = read_testset(testset)
    header_only = folder / "no_pixels.png"
    Image.new("RGB", (64, 64)).save(header_only)
    header_only.write_bytes(header_only.read_bytes()[:33])  # signature and IHDR
    rows = [
        {
            "identity": item.identity,
            "prompt_id": item.prompt_id,
            "prompt": item.prompt,
            "image": str(Path(item.reference).resolve()),
        }
        | ({"image": str(header_only)} if item.key == "id003/prompt2" else {})
        for item in items
    ]
    path = folder / "testset.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def here(bad_testset: Path, toy_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, str]:
    """The 49 good items made in one process on one rank, 3 shards; and what the command printed, exit code 1."""
    runs = tmp_path_factory.mktemp("here")
    words = (f"testset.path={bad_testset}", *SMALL, "--on", "here", "--weights", toy_weights, "--runs", runs, "--shards", "3")
    output = ipt2v("submit", CONFIG, *words, expect=1)
    return run_folder(output), output


def test_one_bad_photo_costs_one_item_and_shows_in_status_and_exit_code(here: tuple[RunDir, str]) -> None:
    run, output = here
    (failure,) = run.failures()
    assert (failure.key, failure.stage) == ("id003/prompt2", "first_frame")
    assert "no_pixels.png" in failure.reason
    assert len(collect(run)) == 49
    assert failure.reason in output
    status = ipt2v("status", run.root, expect=1)
    assert "first_frame 49/50 (1 failed)  video 49/50 (1 failed)" in status


def test_submitting_a_finished_run_again_makes_nothing(here: tuple[RunDir, str], bad_testset: Path, toy_weights: Path) -> None:
    run, _ = here
    before = _times(run)
    words = (f"testset.path={bad_testset}", *SMALL, "--on", "here", "--weights", toy_weights, "--runs", run.root.parent)
    ipt2v("submit", CONFIG, *words, expect=1)
    assert _times(run) == before


def test_a_lost_mp4_is_decoded_again_not_denoised_again(here: tuple[RunDir, str]) -> None:
    run, _ = here
    shard = next(shard for shard in range(3) if any(item.key == "id001/prompt1" for item in run.shard(shard)))
    before = collect(run)["id001/prompt1"]
    run.mp4_path("id001/prompt1").unlink()
    call(BIN / "python", "-m", "ipt2v", run.root, "video", str(shard), expect=0 if shard != _shard_of_failure(run) else 1)
    after = collect(run)["id001/prompt1"]
    assert (after.mp4_sha256, after.video_provenance) == (before.mp4_sha256, before.video_provenance)


def test_local_two_ranks_make_the_same_videos(
    here: tuple[RunDir, str], testset: Path, toy_weights: Path, tmp_path: Path
) -> None:
    few = _first_identities(testset, tmp_path, 1)
    words = (f"testset.path={few}", *SMALL, "--on", "local", "--cluster", CLUSTERS / "local.yaml")
    output = ipt2v("submit", CONFIG, *words, "--weights", toy_weights, "--runs", tmp_path / "runs", "--shards", "1")
    made = collect(run_folder(output))
    assert len(made) == 5
    assert {item.video_provenance.num_ranks for item in made.values()} == {2}
    assert_same_videos(made, collect(here[0]), latents_within=1e-4)


def test_by_hand_and_under_torchrun_a_frozen_run_makes_the_same_videos(
    here: tuple[RunDir, str], testset: Path, toy_weights: Path, tmp_path: Path
) -> None:
    few = _first_identities(testset, tmp_path, 1)
    words = (f"testset.path={few}", *SMALL, "--weights", toy_weights, "--runs", tmp_path / "runs")
    run = run_folder(ipt2v("freeze", CONFIG, *words))
    early = call(BIN / "python", "-m", "ipt2v", run.root, "video", "0", expect=2)
    assert "5 of 5 first frames are missing" in early
    call(BIN / "python", "-m", "ipt2v", run.root, "first_frame", "0")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    call(BIN / "python", *torchrun, "-m", "ipt2v", run.root, "video", "0")
    by_torchrun = collect(run)
    assert {item.video_provenance.num_ranks for item in by_torchrun.values()} == {2}
    run.sealed_path("video", 0).unlink()  # the records: all are made anew, on one rank
    call(BIN / "python", "-m", "ipt2v", run.root, "video", "0")
    by_hand = collect(run)
    assert {item.video_provenance.num_ranks for item in by_hand.values()} == {1}
    assert_same_videos(by_torchrun, by_hand, latents_within=1e-4)
    assert_same_videos(by_hand, collect(here[0]), latents_within=0)


def test_two_ranks_share_the_llm_and_the_people_and_make_the_same_first_frames(
    here: tuple[RunDir, str], testset: Path, toy_weights: Path, tmp_path: Path
) -> None:
    words = (f"testset.path={_first_identities(testset, tmp_path, 3)}", *SMALL, "--weights", toy_weights, "--shards", "1")
    run = run_folder(ipt2v("freeze", CONFIG, *words, "--runs", tmp_path / "runs"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    call(BIN / "python", *torchrun, "-m", "ipt2v", run.root, "first_frame", "0")
    assert sealed_keys(run.sealed_path("first_frame", 0)) == run.shard_keys(0)
    made, of_one_rank = first_frames(run), first_frames(here[0])
    assert len(made) == 15 and not list((run.root / "first_frame" / "parts").glob("*/*"))
    for key in made.keys() & of_one_rank.keys():
        (record, provenance), (expected, _) = made[key], of_one_rank[key]
        assert provenance.num_ranks == 2
        assert (record.subject, record.notes, record.attempts) == (expected.subject, expected.notes, expected.attempts)
        assert (record.spatial_prompt, record.temporal_prompt) == (expected.spatial_prompt, expected.temporal_prompt)
        assert np.array_equal(record.image_HWC, expected.image_HWC)
        assert np.array_equal(record.reference_HWC, expected.reference_HWC)


@pytest.fixture(scope="module")
def killed(
    cluster: Cluster, testset: Path, toy_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, dict[str, MadeItem], str]:
    """A run of 5 shards on SLURM, one video element of it killed half way: folder, what was made by then, output and queue."""
    runs = tmp_path_factory.mktemp("slurm")
    words = _slurm_words(testset, toy_weights, runs)
    output = ipt2v("submit", CONFIG, *words, environment=cluster.environment)
    run = run_folder(output)
    queue = call("squeue", "-h", "-r", "-o", "%i|%j|%E", environment=cluster.environment)
    _kill_a_video_element(run)
    _wait_until_idle(run, cluster)
    return run, collect(run), output + queue


@pytest.mark.slurm
def test_all_arrays_are_queued_at_once_each_by_aftercorr_of_the_one_before(
    killed: tuple[RunDir, dict[str, MadeItem], str],
) -> None:
    _, _, output = killed
    (first,) = (line.split()[1] for line in output.splitlines() if line.startswith("array") and "first_frame" in line)
    (second,) = (line.split()[1] for line in output.splitlines() if line.startswith("array") and "video" in line)
    for parent in (first, second):  # the videos, and their scores
        assert f"aftercorr:{parent}" in output
        assert len([line for line in output.splitlines() if f"aftercorr:{parent}_" in line]) == 5


@pytest.mark.slurm
def test_after_a_sigkill_submitting_again_makes_the_missing_items_only(
    killed: tuple[RunDir, dict[str, MadeItem], str],
    here: tuple[RunDir, str],
    cluster: Cluster,
    testset: Path,
    toy_weights: Path,
) -> None:
    run, before, _ = killed
    assert 40 < len(before) <= 50  # one of five elements died with something done; the others may have made the rest
    words = _slurm_words(testset, toy_weights, run.root.parent)
    output = ipt2v("submit", CONFIG, *words, "--wait", environment=cluster.environment)
    assert output.count(" video, ") == (len(before) < 50), "only the video element that died is submitted again"
    after = collect(run)
    assert len(after) == 50
    for key, item in before.items():
        assert after[key].video_provenance == item.video_provenance, f"{key} was made twice"
        assert after[key].first_frame_provenance == item.first_frame_provenance
    assert {item.video_provenance.num_ranks for item in after.values()} == {4}
    assert_same_videos(after, collect(here[0]), latents_within=1e-4)
    for key in after:
        facts = inspect_mp4(run.mp4_path(key))
        assert (facts.num_frames, facts.width, facts.height, facts.fps, facts.codec) == (9, 48, 32, 16.0, "h264")
    assert not list(run.root.rglob("*.tmp"))
    assert "50 videos" in ipt2v("package", run.root)
    assert len(_scores(run)) == 50 * 1


@pytest.mark.slurm
def test_scores_that_were_there_before_a_sigkill_are_not_measured_again(
    killed: tuple[RunDir, dict[str, MadeItem], str], cluster: Cluster, testset: Path, toy_weights: Path
) -> None:
    """The 50 videos of the run, and two metrics more than it had: only the third array, and of what is new only."""
    run, first_scores = killed[0], _scores(killed[0])
    words = (*_slurm_words(testset, toy_weights, run.root.parent), "score.metrics=[clip_score, face_arc, iq]")
    output = ipt2v("submit", CONFIG, *words, environment=cluster.environment)
    assert output.count("array ") == output.count(" score, ") == 1
    _kill_a_score_element(run)
    _wait_until_idle(run, cluster)
    before = _scores(run)
    assert 50 < len(before) < 150
    assert "score 50/50" in ipt2v("submit", CONFIG, *words, "--wait", environment=cluster.environment)
    after = _scores(run)
    assert len(after) == 150
    assert {place: after[place] for place in (*first_scores, *before)} == first_scores | before
    assert all(score.value is not None for score in after.values())


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("num_nodes", "num_ranks", "split"),
    [(2, 4, "cfg 2 x ulysses 2 x ring 1"), (4, 4, "cfg 2 x ulysses 1 x ring 2")],
    ids=["ulysses inside a node", "ring between nodes"],
)
def test_a_split_over_nodes_is_verified_against_one_rank(
    killed: tuple[RunDir, dict[str, MadeItem], str],
    cluster: Cluster,
    tmp_path: Path,
    num_nodes: int,
    num_ranks: int,
    split: str,
) -> None:
    run, _, _ = killed
    site = tmp_path / "cluster.yaml"
    video = {"nodes": num_nodes, "gpus_per_node": num_ranks // num_nodes, "timeout_minutes": 30, "mem_gb": 4}
    site.write_text(json.dumps({"video": video, "signal_delay_seconds": 20}), encoding="utf-8")
    output = ipt2v("verify-split", run.root, "--on", "slurm", "--cluster", site, environment=cluster.environment)
    check = json.loads(run.split_check_path(0).read_text(encoding="utf-8"))
    assert (check["num_ranks"], check["num_nodes"], check["split"]) == (num_ranks, num_nodes, split)
    assert 0 <= check["mean_error"] <= check["max_error"] <= 2e-5 < check["largest_value"]
    assert split in output


@pytest.mark.slurm
@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_shared_weights_over_two_nodes_make_the_same_videos(
    sharding: str, here: tuple[RunDir, str], cluster: Cluster, testset: Path, toy_weights: Path, tmp_path: Path
) -> None:
    few = _first_identities(testset, tmp_path, 1)
    words = (*_slurm_words(few, toy_weights, tmp_path / "runs"), "--wait", "--shards", "1")
    output = ipt2v("submit", CONFIG, *words, f"video.weights_sharding={sharding}", environment=cluster.environment)
    made = collect(run_folder(output))
    assert {item.video_provenance.num_ranks for item in made.values()} == {4} and len(made) == 5
    assert_same_videos(made, collect(here[0]), latents_within=1e-4)


@pytest.mark.slurm
def test_cancel_empties_the_queue_and_status_needs_no_accounting(
    cluster_without_accounting: Cluster, testset: Path, toy_weights: Path, tmp_path: Path
) -> None:
    environment = cluster_without_accounting.environment
    run = run_folder(ipt2v("submit", CONFIG, *_slurm_words(testset, toy_weights, tmp_path), environment=environment))
    rows = json.loads(ipt2v("status", run.root, "--json", environment=environment))
    assert {row["queue"] for row in rows} <= {"PENDING", "RUNNING", "CONFIGURING"}
    again = ipt2v("submit", CONFIG, *_slurm_words(testset, toy_weights, tmp_path), environment=environment)
    assert "shards 0-4 are waiting or running already; left alone" in again
    assert ipt2v("cancel", run.root, environment=environment).startswith("cancelled ")
    deadline = time.monotonic() + 60
    while call("squeue", "-h", environment=environment):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert "nothing to cancel" in ipt2v("cancel", run.root, environment=environment)


def _times(run: RunDir) -> dict[Path, int]:
    """When each file was written; but for the lock, which says who has submitted last."""
    files = [path for path in run.root.rglob("*") if path.is_file() and path.name != ".submit.lock"]
    return {path: path.stat().st_mtime_ns for path in files}


def _slurm_words(testset: Path, weights: Path, runs: Path) -> tuple[str | Path, ...]:
    words = (f"testset.path={testset}", *SMALL, "--on", "slurm", "--cluster", CLUSTERS / "devcluster.yaml", "--shards", "5")
    return (*words, "score.metrics=[clip_score]", "--weights", weights, "--runs", runs)


def _status(run: RunDir, cluster: Cluster) -> str:
    return ipt2v("status", run.root, "--json", environment=cluster.environment)


def _shard_of_failure(run: RunDir) -> int:
    (failure,) = run.failures()
    return next(shard for shard in range(3) if any(item.key == failure.key for item in run.shard(shard)))


def _first_identities(testset: Path, tmp_path: Path, number: int) -> Path:
    """A test set of id001 and so on, in the same layout."""
    folder = tmp_path / "some"
    folder.mkdir()
    for identity in [f"id{index:03d}" for index in range(1, number + 1)]:
        (folder / identity).symlink_to((testset / identity).resolve())
    return folder


def _wait_until_idle(run: RunDir, cluster: Cluster) -> None:
    deadline = time.monotonic() + 600
    while any(row["queue"] for row in json.loads(_status(run, cluster))):
        assert time.monotonic() < deadline, _status(run, cluster)
        time.sleep(2)


def _scores(run: RunDir) -> dict[tuple[str, str], Score]:
    """Every row that is on the disk, of items that are not finished too."""
    rows = [row for path in run.root.glob("score/**/*.csv") for row in read_scores(path)]
    return {(row.key, row.metric): row for row in rows}


def _kill_a_score_element(run: RunDir) -> None:
    """SIGKILL whichever score element has written a row of what is measured now."""
    store, deadline = run.scores(), time.monotonic() + 300
    assert store is not None
    while True:
        assert time.monotonic() < deadline, "no score after 5 minutes"
        begun = {path.parent.name for path in store.folder.glob("*/*/*.csv")}
        for shard in range(5):
            if begun & {key.partition("/")[0] for key in run.shard_keys(shard)}:
                with contextlib.suppress(AssertionError, ProcessLookupError):  # it has ended by itself
                    os.kill(pid_of_rank(run, shard, 0, "score"), signal.SIGKILL)
                    return
        time.sleep(0.05)


def _kill_a_video_element(run: RunDir) -> None:
    """SIGKILL rank 1 of whichever video element has written its first MP4."""
    deadline = time.monotonic() + 600
    while True:
        assert time.monotonic() < deadline, "no video after 10 minutes"
        made = {path.relative_to(run.root / "video").with_suffix("").as_posix() for path in run.root.glob("video/*/*.mp4")}
        for shard in range(5):
            if made & {item.key for item in run.shard(shard)}:
                with contextlib.suppress(AssertionError, ProcessLookupError):  # it has ended by itself
                    os.kill(pid_of_rank(run, shard, rank=1), signal.SIGKILL)
                    return
        time.sleep(0.05)
