"""What SLURM is asked and told, by its own commands. Knows nothing of runs; a command that does not answer is an error."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

DEFAULT_MAX_ARRAY_SIZE = 1001  # slurm.conf(5), MaxArraySize: the largest index is one less
ANSWER_SECONDS = 60
SBATCH_SECONDS = 180  # sbatch itself waits and tries again while the controller is busy
# After these the controller may have the job all the same, or will take it later; any other answer is a refusal
_NO_ANSWER = (
    *("timed out", "temporarily un", "unable to contact slurm", "connection refused", "connection reset", "connection failure"),
    *("zero bytes were transmitted", "message receive failure", "transport endpoint", "standby mode", "not responding"),
)
# What a user's shell may set for other jobs or for reading squeue, which here would rename or bend an array or hide it from us;
# sbatch(1): these go before what a script says
_NOT_FOR_US = (
    *("SQUEUE_", "SACCT_", "SCANCEL_", "SBATCH_WAIT", "SBATCH_SIGNAL", "SBATCH_OPEN_MODE"),
    *("SBATCH_JOB_NAME", "SBATCH_ARRAY_INX", "SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
)


class NoAnswer(OSError):
    """SLURM has not answered, or not in a way that tells what it did."""


class Refused(ValueError):
    """SLURM has refused a job; the text is its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An array that SLURM knows by its name."""

    job_id: str
    name: str
    script: str  # as sbatch was given it; empty if SLURM does not say


def sbatch(script: Path) -> str:
    """Submit a script; the id of its array. Raises Refused, or NoAnswer if the array may be in the queue all the same."""
    done = call("sbatch", "--parsable", str(script), seconds=SBATCH_SECONDS)
    # the last such line: a site's wrapper may print before it; the part after ; is the cluster's name
    ids = re.findall(r"^(\d+)(?:;\S+)?$", done.stdout, re.MULTILINE)
    if done.returncode == 0 and ids:
        return str(ids[-1])
    text = "; ".join(line.removeprefix("sbatch: ") for line in (done.stderr or done.stdout).strip().splitlines())
    if done.returncode <= 0 or any(words in text.lower() for words in _NO_ANSWER):
        raise NoAnswer(f"sbatch: {text or 'ended without a job id'}")
    raise Refused(text or f"sbatch ended with exit code {done.returncode}")


def scancel(job_ids: Sequence[str]) -> None:
    """Raises NoAnswer."""
    done = call("scancel", *job_ids)
    if done.returncode:
        raise NoAnswer(f"scancel: {done.stderr.strip()}")


def states(job_ids: Collection[str]) -> dict[str, str]:
    """Element id -> state, of the arrays that SLURM still knows. Raises NoAnswer."""
    if not job_ids:
        return {}
    rows = squeue("-r", "-o", "%i|%T", "-j", ",".join(job_ids))
    return {row[0]: row[1] for row in rows}


def is_known(job_id: str) -> bool:
    """Whether SLURM still knows an array. A dependency on one that it does not know counts as fulfilled. Raises NoAnswer."""
    return bool(squeue("-o", "%F|%T", "-j", job_id))


def arrays_named(names: Collection[str]) -> list[Found]:
    """The arrays of these names that SLURM still knows, of any user. Raises NoAnswer."""
    if not names:
        return []
    rows = squeue("-o", "%F|%j|%o", f"--name={','.join(names)}")
    # a row for each element that has started: of an array once
    found = {row[0]: Found(job_id=row[0], name=row[1], script=row[2] if len(row) > 2 else "") for row in rows}
    return [found[job_id] for job_id in sorted(found, key=int) if found[job_id].name in names]


def ended_arrays_named(name: str, since: float) -> list[str]:
    """Ids of arrays of a name that the accounting remembers, submitted after `since` (seconds since 1970); it may have none."""
    start = datetime.fromtimestamp(since).isoformat(timespec="seconds")
    try:
        done = call("sacct", "-n", "-X", "-P", "-a", "-o", "JobID", f"--name={name}", "-S", start)
    except NoAnswer:
        return []
    ids = {line.partition("_")[0] for line in done.stdout.split()} if done.returncode == 0 else set()
    return sorted(filter(str.isdigit, ids), key=int)


def max_array_size() -> int:
    """How many elements an array may have here; SLURM's default if SLURM does not say."""
    try:
        return parse_max_array_size(call("scontrol", "show", "config").stdout)
    except NoAnswer:
        return DEFAULT_MAX_ARRAY_SIZE


def parse_max_array_size(config: str) -> int:
    """The lesser of MaxArraySize and max_array_tasks of `scontrol show config`; SLURM's default if neither is there."""
    limits = re.findall(r"^MaxArraySize\s*=\s*(\d+)|\bmax_array_tasks=(\d+)", config, re.MULTILINE)
    # 0 switches arrays off: sbatch then says so itself
    return max(1, min((int(one or other) for one, other in limits), default=DEFAULT_MAX_ARRAY_SIZE))


def squeue(*words: str) -> list[list[str]]:
    done = call("squeue", "-h", "-a", "-t", "all", *words)
    if done.returncode and "invalid job id" not in done.stderr.lower():  # that is how it says that it has forgotten a job
        raise NoAnswer(f"squeue: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return [line.strip().split("|", 2) for line in done.stdout.splitlines() if "|" in line]


def call(*command: str, seconds: float = ANSWER_SECONDS) -> subprocess.CompletedProcess[str]:
    """How one of SLURM's commands has ended, whatever its exit code. Raises NoAnswer."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_FOR_US)}
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]}: no answer within {seconds:.0f} s") from None
    except OSError as error:
        raise NoAnswer(f"{command[0]}: {error}") from error
