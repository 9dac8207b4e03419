"""The job that runs on a node, and the loop that stands in for a queue on this machine."""

from __future__ import annotations

from pathlib import Path

import cloudpickle
import pytest
import submitit
from helpers import frozen_run
from submitit.core.utils import FailedJobError

from launch.cluster import Cluster
from launch.job import ShardJob
from launch.local import run_local
from launch.plan import Submission
from launch.queue import log_files, submissions


def shard_job(run_dir: str, num_tasks: int) -> ShardJob:
    return ShardJob(
        run_dir=run_dir, stage="video", num_tasks=num_tasks, timeout_minutes=60, signal_delay_seconds=120, stall_minutes=30
    )


def test_a_job_is_a_pickle_of_a_few_hundred_bytes() -> None:
    job = shard_job("/shared/runs/vace_14b_480p-1a2b3c4d", num_tasks=16)
    assert len(cloudpickle.dumps(job)) < 400


def test_a_checkpoint_is_the_same_call() -> None:
    job = shard_job("/shared/runs/vace_14b_480p-1a2b3c4d", num_tasks=16)
    delayed = job.checkpoint(3)
    assert (delayed.function, delayed.args, delayed.kwargs) == (job, (3,), {})


def test_other_ranks_than_asked_for_end_the_job_before_it_loads_anything(tmp_path: Path) -> None:
    executor = submitit.LocalExecutor(folder=tmp_path)
    executor.update_parameters(tasks_per_node=1, timeout_min=1)
    job = executor.submit(shard_job(str(tmp_path), num_tasks=2), 0)
    with pytest.raises(FailedJobError, match="video shard 0: found 1 tasks, asked for 2"):
        job.result()


@pytest.mark.slow
def test_where_first_frames_fail_their_videos_are_not_started_and_the_others_are(tmp_path: Path) -> None:
    run = frozen_run(tmp_path, num_shards=2)  # with weights that no model can load
    plan = [
        Submission(stage="first_frame", shards=(0, 1), after=False),
        Submission(stage="video", shards=(0, 1), after=True),
    ]
    problems = run_local(run, Cluster(), plan, tick=lambda: None)
    # in the order in which they ended
    assert sorted(problem.partition(":")[0] for problem in problems) == ["first_frame 0", "first_frame 1"]
    assert [submitted.stage for submitted in submissions(run)] == ["first_frame", "first_frame"]
    assert "Traceback" in log_files(run, "first_frame", 1)[-1].read_text(encoding="utf-8")
