"""A job that takes no time, in place of ShardJob: it says which shard it was called for, and may fail for some."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import submitit

from ipt2v.run_dir import RunDir
from launch.cluster import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class TrivialJob:
    folder: Path
    stage: str
    bad: frozenset[int] = frozenset()
    waits: bool = False  # for a file `go` in the run folder

    def __call__(self, shard: int) -> None:
        deadline = time.monotonic() + 60
        while self.waits and not (self.folder.parent / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        if shard in self.bad:
            raise ValueError(f"shard {shard} is bad")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.stage}-{shard}").open("a", encoding="utf-8") as file:
            file.write(f"{os.environ['SLURM_ARRAY_JOB_ID']}\n")

    def checkpoint(self, shard: int) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(self, shard)


def made(run: RunDir) -> dict[str, int]:
    """stage-shard -> how often it was made."""
    return {path.name: len(path.read_text(encoding="utf-8").split()) for path in (run.root / "made").glob("*")}


def trivial_job(run: RunDir, cluster: Cluster, stage: str) -> TrivialJob:
    return TrivialJob(folder=run.root / "made", stage=stage)


def job_with_a_bad_first_frame(run: RunDir, cluster: Cluster, stage: str) -> TrivialJob:
    return TrivialJob(folder=run.root / "made", stage=stage, bad=frozenset({1} if stage == "first_frame" else ()))


def job_whose_first_frames_wait(run: RunDir, cluster: Cluster, stage: str) -> TrivialJob:
    return TrivialJob(folder=run.root / "made", stage=stage, waits=stage == "first_frame")
