"""The ranks that work on one element: who they are, their device, their group. Knows torch's environment, no scheduler."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

# A collective that waits longer has lost a rank; the slowest legitimate wait is one rank reading 35 GB of weights.
COLLECTIVE_TIMEOUT_MINUTES = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The ranks of this element, as seen from one of them."""

    rank: int
    world_size: int
    device: torch.device
    ulysses: ProcessGroup | None  # None with one rank

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, value: T) -> T:
        """Rank 0's `value`, on every rank. Decisions go through here: ranks that decide alone hang."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


@contextmanager
def group_from_environment(*, max_ranks: int | None = None) -> Iterator[Group]:
    """The group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe; without them, one rank alone.

    Enter once in a process (xDiT's groups are globals). Raises ValueError if there are more ranks than `max_ranks`.
    """
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    if max_ranks is not None and world_size > max_ranks:
        raise ValueError(
            f"WORLD_SIZE: found {world_size} ranks, expected at most {max_ranks} for this stage; start fewer tasks per element"
        )
    device = _device(local_rank)
    if world_size == 1:
        yield Group(rank=0, world_size=1, device=device, ulysses=None)
        return
    from ipt2v import xdit

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=COLLECTIVE_TIMEOUT_MINUTES))
    try:
        ulysses = xdit.start_ulysses(rank=rank, world_size=world_size, device_index=device.index or 0, backend=backend)
        yield Group(rank=rank, world_size=world_size, device=device, ulysses=ulysses)
    finally:
        xdit.stop()


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        # a task that was given one GPU of its own sees it as 0, whatever its local rank
        index = local_rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    # On a CPU the order of a sum depends on the number of threads: one, so that here, local and slurm agree bit for bit.
    torch.set_num_threads(1)
    return torch.device("cpu")
