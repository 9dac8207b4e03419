"""What runs on a node: one shard, inside submitit. Imports torch only once the environment is set."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import submitit


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """run_shard, given its ranks by submitit; a pickle of a few hundred bytes."""

    run_dir: str
    stage: str
    num_tasks: int

    def __call__(self, shard: int) -> str:
        environment = submitit.JobEnvironment()
        if environment.num_tasks != self.num_tasks:
            # a site default (SBATCH_NTASKS_PER_NODE, ...) can multiply tasks: submitit issue 1727
            raise ValueError(
                f"{self.stage} shard {shard}: found {environment.num_tasks} tasks, asked for {self.num_tasks}; "
                "look for SBATCH_* or SLURM_* defaults of the site that change the number of tasks"
            )
        # not CUDA_VISIBLE_DEVICES: its default narrows it to one GPU by local rank, wrong where a node is shared
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
        from ipt2v.run import run_shard

        result = run_shard(self.run_dir, self.stage, shard)
        return f"{self.stage} shard {shard}: {result.done} done, {result.failed} failed"

    def checkpoint(self, shard: int) -> submitit.helpers.DelayedSubmission:
        """The same call: finished items are files, so going on needs nothing else."""
        return submitit.helpers.DelayedSubmission(self, shard)
