"""Claims about submission that only a real SLURM can prove; the jobs are trivial."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT, frozen_run, skip_if, write_tree
from trivial_job import job_whose_first_frames_wait, job_with_a_bad_first_frame, made, trivial_job

from ipt2v.run_dir import RunDir
from launch import controller
from launch.cluster import Cluster
from launch.job import OneShard
from launch.plan import Submission, plan_submissions
from launch.progress import count_all
from launch.queue import Submitted, live_elements, living, submissions
from launch.submit import Submitter
from slurm.devcluster import Cluster as DevCluster
from slurm.devcluster import missing_binaries

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(300)]
MAX_ARRAY_SIZE = 11


@pytest.fixture(scope="module")
def short_arrays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    """A cluster that takes arrays of at most 11 elements; without accounting."""
    skip_if(missing_binaries(accounting=False), "slurm/apt.txt")
    with DevCluster(tmp_path_factory.mktemp("c") / "s", accounting=False, max_array_size=MAX_ARRAY_SIZE) as running:
        yield running


@pytest.fixture
def run(short_arrays: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Four shards, nothing made; commands find the cluster, and its nodes find trivial_job."""
    monkeypatch.setenv("SLURM_CONF", short_arrays.environment["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    write_tree(tmp_path / "testset", ("id001", "id002", "id003", "id004"), num_prompts=1)
    return frozen_run(tmp_path, num_shards=4)


def submit(run: RunDir, plan: tuple[Submission, ...], make_job: Callable[[RunDir, Cluster, str], OneShard]) -> list[Submitted]:
    done: list[Submitted] = []
    Submitter(run=run, cluster=Cluster(), make_job=make_job).submit(plan, done.append)
    return done


def wait(run: RunDir) -> None:
    deadline = time.monotonic() + 200
    while live_elements(run):
        assert time.monotonic() < deadline, live_elements(run)
        time.sleep(0.3)


def pair(num_shards: int) -> tuple[Submission, ...]:
    shards = tuple(range(num_shards))
    first = Submission(stage="first_frame", shards=shards, after=False)
    return first, Submission(stage="video", shards=shards, after=True)


def test_thirty_elements_of_each_stage_in_windows_of_eleven_all_run_once(run: RunDir) -> None:
    assert controller.max_array_size() == MAX_ARRAY_SIZE
    done = submit(run, pair(30), trivial_job)
    assert [len(one.shards) for one in done] == [11, 11, 11, 11, 8, 8]
    wait(run)
    assert made(run) == {f"{stage}-{shard}": 1 for stage in ("first_frame", "video") for shard in range(30)}
    assert len(list(run.root.glob("jobs/*/*.video.*.pkl"))) == 3


def test_videos_whose_first_frames_failed_are_cancelled_and_the_others_made(run: RunDir) -> None:
    _, videos = submit(run, pair(3), job_with_a_bad_first_frame)
    wait(run)
    assert made(run) == {"first_frame-0": 1, "first_frame-2": 1, "video-0": 1, "video-2": 1}
    assert controller.states([videos.job_id])[f"{videos.job_id}_1"] == "CANCELLED"


def test_videos_that_a_dead_driver_has_left_out_join_the_array_in_the_queue(run: RunDir) -> None:
    first, *_ = submit(run, pair(4)[:1], job_whose_first_frames_wait)
    controller.scancel([f"{first.job_id}_2"])
    deadline = time.monotonic() + 30
    while ("first_frame", 2) in live_elements(run):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    plan = plan_submissions(count_all(run), living(run, for_slurm=True))
    assert [(one.stage, one.shards, one.after) for one in plan] == [
        ("video", (0, 1, 3), False),
        ("first_frame", (2,), False),
        ("video", (2,), True),
    ]
    joined, *_ = submit(run, plan, job_whose_first_frames_wait)
    assert joined.after == first.job_id
    time.sleep(2)
    assert made(run) == {}, "nothing may run before its first frames"
    (run.root / "go").touch()
    wait(run)
    assert made(run) == {f"{stage}-{shard}": 1 for stage in ("first_frame", "video") for shard in range(4)}


def test_two_submitters_at_once_submit_one_run_once(run: RunDir, tmp_path: Path) -> None:
    command: list[str | Path] = [Path(sys.executable).parent / "ipt2v", "submit", ROOT / "configs" / "demo.yaml"]
    command += [f"testset.path={tmp_path / 'testset'}", "--weights", tmp_path / "weights", "--runs", run.root.parent]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(*process.communicate(timeout=60), process.returncode) for process in both]
    # either the second came while the first was at work, or after it and found everything in the queue
    assert sorted(code for _, _, code in ended) in ([0, 2], [0, 0]), ended
    names = [one.name for one in submissions(run)]
    assert sorted(names) == [f"{run.root.name}.{stage}.1.0" for stage in ("first_frame", "video")]
    found = subprocess.run(["squeue", "-h", "-t", "all", "-o", "%F %o"], capture_output=True, text=True, check=True).stdout
    assert len({line for line in found.splitlines() if str(run.root) in line}) == 2
    controller.scancel([one.job_id for one in submissions(run)])
