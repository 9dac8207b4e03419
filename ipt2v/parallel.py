"""The ranks that work on one element: who they are, their device, their groups. Knows torch's environment, no scheduler."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from ipt2v.watch import collective_timeout

if TYPE_CHECKING:
    from ipt2v.xdit import Subgroups

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The ranks of this element, as seen from one of them. They are numbered node by node."""

    rank: int
    world_size: int
    num_nodes: int
    device: torch.device

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

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, in the order of the ranks, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, act: Callable[[], T], kind: type[Exception]) -> T:
        """What `act` gives on this rank. If it raises `kind` on one rank, all raise it: the others would wait for ever."""
        failure: Exception | None = None
        try:
            found = [act()]
        except kind as error:
            failure = error
        if self.anywhere(failure is not None):
            raise next(one for one in self.gather(failure) if one is not None)
        return found[0]

    def anywhere(self, here: bool) -> bool:
        """Whether it is so on any rank. In one small collective: all GPUs wait meanwhile, and gathering objects takes two."""
        if self.world_size == 1:
            return here
        flag = torch.tensor(here, dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def meet(self) -> None:
        """Return when every rank is here.

        Before the first collective of subgroups, if ranks may come to it minutes apart: theirs time out after NCCL's ten.
        """
        if self.world_size > 1:
            dist.barrier()

    def split(self, *, cfg: int, ulysses: int, ring: int) -> Subgroups:
        """Subgroups for a split of these ranks, made anew on each call; to be called by all, and not by one rank alone."""
        from ipt2v import xdit

        backend = dist.get_backend()
        return xdit.start(cfg=cfg, ulysses=ulysses, ring=ring, device_index=self.device.index or 0, backend=backend)


@contextmanager
def group_from_environment(*, max_ranks: int | None = None) -> Iterator[Group]:
    """The group that RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_* describe; without them, one rank alone.

    Raises ValueError if there are more ranks than `max_ranks`, or if they are not numbered node by node.
    """
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    if max_ranks is not None and world_size > max_ranks:
        raise ValueError(
            f"WORLD_SIZE: found {world_size} ranks, expected at most {max_ranks} for this stage; start fewer tasks per element"
        )
    num_nodes = count_nodes(rank, world_size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    group = Group(rank=rank, world_size=world_size, num_nodes=num_nodes, device=_device(local_rank))
    if world_size == 1:
        yield group
        return
    from ipt2v import xdit

    backend = "nccl" if group.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=collective_timeout())
    try:
        yield group
    finally:
        xdit.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def count_nodes(rank: int, world_size: int, local_rank: int, local_world_size: int) -> int:
    """Number of nodes, of `local_world_size` ranks each. Raises ValueError if it is not whole, or the rank is out of place."""
    if local_world_size < 1 or world_size % local_world_size:
        raise ValueError(
            f"LOCAL_WORLD_SIZE: found {local_world_size} of {world_size} ranks on this node, expected the same number on "
            "every node; start as many tasks on each"
        )
    num_nodes = world_size // local_world_size
    # On one node nobody has to be a neighbour; and who starts ranks by hand may count them as he likes.
    if num_nodes > 1 and local_rank != rank % local_world_size:
        raise ValueError(
            f"RANK: found {rank} with LOCAL_RANK {local_rank} of {local_world_size} on its node, expected ranks numbered node "
            "by node, so that neighbours share one; with srun: --distribution=block"
        )
    return num_nodes


def _device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        # a task that was given one GPU of its own sees it as 0, whatever its local rank
        index = local_rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    # On a CPU the order of a sum depends on the number of threads: one, so that here, local and slurm agree bit for bit.
    torch.set_num_threads(1)
    return torch.device("cpu")


def is_loss_of_a_rank(error: BaseException) -> bool:
    """Whether a collective says that another rank is gone or silent. gloo has no type of its own for it, only its name."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def release(device: torch.device) -> None:
    """Give back the memory of what nothing refers to any more."""
    gc.collect()  # closures and modules refer to each other in circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
