"""What runs on a node: one shard, inside submitit. Imports torch only once the environment is set."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import submitit

from ipt2v.run_dir import WEIGHTS_DIR_VARIABLE, RunDir
from ipt2v.watch import END_TIME, STALL_SECONDS, interrupted

if TYPE_CHECKING:
    from launch.cluster import Cluster


class OneShard(Protocol):
    """A job for submitit that makes the shard it is called with, and can be called again after a warning."""

    def __call__(self, shard: int) -> object: ...

    def checkpoint(self, shard: int) -> submitit.helpers.DelayedSubmission: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """run_shard, given its ranks by submitit; a pickle of a few hundred bytes."""

    run_dir: str
    stage: str
    num_tasks: int
    timeout_minutes: int  # of one life of the element; SLURM may begin others
    signal_delay_seconds: int  # the scheduler warns so long before the end
    stall_minutes: float  # without a sign of life, after which a rank ends itself
    local_weights_dir: str | None = None  # as in the cluster file: $VARIABLES are the node's

    def __call__(self, shard: int) -> str:
        environment = _become_a_rank(f"{self.stage} shard {shard}", self.num_tasks)
        from ipt2v.run import run_shard

        self._choose_weights(environment)
        os.environ[END_TIME] = str(time.time() + self.timeout_minutes * 60 - self.signal_delay_seconds)
        os.environ[STALL_SECONDS] = str(self.stall_minutes * 60)
        result = run_shard(self.run_dir, self.stage, shard)
        if result.out_of_time and environment.global_rank == 0:
            logging.info("%s shard %d: no time for another item; requeued", self.stage, shard)
            os.kill(os.getpid(), signal.SIGUSR2)  # as the scheduler would: submitit requeues the element, and ends it here
        return f"{self.stage} shard {shard}: {result.done} done, {result.failed} failed"

    def _choose_weights(self, environment: submitit.JobEnvironment) -> None:
        """Tell run_shard where to read weights: where they were frozen, or from a copy on this node."""
        # what the submitting shell or a set-up line has left there is no copy that we know anything of
        os.environ.pop(WEIGHTS_DIR_VARIABLE, None)
        if self.local_weights_dir is None:
            return
        from launch.staging import weights_on_node

        run, speaks = RunDir(Path(self.run_dir)), environment.local_rank == 0
        element = f"{environment.job_id}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"  # a requeued element keeps its job id
        folder = weights_on_node(run, self.stage, self.local_weights_dir, element=element, speaks=speaks)
        os.environ[WEIGHTS_DIR_VARIABLE] = str(folder)

    def checkpoint(self, shard: int) -> submitit.helpers.DelayedSubmission:
        """The same call, when the scheduler has warned: what is finished is in files, and what is half done is saved now."""
        interrupted()
        return submitit.helpers.DelayedSubmission(self, shard)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightJob:
    """ipt2v.preflight on every rank, with the resources of a video element; its "shard" is the number of the element."""

    folder: str
    num_tasks: int
    num_gpus: int  # of a node
    weights_dir: str
    local_weights_dir: str
    commands: tuple[str, ...]

    def __call__(self, shard: int) -> str:
        _become_a_rank(f"preflight element {shard}", self.num_tasks)
        from ipt2v.preflight import Asked, run_preflight

        os.environ[STALL_SECONDS] = str(PREFLIGHT_STALL_SECONDS)
        asked = Asked(
            folder=Path(self.folder),
            element=shard,
            node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),  # the name that `exclude` wants
            num_gpus=self.num_gpus,
            weights_dir=self.weights_dir,
            local_weights_dir=self.local_weights_dir,
            commands=self.commands,
        )
        run_preflight(asked)
        return f"preflight element {shard}: reported"

    def checkpoint(self, shard: int) -> submitit.helpers.DelayedSubmission:
        """Never again by itself: who waits for it would wait for ever."""
        raise TimeoutError(f"preflight element {shard}: the scheduler ended it before it was done; run it again")


PREFLIGHT_STALL_SECONDS = 120.0  # more than a file of another node may take to come into sight


def _become_a_rank(what: str, num_tasks: int) -> submitit.JobEnvironment:
    """Give torch this task's place among the others, and logs their form.

    Raises ValueError unless there are `num_tasks` tasks.
    """
    environment = submitit.JobEnvironment()
    if environment.num_tasks != num_tasks:
        # a site default (SBATCH_NTASKS_PER_NODE, ...) can multiply tasks: submitit issue 1727
        raise ValueError(
            f"{what}: found {environment.num_tasks} tasks, asked for {num_tasks}; "
            "look for SBATCH_* or SLURM_* defaults of the site that change the number of tasks"
        )
    # not CUDA_VISIBLE_DEVICES: its default narrows it to one GPU by local rank, wrong where a node is shared
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    return environment


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayJob:
    """What every element of an array runs: its job, for the shard that stands at the element's index."""

    job: OneShard
    shards: tuple[int, ...]
    tasks: tuple[int, ...]  # array index that makes shards[i]

    def __call__(self) -> object:
        return self.job(self._shard())

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return self.job.checkpoint(self._shard())

    def _shard(self) -> int:
        index = submitit.JobEnvironment().array_task_id
        return self.shards[self.tasks.index(int(index))]


def make_job(run: RunDir, cluster: Cluster, stage: str) -> ShardJob:
    """The job of a stage of a run on a site."""
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


_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_")
# the last is what a job writes here; left over in a shell, it would have a run read some other run's weights
_JOB_VARIABLES = ("SLURM_", "SLURMD_", "SUBMITIT_", *_RANK_VARIABLES, WEIGHTS_DIR_VARIABLE)


@contextmanager
def outside_any_job() -> Iterator[None]:
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
