"""What srun starts for each rank of an array element: the array's one pickle becomes the element's, then submitit's own main.

submitit names a pickle for each element after sbatch has answered, and an element waits a minute for its own; a driver that
dies in between loses the array. Here all is written before sbatch, and the element helps itself.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import submitit
from submitit.core.submission import process_job
from submitit.core.utils import JobPaths

from ipt2v.atomic import replacing


def prepare(folder: Path, name: str, paths: JobPaths) -> None:
    """Give the element its pickle, if no earlier life has left one. Any number of ranks may do so at once.

    Raises SystemExit if `submit` has given the array up: its shards are in another one.
    """
    if (folder / f"{name}.dropped").exists():
        sys.exit(f"{name}: SLURM took this array after `ipt2v submit` had given it up; its shards are in another array")
    # submitit refuses to write over its own scratch files, which a kill leaves behind; issue 1617, not fixed in 1.5.4
    scratch = [paths.result_pickle]
    if paths.task_id == 0:  # the other ranks may come when rank 0 is at it again
        scratch.append(paths.submitted_pickle)
    for path in scratch:
        path.with_suffix(path.suffix + ".save_tmp").unlink(missing_ok=True)
    source, target = folder / f"{name}.pkl", paths.submitted_pickle
    if target.exists():
        return
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        with replacing(target) as copy:
            shutil.copyfile(source, copy)


def main(arguments: Sequence[str]) -> None:
    folder, name = arguments
    environment = submitit.JobEnvironment()
    prepare(Path(folder), name, JobPaths(folder, job_id=environment.job_id, task_id=environment.global_rank))
    process_job(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
