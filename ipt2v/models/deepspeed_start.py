"""DeepSpeed, started quietly over torch's ranks. The one file that imports deepspeed; knows no model."""

from __future__ import annotations

import importlib.util
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
