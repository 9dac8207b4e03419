"""Which split of ranks degrees() chooses, what it and check_degrees refuse, and where xDiT puts each rank."""

from __future__ import annotations

import json

import pytest
from helpers import run_python
from hypothesis import given
from hypothesis import strategies as st

from ipt2v.models.vace.degrees import Degrees, Place, check_degrees, degrees, divisors

# a node has up to 8 ranks; 40 and 12 heads are those of the published VACE models
NODES, RANKS_PER_NODE, HEADS = st.integers(1, 6), st.integers(1, 8), st.sampled_from([40, 12, 4, 7, 1])


def best(world_size: int, num_nodes: int, num_heads: int, *, guided: bool = True) -> tuple[int, int, int]:
    split = degrees(world_size, num_nodes, num_heads, guided=guided)
    return split.cfg, split.ulysses, split.ring


# ---- the choice


@pytest.mark.parametrize(
    ("world_size", "num_nodes", "num_heads", "guided", "unguided"),
    [
        (1, 1, 40, (1, 1, 1), (1, 1, 1)),
        (2, 1, 40, (2, 1, 1), (1, 2, 1)),
        (3, 1, 40, (1, 1, 3), (1, 1, 3)),  # an odd number of ranks cannot be halved
        (4, 1, 40, (2, 2, 1), (1, 4, 1)),
        (5, 1, 40, (1, 5, 1), (1, 5, 1)),
        (6, 1, 40, (2, 1, 3), (1, 2, 3)),
        (8, 1, 40, (2, 4, 1), (1, 8, 1)),
        (8, 1, 12, (2, 4, 1), (1, 4, 2)),  # 8 does not divide 12 heads
        (16, 2, 40, (2, 8, 1), (1, 8, 2)),  # the pair over the nodes, or the ring
        (16, 2, 12, (2, 4, 2), (1, 4, 4)),
        (32, 4, 40, (2, 8, 2), (1, 8, 4)),
        (32, 4, 12, (2, 4, 4), (1, 4, 8)),
        (40, 5, 40, (2, 4, 5), (1, 8, 5)),  # half of 40 ranks ends in the middle of a node: ulysses 4, not 8
        (2, 2, 40, (2, 1, 1), (1, 1, 2)),
        (4, 2, 4, (2, 2, 1), (1, 2, 2)),
        (4, 4, 40, (2, 1, 2), (1, 1, 4)),  # nodes of one rank: nothing else is left
        (14, 2, 40, (2, 1, 7), None),  # a ring of 7 inside each node, but none of 14 over both
        (6, 3, 40, (1, 2, 3), (1, 2, 3)),  # a pair would leave rings without ulysses over the nodes
        (12, 4, 4, None, None),
    ],
)
def test_the_pair_comes_first_then_ulysses_inside_a_node_then_the_ring(
    world_size: int, num_nodes: int, num_heads: int, guided: tuple[int, ...] | None, unguided: tuple[int, ...] | None
) -> None:
    for wanted, guidance in ((guided, True), (unguided, False)):
        if wanted is not None:
            assert best(world_size, num_nodes, num_heads, guided=guidance) == wanted
        else:
            with pytest.raises(ValueError, match=f"video: {world_size} ranks on {num_nodes} nodes"):
                best(world_size, num_nodes, num_heads, guided=guidance)


@given(NODES, RANKS_PER_NODE, HEADS, st.booleans())
def test_a_choice_uses_all_ranks_divides_the_heads_and_keeps_ulysses_inside_a_node(
    num_nodes: int, per_node: int, num_heads: int, guided: bool
) -> None:
    world_size = num_nodes * per_node
    try:
        split = degrees(world_size, num_nodes, num_heads, guided=guided)
    except ValueError:
        assert num_nodes > 1  # on one node a ring is always left
        return
    check_degrees(split, world_size, num_heads, guided=guided, num_nodes=num_nodes)
    assert split.world_size == world_size and num_heads % split.ulysses == 0
    nodes_of_ulysses_groups = [
        {rank // per_node for rank in range(first, first + split.ulysses)} for first in range(0, world_size, split.ulysses)
    ]
    assert all(len(nodes) == 1 for nodes in nodes_of_ulysses_groups)


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [(40, (1, 2, 4, 5, 8, 10, 20, 40)), (12, (1, 2, 3, 4, 6, 12)), (4, (1, 2, 4)), (7, (1, 7)), (1, (1,))],
)
def test_ulysses_degrees_are_the_divisors_of_the_heads(num_heads: int, expected: tuple[int, ...]) -> None:
    assert divisors(num_heads) == expected


# ---- refusals


def test_a_refusal_says_what_is_wrong_with_each_candidate_and_what_is_legal() -> None:
    with pytest.raises(ValueError) as refused:
        degrees(12, 4, 4, guided=True)
    assert str(refused.value) == (
        "video: 12 ranks on 4 nodes cannot share a model of 4 heads ("
        "cfg 2 x ulysses 6 x ring 1: ulysses 6 does not divide 4 heads; "
        "cfg 2 x ulysses 3 x ring 2: ulysses 3 does not divide 4 heads; "
        "cfg 2 x ulysses 2 x ring 3: ulysses 2 does not divide the 3 ranks of a node; "
        "cfg 2 x ulysses 1 x ring 6: a ring without ulysses would cross nodes of 3 ranks; "
        "cfg 1 x ulysses 12 x ring 1: ulysses 12 does not divide 4 heads; "
        "cfg 1 x ulysses 6 x ring 2: ulysses 6 does not divide 4 heads; "
        "cfg 1 x ulysses 4 x ring 3: ulysses 4 does not divide the 3 ranks of a node; "
        "cfg 1 x ulysses 3 x ring 4: ulysses 3 does not divide 4 heads; "
        "cfg 1 x ulysses 2 x ring 6: ulysses 2 does not divide the 3 ranks of a node; "
        "cfg 1 x ulysses 1 x ring 12: a ring without ulysses would cross nodes of 3 ranks); "
        "set nodes x gpus_per_node of the video stage to 4 nodes with one of 4, 8, 16, 24, 32 ranks in all"
    )


@given(st.integers(2, 6), RANKS_PER_NODE, HEADS, st.booleans())
def test_what_a_refusal_calls_legal_is_legal(num_nodes: int, per_node: int, num_heads: int, guided: bool) -> None:
    try:
        degrees(num_nodes * per_node, num_nodes, num_heads, guided=guided)
    except ValueError as error:
        listed = str(error).rpartition("one of ")[2].removesuffix(" ranks in all").split(", ")
        for world_size in map(int, listed):
            degrees(world_size, num_nodes, num_heads, guided=guided)


@pytest.mark.parametrize(
    ("split", "world_size", "num_nodes", "guided", "message"),
    [
        (Degrees(ulysses=4), 8, 1, True, "cfg 1 x ulysses 4 x ring 1: found 4 ranks, expected 8"),
        (Degrees(cfg=4, ulysses=2), 8, 1, True, "cfg 4 .* set cfg to 1 or 2"),
        (Degrees(cfg=2, ulysses=4), 8, 1, False, "cfg 2 .* guidance is off"),
        (
            Degrees(ulysses=16),
            16,
            2,
            True,
            "ulysses 16 does not divide 40 heads; legal for 40 heads: 1, 2, 4, 5, 8, 10, 20, 40",
        ),
        (Degrees(ulysses=10), 10, 2, True, "ulysses 10 does not divide the 5 ranks of a node"),
        (Degrees(cfg=0, ulysses=0), 0, 1, True, "found 0 ranks on 1 nodes"),
        (Degrees(cfg=-1, ring=-8), 8, 1, True, "found 8 ranks, expected 8; the product"),
        (Degrees(ulysses=2), 2, 3, True, "found 2 ranks on 3 nodes"),
    ],
)
def test_a_named_split_that_cannot_work_is_refused(
    split: Degrees, world_size: int, num_nodes: int, guided: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_degrees(split, world_size, 40, guided=guided, num_nodes=num_nodes)


@pytest.mark.parametrize(("split", "num_nodes"), [(Degrees(ring=8), 2), (Degrees(ring=8), 1), (Degrees(ulysses=2, ring=4), 2)])
def test_a_named_split_may_be_slow(split: Degrees, num_nodes: int) -> None:
    check_degrees(split, 8, 40, guided=True, num_nodes=num_nodes)


# ---- who sits where

SPLITS = (  # number of nodes, ranks of a node, split
    (2, 8, Degrees(cfg=2, ulysses=8)),
    (2, 8, Degrees(ulysses=8, ring=2)),
    (2, 8, Degrees(cfg=2, ulysses=4, ring=2)),
    (4, 8, Degrees(cfg=2, ulysses=8, ring=2)),
    (2, 2, Degrees(cfg=2, ring=2)),
    (3, 2, Degrees(ulysses=2, ring=3)),
)

# xDiT's own code, its groups replaced by the lists of their ranks, as each of all ranks in turn
XDIT = """
import json, sys
import torch.distributed as dist
from ipt2v import xdit
dist.is_initialized = lambda: True
dist.new_group = lambda ranks=None, **_: tuple(ranks)
dist.destroy_process_group = lambda group=None: None
for cfg, ulysses, ring in json.loads(sys.argv[1]):
    world_size = cfg * ulysses * ring
    dist.get_world_size = lambda group=None: world_size if group is None else len(group)
    for rank in range(world_size):
        dist.get_rank = lambda group=None: rank if group is None else group.index(rank)
        found = xdit.start(cfg=cfg, ulysses=ulysses, ring=ring, device_index=0, backend="gloo")
        print(json.dumps([found.cfg, found.ring, found.ulysses, found.sequence]))
        xdit.stop()
"""


@pytest.fixture(scope="module")
def groups_of() -> dict[Degrees, list[list[list[int]]]]:
    """split -> for each rank, the ranks of its CFG, ring, Ulysses and sequence group."""
    splits = [split for _, _, split in SPLITS]
    lines = iter(run_python(XDIT, json.dumps([(one.cfg, one.ulysses, one.ring) for one in splits])).splitlines())
    return {split: [json.loads(next(lines)) for _ in range(split.world_size)] for split in splits}


@pytest.mark.slow
@pytest.mark.parametrize(("num_nodes", "per_node", "split"), SPLITS, ids=lambda value: str(value).replace(" ", ""))
def test_xdit_puts_each_rank_where_place_says(
    groups_of: dict[Degrees, list[list[list[int]]]], num_nodes: int, per_node: int, split: Degrees
) -> None:
    assert split.world_size == num_nodes * per_node
    for rank, (cfg, ring, ulysses, sequence) in enumerate(groups_of[split]):
        place = split.place(rank)
        assert [len(ranks) for ranks in (cfg, ring, ulysses)] == [split.cfg, split.ring, split.ulysses]
        assert (cfg.index(rank), ring.index(rank), ulysses.index(rank)) == (
            place.cfg_index,
            place.ring_index,
            place.ulysses_index,
        )
        assert sequence.index(rank) == place.ring_index * split.ulysses + place.ulysses_index
        assert len({one // per_node for one in ulysses}) == 1
        assert len({one // per_node for one in cfg}) == split.cfg


def test_every_rank_has_a_place_of_its_own() -> None:
    split = Degrees(cfg=2, ulysses=4, ring=3)
    places = [split.place(rank) for rank in range(split.world_size)]
    assert len(set(places)) == split.world_size
    assert places[0] == Place(cfg_index=0, ring_index=0, ulysses_index=0)
    assert places[-1] == Place(cfg_index=1, ring_index=2, ulysses_index=3)
