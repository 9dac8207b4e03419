"""Several ranks make of one video what one rank makes, for any number of tokens; more ranks than can share it are refused.

Ranks are processes of ulysses_worker.py over gloo, started once for each number of ranks; the tests read what they found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ipt2v.models.vace.degrees import check_degree, legal_degrees
from ipt2v.parallel import group_from_environment

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("ulysses_worker.py")
ROOT = WORKER.parent.parent

# latent frames, height, width: two pixels a side are one token
FORWARDS = ("2,4,6", "3,6,6", "3,10,10", "1,2,2", "1,2,6", "4,8,8")  # 12, 27, 75, 1, 3 and 64 tokens
HALF_PRECISION = ("3,10,10,bfloat16", "4,8,8,bfloat16")

Found = list[dict[str, Any]]  # of each rank


def spawn(num_ranks: int, weights: Path, out: Path) -> Found:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*torchrun, str(WORKER), str(weights), str(out), *FORWARDS, *HALF_PRECISION]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(num_ranks)]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, toy_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank of a group found."""
    return spawn(request.param, toy_weights, tmp_path_factory.mktemp("ranks"))


# ---- one rank's result, on several ranks


@pytest.mark.parametrize("case", FORWARDS)
def test_a_forward_over_the_ranks_equals_the_unsplit_one(ranks: Found, case: str) -> None:
    for rank in ranks:
        forward = next(forward for forward in rank["forwards"] if forward["case"] == case)
        assert forward["difference"] < 1e-5, forward
        assert forward["largest"] > 1, forward


@pytest.mark.parametrize("case", HALF_PRECISION)
def test_a_forward_in_bfloat16_differs_by_rounding_at_most(ranks: Found, case: str) -> None:
    for rank in ranks:
        forward = next(forward for forward in rank["forwards"] if forward["case"] == case)
        assert forward["difference"] <= forward["largest"] * 2**-7, forward  # one unit in the last of 8 bits


def test_some_of_the_token_counts_need_padding_and_some_do_not(ranks: Found) -> None:
    remainders = {forward["tokens"] % len(ranks) for forward in ranks[0]["forwards"]}
    assert 0 in remainders and len(remainders) > 1


def test_forwards_of_several_lengths_in_turn_do_not_disturb_each_other(ranks: Found) -> None:
    assert [rank["sizes_in_turn"] for rank in ranks] == pytest.approx([0] * len(ranks), abs=1e-5)


@pytest.mark.parametrize("video", ["animate_48x32x5", "animate_80x48x17"])
def test_the_latents_of_a_video_equal_those_of_one_rank(ranks: Found, video: str) -> None:
    for rank in ranks:
        assert rank[video]["to_one_rank"] < 1e-4, rank[video]
        assert rank[video]["to_second_call"] == 0, rank[video]
        assert rank[video]["largest"] > 1, rank[video]


@pytest.mark.parametrize("video", ["animate_48x32x5", "animate_80x48x17"])
def test_every_rank_ends_with_the_same_latents(ranks: Found, video: str) -> None:
    assert [rank[video]["to_rank_0"] for rank in ranks] == [0] * len(ranks)


def test_tokens_are_swapped_for_heads_and_back(ranks: Found) -> None:
    assert [rank["swaps"] for rank in ranks] == [{"all_tokens_own_heads": True, "and_back": True}] * len(ranks)


# ---- the group


def test_the_ulysses_group_holds_all_ranks_in_order(ranks: Found) -> None:
    assert [rank["world_size"] for rank in ranks] == [rank["ulysses_ranks"] for rank in ranks] == [len(ranks)] * len(ranks)
    assert [rank["ulysses_rank"] for rank in ranks] == list(range(len(ranks)))
    assert [rank["is_first"] for rank in ranks] == [True] + [False] * (len(ranks) - 1)


def test_all_ranks_receive_what_rank_0_has(ranks: Found) -> None:
    assert [rank["from_first"] for rank in ranks] == [{"rank": 0, "text": "色"}] * len(ranks)
    assert all(rank["from_first_nothing"] for rank in ranks)


def test_nothing_is_left_of_the_group_afterwards(ranks: Found) -> None:
    assert not any(rank["left_behind"] for rank in ranks)


def test_every_rank_refuses_a_share_of_heads_that_is_not_whole(ranks: Found) -> None:
    for rank in ranks:
        assert "3 ranks do not divide the 4 heads of Wan2.1-VACE-14B-diffusers" in rank["refusal"]
        assert rank["refusal"].endswith("to one of 1, 2, 4")


def test_one_rank_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with group_from_environment(max_ranks=1) as group:
        assert (group.rank, group.world_size, group.ulysses, group.is_first) == (0, 1, None, True)
        assert group.from_first("mine") == "mine"
        assert not dist.is_initialized()


def test_more_ranks_than_the_stage_takes_are_refused_before_a_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="WORLD_SIZE: found 2 ranks, expected at most 1"), group_from_environment(max_ranks=1):
        pass
    assert not dist.is_initialized()


# ---- how many ranks


@pytest.mark.parametrize(
    ("num_heads", "degrees"),
    [(40, (1, 2, 4, 5, 8, 10, 20, 40)), (12, (1, 2, 3, 4, 6, 12)), (4, (1, 2, 4)), (7, (1, 7)), (1, (1,))],
)
def test_legal_degrees_are_the_divisors_of_the_heads(num_heads: int, degrees: tuple[int, ...]) -> None:
    assert legal_degrees(num_heads) == degrees


@pytest.mark.parametrize("num_heads", [40, 12, 7])
def test_a_degree_passes_if_and_only_if_it_is_legal(num_heads: int) -> None:
    for degree in range(1, num_heads + 10):
        if degree in legal_degrees(num_heads):
            check_degree(degree, num_heads, model="vace")
        else:
            with pytest.raises(ValueError):
                check_degree(degree, num_heads, model="vace")


def test_an_illegal_degree_is_answered_with_the_legal_ones() -> None:
    with pytest.raises(
        ValueError, match=r"16 ranks do not divide the 40 heads of vace_14b.* one of 1, 2, 4, 5, 8, 10, 20, 40$"
    ):
        check_degree(16, 40, model="vace_14b")
