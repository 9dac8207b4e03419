"""Start what a plan says: as SLURM arrays, as local processes, or in this process. Record files tell how far it is."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from ipt2v.run_dir import WEIGHTS_DIR_VARIABLE, RunDir
from launch.cluster import Cluster
from launch.job import ShardJob
from launch.plan import Submission
from launch.queue import Submitted, kill_tree, remember

LOCAL_POLL_SECONDS = 0.2
MAX_TIMEOUTS = 1000  # requeues after a time limit: each life of an element goes on where the one before it was


def submit_slurm(run: RunDir, cluster: Cluster, plan: Iterable[Submission]) -> list[Submitted]:
    """sbatch every array of the plan, at once; the second waits for the first element by element."""
    done: list[Submitted] = []
    for submission in plan:
        after = done[-1].job_id if submission.after else None
        folder = run.jobs_path(submission.stage)
        if not SlurmExecutor.affinity():
            raise ValueError("--on slurm: no srun on PATH; log in to the cluster, or use --on local")
        executor = SlurmExecutor(folder=folder, max_num_timeout=MAX_TIMEOUTS, python=_python(cluster))
        executor.update_parameters(**slurm_parameters(run, cluster, submission.stage, after))
        with _outside_any_job():
            jobs = _map_array(executor, _job(run, cluster, submission.stage), submission.shards)
        submitted = Submitted(
            place="slurm",
            stage=submission.stage,
            job_id=jobs[0].job_id.partition("_")[0],
            shards=submission.shards,
            after=after,
        )
        remember(run, submitted)
        done.append(submitted)
    return done


def sbatch_text(run: RunDir, cluster: Cluster, submission: Submission, after: str | None) -> str:
    """The script that sbatch would be given; needs no SLURM."""
    folder = run.jobs_path(submission.stage)
    command = f"{_python(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    parameters = slurm_parameters(run, cluster, submission.stage, after)
    if len(submission.shards) > 1:
        parameters["map_count"] = len(submission.shards)
    return _make_sbatch_string(command=command, folder=folder, **parameters)


def slurm_parameters(run: RunDir, cluster: Cluster, stage: str, after: str | None) -> dict[str, Any]:
    """What submitit turns into #SBATCH lines."""
    resources = cluster.resources(stage)
    # =yes, whatever the site's default: else an element whose first frames failed would wait for ever
    additional: dict[str, Any] = {"kill-on-invalid-dep": "yes"} if after else {}
    parameters: dict[str, Any] = {
        "job_name": f"{run.root.name}.{stage}",
        "time": resources.timeout_minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.num_tasks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "array_parallelism": resources.array_parallelism,
        "signal_delay_s": cluster.signal_delay_seconds,
        "srun_args": ["--kill-on-bad-exit=1"],  # one rank dies: without it the others wait for the time limit
        "additional_parameters": additional or None,
        "setup": list(cluster.setup) or None,
        "dependency": f"aftercorr:{after}" if after else None,
        "gpus_per_node": resources.gpus_per_node or None,
        "mem": None if resources.mem_gb is None else f"{round(resources.mem_gb * 1024)}M",
    }
    parameters |= {name: getattr(resources, name) for name in ("partition", "account", "qos", "constraint", "exclude")}
    return {name: value for name, value in parameters.items() if value is not None}


def run_local(run: RunDir, cluster: Cluster, plan: Iterable[Submission], tick: Callable[[], None]) -> list[str]:
    """Run the plan by submitit's local executor and wait for it, calling `tick` meanwhile; what went wrong, a line each.

    submitit's local executor has no queue: an element is started when the one that it depends on has succeeded and fewer than
    `array_parallelism` of its stage run.
    """
    waiting = [_Element(one.stage, shard, one.after) for one in plan for shard in one.shards]
    running: dict[_Element, Any] = {}
    succeeded: set[tuple[str, int]] = set()
    problems: list[str] = []
    try:
        while waiting or running:
            for element in [one for one in waiting if not one.after or ("first_frame", one.shard) in succeeded]:
                if _num_running(element.stage, running) < cluster.resources(element.stage).array_parallelism:
                    running[element] = _start_local(run, cluster, element)
                    waiting.remove(element)
            for element in [one for one, job in running.items() if job.done()]:
                problem = _problem(run, element, running.pop(element))
                if problem is None:
                    succeeded.add((element.stage, element.shard))
                else:
                    problems.append(problem)
                    waiting = [one for one in waiting if not (one.after and one.shard == element.shard)]
            tick()
            time.sleep(LOCAL_POLL_SECONDS)
    finally:
        for job in running.values():  # Ctrl-C: no process outlives the driver
            kill_tree(int(job.job_id))
    return problems


def run_here(run: RunDir, plan: Iterable[Submission], tick: Callable[[], None]) -> None:
    """Run the plan in this process, one shard after the other, each on one rank."""
    from ipt2v.run import run_shard

    with _outside_any_job():
        for submission in plan:
            for shard in submission.shards:
                run_shard(run.root, submission.stage, shard)
                tick()


def _map_array(executor: SlurmExecutor, job: ShardJob, shards: tuple[int, ...]) -> list[Any]:
    try:
        return executor.map_array(job, shards)
    except FailedJobError as error:
        text = "; ".join(line.removeprefix("sbatch: ") for line in str(error).splitlines())
        raise ValueError(f"sbatch refused the {job.stage} array: {text}; `ipt2v plan` prints its script") from error


_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_")
# the last is what launch/job.py writes; left over in a shell, it would have a run read some other run's weights
_JOB_VARIABLES = ("SLURM_", "SLURMD_", "SUBMITIT_", *_RANK_VARIABLES, WEIGHTS_DIR_VARIABLE)


@contextmanager
def _outside_any_job() -> Iterator[None]:
    """Without the variables of a job that we may be in, so that its ranks, task counts and weights are not handed down.

    submitit's own clean_env would also take SLURM_CONF, which says where the cluster is, and the user's SBATCH_* defaults.
    """
    inherited = {name: value for name, value in os.environ.items() if name.startswith(_JOB_VARIABLES) and name != "SLURM_CONF"}
    for name in inherited:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(inherited)


@dataclass(frozen=True, slots=True)
class _Element:
    """One element of the plan, as the local loop sees it."""

    stage: str
    shard: int
    after: bool  # waits for the first frames of its shard


def _num_running(stage: str, running: Iterable[_Element]) -> int:
    return sum(1 for element in running if element.stage == stage)


def _start_local(run: RunDir, cluster: Cluster, element: _Element) -> Any:
    stage, resources = element.stage, cluster.resources(element.stage)
    if resources.nodes > 1:
        raise ValueError(f"{stage}.nodes: found {resources.nodes}, expected 1 for --on local; use another --cluster file")
    executor = submitit.LocalExecutor(folder=run.jobs_path(stage))
    executor.update_parameters(
        timeout_min=resources.timeout_minutes,  # its default is two minutes
        tasks_per_node=resources.num_tasks_per_node,
        gpus_per_node=resources.gpus_per_node,  # without it CUDA_VISIBLE_DEVICES is empty
    )
    with _outside_any_job():
        job = executor.submit(_job(run, cluster, stage), element.shard)
    remember(run, Submitted(place="local", stage=stage, job_id=job.job_id, shards=(element.shard,), after=None))
    return job


def _problem(run: RunDir, element: _Element, job: Any) -> str | None:
    """Why an ended local job did not succeed, or None."""
    try:
        job.results()
    except (FailedJobError, UncompletedJobError) as error:
        last = str(error).strip().splitlines()[-1]
        where = f"{element.stage} {element.shard}"
        return f"{where}: {last}; see `ipt2v logs {run.root} {where}`"
    return None


def _job(run: RunDir, cluster: Cluster, stage: str) -> ShardJob:
    resources = cluster.resources(stage)
    return ShardJob(
        run_dir=str(run.root),
        stage=stage,
        num_tasks=resources.num_tasks,
        timeout_minutes=resources.timeout_minutes,
        signal_delay_seconds=cluster.signal_delay_seconds,
        stall_minutes=cluster.stall_minutes,
        local_weights_dir=cluster.local_weights_dir,
    )


def _python(cluster: Cluster) -> str:
    return shlex.join([*cluster.container, "python"] if cluster.container else [str(Path(sys.executable))])
