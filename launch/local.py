"""Run a plan without a queue: as local processes, or in this process. Record files tell how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError

from ipt2v.run_dir import RunDir
from launch.cluster import Cluster, Resources
from launch.job import OneShard, make_job, outside_any_job
from launch.plan import Submission
from launch.queue import Submitted, kill_tree, remember

LOCAL_POLL_SECONDS = 0.2


def run_local(run: RunDir, cluster: Cluster, plan: Iterable[Submission], tick: Callable[[], None]) -> list[str]:
    """Run the plan by submitit's local executor and wait for it, calling `tick` meanwhile; what went wrong, a line each.

    submitit's local executor has no queue: an element is started when the one that it depends on has succeeded and fewer than
    `array_parallelism` of its stage run.
    """
    waiting = list(_elements(plan))
    running: dict[_Element, Any] = {}
    succeeded: set[tuple[str, int]] = set()
    problems: list[str] = []
    try:
        while waiting or running:
            for element in [one for one in waiting if one.after is None or (one.after, one.shard) in succeeded]:
                if _num_running(element.stage, running) < cluster.resources(element.stage).array_parallelism:
                    running[element] = _start_local(run, cluster, element)
                    waiting.remove(element)
            for element in [one for one, job in running.items() if job.done()]:
                problem = _problem(run, element, running.pop(element))
                if problem is None:
                    succeeded.add((element.stage, element.shard))
                else:
                    problems.append(problem)
                    waiting = [one for one in waiting if one.after is None or one.shard != element.shard]
            tick()
            time.sleep(LOCAL_POLL_SECONDS)
    finally:
        for job in running.values():  # Ctrl-C: no process outlives the driver
            kill_tree(int(job.job_id))
    return problems


def submit_local(run: RunDir, stage: str, resources: Resources, job: OneShard, shard: int) -> tuple[Any, Submitted]:
    """Start one element as processes of this machine: submitit's job, and the note that the run folder has of it."""
    executor = submitit.LocalExecutor(folder=run.jobs_path(stage))
    executor.update_parameters(
        timeout_min=resources.timeout_minutes,  # its default is two minutes
        tasks_per_node=resources.num_tasks_per_node,
        gpus_per_node=resources.gpus_per_node,  # without it CUDA_VISIBLE_DEVICES is empty
    )
    with outside_any_job():
        started = executor.submit(job, shard)
    submitted = Submitted(place="local", stage=stage, job_id=started.job_id, shards=(shard,), after=None)
    remember(run, submitted)
    return started, submitted


def run_here(run: RunDir, plan: Iterable[Submission], tick: Callable[[], None]) -> None:
    """Run the plan in this process, one shard after the other, each on one rank."""
    from ipt2v.run import run_shard

    with outside_any_job():
        for submission in plan:
            for shard in submission.shards:
                run_shard(run.root, submission.stage, shard)
                tick()


@dataclass(frozen=True, slots=True)
class _Element:
    """One element of the plan, as the local loop sees it."""

    stage: str
    shard: int
    after: str | None  # the stage of its shard that it waits for


def _elements(plan: Iterable[Submission]) -> Iterator[_Element]:
    before = ""
    for one in plan:
        for shard in one.shards:
            yield _Element(stage=one.stage, shard=shard, after=before if one.after else None)
        before = one.stage


def _num_running(stage: str, running: Iterable[_Element]) -> int:
    return sum(1 for element in running if element.stage == stage)


def _start_local(run: RunDir, cluster: Cluster, element: _Element) -> Any:
    stage, resources = element.stage, cluster.resources(element.stage)
    if resources.nodes > 1:
        raise ValueError(f"{stage}.nodes: found {resources.nodes}, expected 1 for --on local; use another --cluster file")
    return submit_local(run, stage, resources, make_job(run, cluster, stage), element.shard)[0]


def _problem(run: RunDir, element: _Element, job: Any) -> str | None:
    """Why an ended local job did not succeed, or None."""
    try:
        job.results()
    except (FailedJobError, UncompletedJobError) as error:
        last = str(error).strip().splitlines()[-1]
        where = f"{element.stage} {element.shard}"
        return f"{where}: {last}; see `ipt2v logs {run.root} {where}`"
    return None
