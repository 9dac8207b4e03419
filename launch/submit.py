"""Give a plan to SLURM, so that whatever dies at whatever moment, submitting again goes on with it and nothing runs twice.

Before sbatch is called, the array's pickle, its script and a note of what is intended are on disk; its answer is noted after.
If no answer comes, SLURM is asked by the job's name, which is never used twice.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import _make_sbatch_string

from ipt2v.atomic import replacing, write_text
from ipt2v.run_dir import STAGES, VERIFY_SPLIT, RunDir
from launch import controller
from launch.arrays import Array, plan_arrays
from launch.cluster import Cluster
from launch.controller import NoAnswer, Refused
from launch.job import ArrayJob, OneShard, make_job, outside_any_job
from launch.plan import Submission
from launch.progress import ranges
from launch.queue import Intent, Submitted, accept, drop, find, intend

MAX_TIMEOUTS = 1000  # requeues after a time limit: each life of an element goes on where the one before it was
# Longer than MessageTimeout, 10 s: an sbatch that was given up has arrived by then, or never will
PAUSES_SECONDS = (15.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitter:
    """How the arrays of one run are submitted. Whoever uses it holds the run's lock, and has settled what was left open."""

    run: RunDir
    cluster: Cluster
    make_job: Callable[[RunDir, Cluster, str], OneShard] = make_job
    pauses: tuple[float, ...] = PAUSES_SECONDS  # seconds, before SLURM is asked what became of an sbatch without an answer

    def submit(self, plan: Iterable[Submission], tell: Callable[[Submitted], None]) -> None:
        """sbatch every array of the plan, at once; `tell` is called for each that SLURM has accepted.

        Raises ValueError if SLURM refuses one, OSError if it does not answer; what it has accepted before stays, and is noted.
        """
        if shutil.which("srun") is None:
            raise ValueError("--on slurm: no srun on PATH; log in to the cluster, or use --on local")
        with outside_any_job():
            arrays = plan_arrays(plan, max_array_size=controller.max_array_size(), parallelism=_parallelism(self.cluster))
            attempts: dict[int, int] = {}
            before = None
            for array in arrays:
                if array.submission not in attempts:
                    attempts[array.submission] = next_attempt(self.run, array.stage)
                before = self._submit(array, self._after(array, before), attempts[array.submission])
                tell(before)

    def _after(self, array: Array, before: Submitted | None) -> str | None:
        """Id of the array that one has to wait for, if any. Raises OSError if SLURM does not know it: it would not wait."""
        parent = before.job_id if array.after and before else array.parent
        if parent is None or self._is_known(parent):
            return parent
        if array.stage == "score":  # takes the videos that are there
            return None
        run = self.run
        left = [shard for shard in array.shards if run.count("first_frame", shard, run.shard_keys(shard)).missing]
        if left:
            raise OSError(
                f"array {parent}: SLURM does not know it any more, and first frames of shards {ranges(left)} are not there; "
                "their videos cannot wait for it; submit again"
            )
        return None

    def _submit(self, array: Array, after: str | None, attempt: int) -> Submitted:
        pauses = list(self.pauses)
        while True:
            intent = self._write(array, after, attempt)
            try:
                return accept(self.run, intent, controller.sbatch(_path(self.run, intent, "sh")))
            except Refused as error:
                drop(self.run, intent)
                raise ValueError(
                    f"sbatch refused the {array.stage} array: {error}; `ipt2v plan` prints its script, and submitting again "
                    "goes on after what is in the queue"
                ) from error
            except NoAnswer as error:
                job_id = self._outcome(intent, error, pauses)
            if job_id:
                return accept(self.run, intent, job_id)
            drop(self.run, intent)
            attempt = next_attempt(self.run, array.stage)  # a name is never used twice: the first sbatch may still arrive

    def _outcome(self, intent: Intent, error: NoAnswer, pauses: list[float]) -> str:
        """Id that SLURM has given to an array, "" if it does not know it. Takes from `pauses` what it waits.

        Raises OSError if that cannot be found out, or no pause is left for another try.
        """
        while pauses:
            print(f"{error}; looking for {intent.name} in {pauses[0]:g} s", file=sys.stderr, flush=True)
            time.sleep(pauses.pop(0))
            try:
                return (find(self.run, intent) or [""])[-1]
            except NoAnswer as silence:
                error = silence
        raise OSError(
            f"{error}; whether SLURM has {intent.name} is not known; submit again, which looks for it first"
        ) from error

    def _is_known(self, job_id: str) -> bool:
        for pause in self.pauses:
            try:
                return controller.is_known(job_id)
            except NoAnswer as error:
                print(f"{error}; asking again in {pause:g} s", file=sys.stderr, flush=True)
                time.sleep(pause)
        return controller.is_known(job_id)

    def _write(self, array: Array, after: str | None, attempt: int) -> Intent:
        """Everything that the array needs, on disk; the note last."""
        run, resources = self.run, self.cluster.resources(array.stage)
        name = f"{run.root.name}.{array.stage}.{attempt}.{array.window}"
        intent = Intent(stage=array.stage, name=name, shards=array.shards, tasks=array.tasks, after=after)
        job = ArrayJob(job=self.make_job(run, self.cluster, array.stage), shards=array.shards, tasks=array.tasks)
        call = DelayedSubmission(job)
        call.set_timeout(resources.timeout_minutes, MAX_TIMEOUTS)
        with replacing(_path(run, intent, "pkl")) as scratch:
            call.dump(scratch)
        write_text(_path(run, intent, "sh"), script(run, self.cluster, array, after, name))
        intend(run, intent)
        return intent


def sbatch_text(run: RunDir, cluster: Cluster, submission: Submission, after: str | None) -> str:
    """The script that sbatch would be given, and what is cut from an array that is too long; needs no SLURM."""
    size = controller.max_array_size()
    alone = replace(submission, after=False)  # of whatever came before it in the plan, `after` says all
    first, *others = plan_arrays([alone], max_array_size=size, parallelism=_parallelism(cluster))
    name = f"{run.root.name}.{submission.stage}.{next_attempt(run, submission.stage)}.{first.window}"
    cut = [f"# another array, as none may have more than {size} elements: shards {ranges(one.shards)}" for one in others]
    return "\n".join([script(run, cluster, first, after or first.parent, name).rstrip(), *cut])


def script(run: RunDir, cluster: Cluster, array: Array, after: str | None, name: str) -> str:
    """What sbatch is given, by submitit."""
    folder = run.jobs_path(array.stage)
    words = [*cluster.container, "python"] if cluster.container else [str(Path(sys.executable))]
    command = shlex.join([*words, "-u", "-m", "launch.element", str(folder), name])
    parameters = slurm_parameters(cluster, array, after)
    return str(_make_sbatch_string(command=command, folder=folder, job_name=name, map_count=len(array.tasks), **parameters))


def slurm_parameters(cluster: Cluster, array: Array, after: str | None) -> dict[str, Any]:
    """What submitit turns into #SBATCH lines."""
    resources = cluster.resources(array.stage)
    # --requeue, whatever the site's default: after a node failure, too
    additional: dict[str, Any] = {"array": f"{ranges(array.tasks)}%{min(len(array.tasks), array.parallelism)}", "requeue": True}
    if after:  # =yes, whatever the site's default: else an element whose first frames failed would wait for ever
        additional |= {"kill-on-invalid-dep": "yes"}
    parameters: dict[str, Any] = {
        "time": resources.timeout_minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.num_tasks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "signal_delay_s": cluster.signal_delay_seconds,
        "srun_args": ["--kill-on-bad-exit=1"],  # one rank dies: without it the others wait for the time limit
        "additional_parameters": additional,
        "setup": list(cluster.setup) or None,
        "dependency": f"aftercorr:{after}" if after else None,
        "gpus_per_node": resources.gpus_per_node or None,
        "mem": None if resources.mem_gb is None else f"{round(resources.mem_gb * 1024)}M",
    }
    parameters |= {name: getattr(resources, name) for name in ("partition", "account", "qos", "constraint", "exclude")}
    return {name: value for name, value in parameters.items() if value is not None}


def next_attempt(run: RunDir, stage: str) -> int:
    """A number that no job name of the stage has had: the scripts of all stay in the run folder."""
    name = re.compile(rf"{re.escape(f'{run.root.name}.{stage}')}\.(\d+)\.\d+\.(?:pkl|sh)")
    used = [int(match[1]) for path in run.jobs_path(stage).glob("*.*") if (match := name.fullmatch(path.name))]
    return 1 + max(used, default=0)


def _parallelism(cluster: Cluster) -> dict[str, int]:
    return {stage: cluster.resources(stage).array_parallelism for stage in (*STAGES, VERIFY_SPLIT)}


def _path(run: RunDir, intent: Intent, suffix: str) -> Path:
    return run.jobs_path(intent.stage) / f"{intent.name}.{suffix}"
