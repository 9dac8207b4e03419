"""Which jobs a run has submitted, and which of them still live. The queue is a hint; record files are the truth."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from ipt2v.atomic import write_text
from ipt2v.run_dir import STAGES, VERIFY_SPLIT, RunDir

LIVE_STATES = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "REQUEUE_FED"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """One array, or one local process, that was started for a run."""

    place: str  # "slurm" or "local"
    stage: str
    job_id: str  # of the array; a process id when local
    shards: tuple[int, ...]
    after: str | None  # job id of the array that it waits for

    def element(self, index: int) -> str:
        """Id of the element that makes shards[index]: submitit submits one element as a plain job."""
        return self.job_id if len(self.shards) == 1 else f"{self.job_id}_{index}"


def remember(run: RunDir, submitted: Submitted) -> None:
    """Note a submission in the run folder, so that status, logs and cancel need no driver that lives."""
    write_text(run.jobs_path(submitted.stage) / f"{submitted.job_id}.json", json.dumps(asdict(submitted)) + "\n")


def submissions(run: RunDir) -> list[Submitted]:
    """Every submission of the run, oldest first."""
    paths = [path for stage in (*STAGES, VERIFY_SPLIT) for path in run.jobs_path(stage).glob("*.json")]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]
    return [Submitted(**{**fields, "shards": tuple(fields["shards"])}) for fields in found]


def live_elements(run: RunDir) -> dict[tuple[str, int], str]:
    """(stage, shard) -> state, of elements that wait or run. Empty where there is no squeue, or it does not answer."""
    known = submissions(run)
    states = _squeue([submitted.job_id for submitted in known if submitted.place == "slurm"])
    states |= {one.job_id: "RUNNING" for one in known if one.place == "local" and _is_ours(one.job_id)}
    return {
        (submitted.stage, shard): states[submitted.element(index)]
        for submitted in known
        for index, shard in enumerate(submitted.shards)
        if states.get(submitted.element(index)) in LIVE_STATES
    }


def cancel(run: RunDir) -> list[str]:
    """Cancel what lives of the run's jobs; their ids."""
    live = live_elements(run)
    doomed = [one for one in submissions(run) if any((one.stage, shard) in live for shard in one.shards)]
    slurm_ids = [one.job_id for one in doomed if one.place == "slurm"]
    if slurm_ids:
        subprocess.run(["scancel", *slurm_ids], check=True)
    for one in doomed:
        if one.place == "local":
            kill_tree(int(one.job_id))
    return [one.job_id for one in doomed]


def log_files(run: RunDir, stage: str, shard: int, rank: int = 0) -> list[Path]:
    """Logs of one rank of one shard, oldest first: of each submission, its output and its errors."""
    files = []
    for submitted in submissions(run):
        if submitted.stage == stage and shard in submitted.shards:
            element = submitted.element(submitted.shards.index(shard))
            files += [run.jobs_path(stage) / f"{element}_{rank}_log.{kind}" for kind in ("out", "err")]
    return [file for file in files if file.exists()]


def kill_tree(pid: int) -> None:
    """SIGKILL a local job: submitit's controller and its tasks, which ignore SIGTERM."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        for one in (pid, *map(int, children)):
            os.kill(one, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass  # gone by itself


def _squeue(job_ids: list[str]) -> dict[str, str]:
    if not job_ids or shutil.which("squeue") is None:
        return {}
    command = ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T", "-j", ",".join(job_ids)]
    try:
        # ids that SLURM has forgotten make it exit 1 if no other is known; that is an empty queue
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split("|", 1) for line in answer.stdout.split() if "|" in line)


def _is_ours(pid: str) -> bool:
    """Whether a local job's process still runs; a process id that another program has by now does not count."""
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
