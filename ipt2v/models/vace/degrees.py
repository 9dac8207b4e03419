"""How the ranks of one video share its work. Pure arithmetic, no torch: the launcher asks before it submits.

Three ways, best first. A CFG pair: one half computes the guided velocity, the other the unguided one; they exchange one latent
a step. Ulysses (arXiv 2309.14509): tokens are swapped for heads around self-attention; a rank sends less the more ranks there
are, but each to each, so only inside a node. A ring (arXiv 2310.01889): keys and values go round; a rank sends the same however
many there are, to one neighbour, while it computes. In bytes: tests/split_worker.py counts them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank sits: its number in each of the three groups that it belongs to."""

    cfg_index: int  # 0 computes the guided velocity, 1 the unguided one
    ring_index: int
    ulysses_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """How many ranks share a video in each of the three ways; their product is the number of ranks."""

    cfg: int = 1
    ulysses: int = 1
    ring: int = 1

    @property
    def sequence(self) -> int:
        """Number of ranks that the tokens are split over."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        return self.cfg * self.sequence

    def place(self, rank: int) -> Place:
        """xDiT's order: CFG outermost, then ring, then Ulysses. With ranks numbered node by node, Ulysses ranks are neighbours
        inside a node, and CFG partners, half of all ranks apart, are on different nodes if there are several."""
        half, within = divmod(rank, self.sequence)
        ring_index, ulysses_index = divmod(within, self.ulysses)
        return Place(cfg_index=half, ring_index=ring_index, ulysses_index=ulysses_index)

    def __str__(self) -> str:
        return f"cfg {self.cfg} x ulysses {self.ulysses} x ring {self.ring}"


def degrees(world_size: int, num_nodes: int, num_heads: int, *, guided: bool) -> Degrees:
    """The best legal split: a CFG pair if there is guidance, then as much Ulysses as fits into a node, a ring for the rest.

    Raises ValueError, with what is wrong with each candidate, if there is none.
    """
    _check_nodes(world_size, num_nodes)
    faults = []
    for split in _candidates(world_size, guided=guided):
        fault = _fault(split, num_nodes, num_heads) or _slow_ring(split, num_nodes)
        if not fault:
            return split
        faults.append(f"{split}: {fault}")
    legal = ", ".join(map(str, _legal_world_sizes(num_nodes, num_heads, guided=guided, at_least=world_size)))
    raise ValueError(
        f"video: {world_size} ranks on {num_nodes} nodes cannot share a model of {num_heads} heads ({'; '.join(faults)}); "
        f"set nodes x gpus_per_node of the video stage to {num_nodes} nodes with one of {legal} ranks in all"
    )


def check_degrees(split: Degrees, world_size: int, num_heads: int, *, guided: bool, num_nodes: int = 1) -> None:
    """Raise ValueError if the ranks cannot work in a split that someone has named; it may be slower than degrees()'s."""
    _check_nodes(world_size, num_nodes)
    if min(split.cfg, split.ulysses, split.ring) < 1 or split.world_size != world_size:
        raise ValueError(f"{split}: found {split.world_size} ranks, expected {world_size}; the product must be all ranks")
    if split.cfg > (2 if guided else 1):
        found = "more than a guided and an unguided half" if guided else "guidance is off, there is no unguided half"
        raise ValueError(f"{split}: {found}; set cfg to {'1 or 2' if guided else '1'}")
    if fault := _fault(split, num_nodes, num_heads):
        raise ValueError(f"{split}: {fault}; legal for {num_heads} heads: {', '.join(map(str, divisors(num_heads)))}")


def divisors(number: int) -> tuple[int, ...]:
    """All of them, rising; of the number of heads: the Ulysses degrees that it allows."""
    return tuple(one for one in range(1, number + 1) if number % one == 0)


def _check_nodes(world_size: int, num_nodes: int) -> None:
    if num_nodes < 1 or world_size < 1 or world_size % num_nodes:
        raise ValueError(f"found {world_size} ranks on {num_nodes} nodes, expected the same number of ranks on each node")


def _candidates(world_size: int, *, guided: bool) -> Iterator[Degrees]:
    """Every split, best first."""
    for cfg in (2, 1) if guided and world_size % 2 == 0 else (1,):
        sequence = world_size // cfg
        for ulysses in reversed(divisors(sequence)):
            yield Degrees(cfg=cfg, ulysses=ulysses, ring=sequence // ulysses)


def _fault(split: Degrees, num_nodes: int, num_heads: int) -> str:
    """Why the split does not work; "" if it does."""
    per_node = split.world_size // num_nodes
    if num_heads % split.ulysses:
        return f"ulysses {split.ulysses} does not divide {num_heads} heads"
    if per_node % split.ulysses:
        return f"ulysses {split.ulysses} does not divide the {per_node} ranks of a node"
    return ""


def _slow_ring(split: Degrees, num_nodes: int) -> str:
    """Why the split works, but is not worth its GPUs; "" if it is.

    Between nodes, each of a node's ranks would send all keys and values: Ulysses divides that by its degree. Nodes of one rank
    have no choice.
    """
    per_node = split.world_size // num_nodes
    inside_a_node = per_node % split.sequence == 0
    if split.ulysses > 1 or split.ring == 1 or per_node == 1 or inside_a_node:
        return ""
    return f"a ring without ulysses would cross nodes of {per_node} ranks"


def _legal_world_sizes(num_nodes: int, num_heads: int, *, guided: bool, at_least: int) -> tuple[int, ...]:
    """Numbers of ranks on so many nodes that degrees() finds a split for, up to 8 on a node or `at_least`."""
    most = max(8 * num_nodes, at_least)
    return tuple(
        world_size
        for world_size in range(num_nodes, most + 1, num_nodes)
        if any(
            not (_fault(split, num_nodes, num_heads) or _slow_ring(split, num_nodes))
            for split in _candidates(world_size, guided=guided)
        )
    )
