"""DeepSpeed, started quietly over torch's ranks. The one file that imports deepspeed; knows no model."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist


def is_installed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


@contextmanager
def running_deepspeed(device: torch.device) -> Iterator[Any]:
    """The module deepspeed, over all of torch's ranks, which must be up; inside, what is printed goes to stderr."""
    with redirect_stdout(sys.stderr):  # it prints, and its logger keeps the stdout of its import
        import deepspeed

        if device.type == "cpu":
            # DeepSpeed 0.19.8 would compile an all-reduce over shared memory with g++, and end in a segmentation fault in it
            # where LOCAL_SIZE is not in the environment. With no compiled operator declared usable, gloo does it.
            deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(dist_backend=dist.get_backend())  # it wraps torch's group, which is there already
        yield deepspeed


@contextmanager
def alone_in_a_group(device: torch.device) -> Iterator[None]:
    """torch's process group of this rank alone, where there is none yet: DeepSpeed needs one. It is gone afterwards."""
    store = dist.HashStore()  # in this process: no port, no file
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        # DeepSpeed destroys with it what it has derived from it, and would else use again; it may not have been started
        comm = sys.modules.get("deepspeed.comm")
        (comm if comm is not None and comm.is_initialized() else dist).destroy_process_group()


@contextmanager
def local_rank_of(device: torch.device) -> Iterator[None]:
    """LOCAL_RANK in the environment is the number of `device`, and afterwards what it was.

    DeepSpeed 0.19.8 selects a GPU by it, in zero.Init, in its engine and in ZeRO-3's forwards, and can be told no other way. A
    rank alone may have none, and a task that was given one GPU of its own sees that as 0.
    """
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        if before is not None:
            os.environ["LOCAL_RANK"] = before
