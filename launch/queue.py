"""Which jobs a run has submitted, and which of them still live. The queue is a hint; record files are the truth.

jobs/<stage>/<name>.{pkl,sh}     what an array runs, and its script; written before sbatch
jobs/<stage>/<name>.submitting   sbatch is about to be called, or was, and nobody has noted its answer
jobs/<stage>/<name>.json         it is in the queue, or was, under the id in there
jobs/<stage>/<name>.dropped      SLURM did not know the name: its elements, should they come after all, end at once
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ipt2v.atomic import write_text
from ipt2v.run_dir import STAGES, VERIFY_SPLIT, RunDir
from launch import controller
from launch.controller import NoAnswer
from launch.plan import Living

LIVE_STATES = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD", "REQUEUE_FED"}
# also: on their way into one of those, or out of the way for a while
LIVE_STATES |= {"RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT", "STOPPED", "RESV_DEL_HOLD"}
NO_ANSWER_SECONDS = 5  # before squeue is asked again
CLOCK_SECONDS = 3600  # by which the clocks of a file server and of SLURM may differ


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """One array, or one local process, that was started for a run."""

    place: str  # "slurm" or "local"
    stage: str
    job_id: str  # of the array; a process id when local
    shards: tuple[int, ...]
    after: str | None  # job id of the array that it waits for
    name: str = ""  # SLURM's job name
    tasks: tuple[int, ...] = ()  # array index that makes shards[i]; 0, 1, ... if empty

    def element(self, index: int) -> str:
        """Id of the element that makes shards[index]."""
        if self.place == "local":
            return self.job_id
        return f"{self.job_id}_{self.tasks[index] if self.tasks else index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """An array that sbatch is about to be given: SLURM may have it or not."""

    stage: str
    name: str
    shards: tuple[int, ...]
    tasks: tuple[int, ...]
    after: str | None


def remember(run: RunDir, submitted: Submitted) -> None:
    """Note a submission in the run folder, so that status, logs and cancel need no driver that lives."""
    stem = submitted.name or f"local.{submitted.job_id}"
    write_text(run.jobs_path(submitted.stage) / f"{stem}.json", json.dumps(asdict(submitted)) + "\n")


def intend(run: RunDir, intent: Intent) -> None:
    """Note, before sbatch is called, what it will be called for."""
    write_text(_intent_path(run, intent), json.dumps(asdict(intent)) + "\n")


def accept(run: RunDir, intent: Intent, job_id: str) -> Submitted:
    """Note the id that SLURM has given to what was intended."""
    submitted = Submitted(place="slurm", job_id=job_id, **asdict(intent))
    remember(run, submitted)
    _intent_path(run, intent).unlink(missing_ok=True)
    return submitted


def drop(run: RunDir, intent: Intent) -> None:
    """Note that SLURM does not have what was intended; elements that come all the same then do nothing (launch/element.py)."""
    write_text(run.jobs_path(intent.stage) / f"{intent.name}.dropped", json.dumps(asdict(intent)) + "\n")
    _intent_path(run, intent).unlink(missing_ok=True)


def submissions(run: RunDir) -> list[Submitted]:
    """Every submission of the run, oldest first."""
    return [Submitted(**_read(path)) for path in _notes(run, "json")]


def newest(submitted: Sequence[Submitted], stage: str, shard: int) -> Submitted | None:
    """The newest submission that has a shard, of some in the order of `submissions`."""
    return next((one for one in reversed(submitted) if one.stage == stage and shard in one.shards), None)


def intents(run: RunDir) -> list[Intent]:
    """What sbatch was, or is about to be, called for, with no answer noted, oldest first."""
    found = [Intent(**_read(path)) for path in _notes(run, "submitting")]
    accepted = {one.name for one in submissions(run)} if found else set()  # died before it removed the other note
    return [one for one in found if one.name not in accepted]


def settle(run: RunDir, *, final: bool) -> None:
    """Find out by name what became of every sbatch without an answer: note its id, or, if `final`, that there is none.

    `final` is for who holds the lock of the run: else somebody may be calling sbatch at this moment. Raises NoAnswer.
    """
    for intent in intents(run):
        ids = find(run, intent)
        if ids:
            accept(run, intent, ids[-1])
        elif final:
            drop(run, intent)


def settle_if_known(run: RunDir) -> None:
    """The same for who only looks: without what SLURM does not answer, and it may be somebody else's run."""
    with contextlib.suppress(NoAnswer, PermissionError):
        settle(run, final=False)


def find(run: RunDir, intent: Intent) -> list[str]:
    """Ids of the arrays that SLURM has for an intent: at most one, as a name is never used twice. Raises NoAnswer."""
    script = run.jobs_path(intent.stage) / f"{intent.name}.sh"
    named = controller.arrays_named([intent.name])
    ours = [one.job_id for one in named if _same_file(one.script, script)]  # another user may have a run of the same name
    if ours:
        return ours
    try:
        since = script.stat().st_mtime - CLOCK_SECONDS
    except FileNotFoundError:
        return []
    others = {one.job_id for one in named}
    return [one for one in controller.ended_arrays_named(intent.name, since) if one not in others]


def live_elements(run: RunDir) -> dict[tuple[str, int], str]:
    """(stage, shard) -> state, of elements that wait or run. Without what is SLURM's where squeue does not answer."""
    settle_if_known(run)
    known = submissions(run)
    found = _states_if_known(known)
    return {
        (submitted.stage, shard): found[submitted.element(index)]
        for submitted in known
        for index, shard in enumerate(submitted.shards)
        if submitted.element(index) in found
    }


def is_idle(run: RunDir) -> bool:
    """Whether nothing of the run waits or runs; no if squeue does not answer."""
    settle_if_known(run)
    try:
        return not states(submissions(run))
    except NoAnswer:
        time.sleep(NO_ANSWER_SECONDS)
        return False


def living(run: RunDir, *, for_slurm: bool) -> tuple[Living, ...]:
    """Every array and process of the run's stages with something that waits or runs, oldest first.

    `for_slurm`: for somebody who will submit arrays, and may let them wait for these. Raises NoAnswer: who does not know what
    is in the queue would submit it twice.
    """
    if for_slurm:
        settle(run, final=False)
    else:
        settle_if_known(run)
    known = [one for one in submissions(run) if one.stage in STAGES]
    found = states(known) if for_slurm else _states_if_known(known)
    arrays = []
    for one in known:
        live = frozenset(shard for index, shard in enumerate(one.shards) if one.element(index) in found)
        if live:
            job_id = one.job_id if for_slurm and one.place == "slurm" else None
            tasks = one.tasks or tuple(range(len(one.shards)))
            arrays.append(Living(stage=one.stage, job_id=job_id, shards=one.shards, tasks=tasks, live=live))
    return tuple(arrays)


def states(known: Iterable[Submitted]) -> dict[str, str]:
    """Element id -> state, of those that wait or run. Raises NoAnswer."""
    known = list(known)
    found = controller.states([one.job_id for one in known if one.place == "slurm"])
    found |= {one.job_id: "RUNNING" for one in known if one.place == "local" and _is_ours(one.job_id)}
    return {element: state for element, state in found.items() if state in LIVE_STATES}


def cancel(run: RunDir) -> list[str]:
    """Cancel what lives of the run's jobs; their ids. Raises NoAnswer."""
    doomed = [one for one in submissions(run) if one.place == "local" and _is_ours(one.job_id)]
    for one in doomed:
        kill_tree(int(one.job_id))
    settle(run, final=False)
    known = [one for one in submissions(run) if one.place == "slurm"]
    live = states(known)
    in_queue = [one for one in known if any(one.element(index) in live for index in range(len(one.shards)))]
    if in_queue:
        controller.scancel([one.job_id for one in in_queue])
    return [one.job_id for one in (*doomed, *in_queue)]


def log_files(run: RunDir, stage: str, shard: int, rank: int = 0) -> list[Path]:
    """Logs of one rank of one shard, oldest first: of each submission, its output and its errors."""
    settle_if_known(run)
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


def _states_if_known(known: list[Submitted]) -> dict[str, str]:
    try:
        return states(known)
    except NoAnswer:
        return states(one for one in known if one.place != "slurm")


def _intent_path(run: RunDir, intent: Intent) -> Path:
    return run.jobs_path(intent.stage) / f"{intent.name}.submitting"


def _notes(run: RunDir, suffix: str) -> list[Path]:
    paths = [path for stage in (*STAGES, VERIFY_SPLIT) for path in run.jobs_path(stage).glob(f"*.{suffix}")]
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns)


def _read(path: Path) -> dict[str, Any]:
    """The fields of a note; JSON has no tuples."""
    note = json.loads(path.read_text(encoding="utf-8"))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in note.items()}


def _same_file(found: str, script: Path) -> bool:
    """Whether a script is ours; yes if SLURM does not name it. One folder may have two paths."""
    try:
        return found in ("", "(null)", str(script)) or os.path.samefile(found, script)
    except OSError:
        return False


def _is_ours(pid: str) -> bool:
    """Whether a local job's process still runs; a process id that another program has by now does not count."""
    try:
        return b"submitit" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
