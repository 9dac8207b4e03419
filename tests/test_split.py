"""Several ranks make of one video what one rank makes, however they are split and for any number of tokens.

Ranks are processes of split_worker.py over gloo, started once for each number of ranks; the tests read what they found.

Ulysses and a CFG pair are exact: each rank computes the same sums. But up to three rows of a matrix take other loops of the
CPU's linear algebra than more rows do, which add in another order; and a ring adds blocks of keys in an order of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ipt2v.models.vace.degrees import Degrees
from ipt2v.models.vace.ring import choose_kernel, merge, num_valid_keys
from ipt2v.parallel import count_nodes, group_from_environment

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("split_worker.py")
ROOT = WORKER.parent.parent

SPLITS = {  # number of ranks -> (cfg, ulysses, ring)
    2: ((1, 2, 1), (1, 1, 2), (2, 1, 1)),
    4: ((1, 4, 1), (1, 1, 4), (1, 2, 2), (2, 2, 1), (2, 1, 2)),
}
# latent frames, height, width: two pixels a side are one token
FORWARDS = ("4,8,8", "3,10,10", "3,6,6", "2,4,6", "1,2,6", "1,2,2")  # 64, 75, 27, 12, 3 and 1 tokens
HALF_PRECISION = ("3,10,10,bfloat16", "4,8,8,bfloat16")
VIDEOS = ("48x32x5", "80x48x17")  # 12 and 75 tokens
NUM_BLOCKS, WIDTH, NUM_STEPS = 4 + 2, 4 * 12, 3  # of the toy model and of the videos

Found = list[dict[str, Any]]  # of each rank
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def spawn(num_ranks: int, weights: Path, out: Path) -> Found:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    wanted = {"splits": SPLITS[num_ranks], "forwards": [*FORWARDS, *HALF_PRECISION], "videos": VIDEOS}
    command = [*torchrun, str(WORKER), str(weights), str(out), json.dumps(wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(num_ranks)]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, toy_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank of a group found."""
    return spawn(request.param, toy_weights, tmp_path_factory.mktemp("ranks"))


def splits_of(ranks: Found) -> Iterator[tuple[Degrees, list[dict[str, Any]]]]:
    """Each split, and what every rank found in it."""
    for index, (cfg, ulysses, ring) in enumerate(SPLITS[len(ranks)]):
        yield Degrees(cfg=cfg, ulysses=ulysses, ring=ring), [rank["splits"][index] for rank in ranks]


def each(ranks: Found, kind: str, name: str, value: str) -> Iterator[tuple[Degrees, dict[str, Any]]]:
    """What every rank found of one forward or video, in each split."""
    for split, found in splits_of(ranks):
        for one in found:
            yield split, next(result for result in one[kind] if result[name] == value)


def is_exact(split: Degrees, num_tokens: int) -> bool:
    return split.ring == 1 and num_tokens > 3 * split.sequence


# ---- one rank's result, on several ranks


@pytest.mark.parametrize("case", FORWARDS)
def test_a_forward_over_the_ranks_equals_the_unsplit_one(ranks: Found, case: str) -> None:
    for split, forward in each(ranks, "forwards", "case", case):
        limit = 0 if is_exact(split, forward["tokens"]) else 1e-5
        assert forward["difference"] <= limit, (split, forward)
        assert forward["largest"] > 1 and forward["same_on_every_rank"], (split, forward)


@pytest.mark.parametrize("case", HALF_PRECISION)
def test_a_forward_in_bfloat16_differs_by_rounding_at_most(ranks: Found, case: str) -> None:
    for split, forward in each(ranks, "forwards", "case", case):
        assert forward["difference"] <= forward["largest"] * 2**-7, (split, forward)  # one unit in the last of 8 bits


def test_some_of_the_token_counts_need_padding_and_some_do_not(ranks: Found) -> None:
    remainders = {forward["tokens"] % len(ranks) for forward in ranks[0]["splits"][0]["forwards"]}
    assert 0 in remainders and len(remainders) > 1


def test_blocks_may_shard_their_weights_over_all_ranks(ranks: Found) -> None:
    for split, found in splits_of(ranks):
        limit = 0 if is_exact(split, 75) else 1e-5
        assert max(one["sharded_difference"] for one in found) <= limit, split


@pytest.mark.parametrize("size", VIDEOS)
def test_the_latents_of_a_video_equal_those_of_one_rank(ranks: Found, size: str) -> None:
    for split, video in each(ranks, "videos", "size", size):
        limit = 0 if is_exact(split, 75 if size == "80x48x17" else 12) else 2e-5
        assert video["to_one_rank"] <= limit, (split, video)
        assert video["to_second_call"] == 0, (split, video)
        assert video["largest"] > 1 and video["same_on_every_rank"], (split, video)


def test_every_step_is_reported_once(ranks: Found) -> None:
    for _, video in each(ranks, "videos", "size", VIDEOS[0]):
        assert video["steps"] == [[step, NUM_STEPS] for step in range(1, NUM_STEPS + 1)]


@pytest.mark.parametrize("size", VIDEOS)
def test_one_rank_may_go_on_where_others_were_interrupted_and_the_other_way_round(ranks: Found, size: str) -> None:
    for split, video in each(ranks, "videos", "size", size):
        limit = 0 if is_exact(split, 75 if size == "80x48x17" else 12) else 1e-5
        assert video["resumed_to_one_rank"] <= limit, (split, video)


# ---- what is sent, in bytes of float32


@pytest.mark.parametrize("case", FORWARDS)
def test_a_forward_sends_what_the_formulas_say(ranks: Found, case: str) -> None:
    for split, forward in each(ranks, "forwards", "case", case):
        local_bytes = -(-forward["tokens"] // split.sequence) * WIDTH * 4  # of one rank's tokens, padded
        # queries, keys and values out, the output back; each rank keeps its own part
        swapped = NUM_BLOCKS * 4 * local_bytes * (split.ulysses - 1) / split.ulysses
        assert forward["sent"]["swap"] == pytest.approx(swapped, rel=0.01)
        # keys and values, to one neighbour; the last block goes no further
        assert forward["sent"]["ring"] == pytest.approx(NUM_BLOCKS * 2 * local_bytes * (split.ring - 1), rel=0.01)


@pytest.mark.parametrize("size", VIDEOS)
def test_a_cfg_pair_sends_one_latent_a_step(ranks: Found, size: str) -> None:
    for split, video in each(ranks, "videos", "size", size):
        if split.cfg == 2 and split.sequence == 1:
            assert video["sent"] == {"swap": 0, "ring": 0, "gather": NUM_STEPS * video["latent_bytes"]}


def test_a_ring_sends_while_it_attends_and_skips_what_is_all_padding(ranks: Found) -> None:
    for split, found in splits_of(ranks):
        for rank, one in enumerate(found):
            own, size = split.place(rank).ring_index, split.ring
            expected = []
            for step in range(size):
                block, last = (own - step) % size, step == size - 1
                sends, waits = ([], []) if last else (["send"], ["wait", "wait"])
                attends = [f"attend {7 + block}"] if block < size - 1 else []
                expected += [*sends, *attends, *waits]
            assert one["ring_events"] == expected, (split, rank)


# ---- the groups


def test_each_rank_is_where_place_says(ranks: Found) -> None:
    for split, found in splits_of(ranks):
        for rank, one in enumerate(found):
            place, groups = split.place(rank), one["groups"]
            assert [groups[name].index(rank) for name in ("cfg", "ring", "ulysses")] == [
                place.cfg_index,
                place.ring_index,
                place.ulysses_index,
            ]
            assert [len(groups[name]) for name in ("cfg", "ring", "ulysses")] == [split.cfg, split.ring, split.ulysses]
            assert groups["sequence"] == sorted(groups["sequence"]) and len(groups["sequence"]) == split.sequence


def test_tokens_are_swapped_for_heads_and_back(ranks: Found) -> None:
    for _, found in splits_of(ranks):
        assert [one["swaps"] for one in found] == [{"all_tokens_own_heads": True, "and_back": True}] * len(ranks)


def test_all_ranks_receive_what_rank_0_has(ranks: Found) -> None:
    assert [rank["from_first"] for rank in ranks] == [{"rank": 0, "text": "色"}] * len(ranks)
    assert all(rank["from_first_nothing"] for rank in ranks)
    assert [rank["is_first"] for rank in ranks] == [True] + [False] * (len(ranks) - 1)
    assert {(rank["world_size"], rank["num_nodes"]) for rank in ranks} == {(len(ranks), 1)}


def test_nothing_is_left_of_the_groups_afterwards(ranks: Found) -> None:
    assert not any(rank["left_behind"] for rank in ranks)


def test_every_rank_refuses_what_cannot_be_split(ranks: Found) -> None:
    for rank in ranks:
        chosen, named = rank["refusals"]
        assert chosen.startswith("video: 12 ranks on 4 nodes cannot share a model of 4 heads (cfg 2 x ulysses 6 x ring 1: ")
        assert named == "cfg 1 x ulysses 3 x ring 4: ulysses 3 does not divide 4 heads; legal for 4 heads: 1, 2, 4"


def test_one_rank_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with group_from_environment(max_ranks=1) as group:
        assert (group.rank, group.world_size, group.num_nodes, group.is_first) == (0, 1, 1, True)
        assert group.from_first("mine") == "mine"
        group.meet()
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE: found 2 ranks, expected at most 1"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE: found 2 of 1 ranks on this node"),
    ],
)
def test_what_the_environment_cannot_mean_is_refused_before_a_group_is_made(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), group_from_environment(max_ranks=1):
        pass
    assert not dist.is_initialized()


def test_nodes_are_counted_by_the_ranks_of_one_and_must_be_alike() -> None:
    assert [count_nodes(rank, 6, rank % 2, 2) for rank in range(6)] == [3] * 6
    assert count_nodes(0, 1, 0, 1) == count_nodes(3, 4, 3, 4) == 1
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE: found 4 of 6 ranks on this node, expected the same number"):
        count_nodes(0, 6, 0, 4)


def test_ranks_that_are_dealt_out_to_the_nodes_in_turn_are_refused() -> None:
    with pytest.raises(ValueError, match=r"RANK: found 1 with LOCAL_RANK 0 of 2 .*--distribution=block"):
        count_nodes(1, 4, 0, 2)


# ---- parts of the ring


@given(st.integers(1, 8), st.integers(1, 9), st.data())
def test_every_token_is_a_valid_key_of_its_block_and_no_pad_is(num_blocks: int, block_size: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, num_blocks * block_size))
    is_token = [place < length for place in range(num_blocks * block_size)]
    blocks = [is_token[block * block_size :][:block_size] for block in range(num_blocks)]
    valid = num_valid_keys(length, block_size, num_blocks)
    assert valid == tuple(map(sum, blocks))
    assert all(all(block[:number]) for block, number in zip(blocks, valid, strict=True))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax(q k / sqrt(D)) v, log-sum-exp of q k / sqrt(D)), in float64."""
    scores = query.double() @ key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.softmax(-1) @ value.double(), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_a_cpu_gives_attention_and_log_sum_exp(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 3, length, 12).to(dtype) for length in (7, 20, 20))
    kernel = choose_kernel(query.device, dtype)
    # as the ring calls it: slices of a block
    output, lse = kernel.attend(query, key[:, :, :5], value[:, :, :5])
    expected, expected_lse = attention(query, key[:, :, :5], value[:, :, :5])
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "flash"), (torch.float32, "memory-efficient")])
def test_kernels_of_a_gpu_give_outputs_and_log_sum_exps_of_the_queries(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if not installed
    query, key, value = (torch.empty(1, 5, length, 128, dtype=dtype, device="meta") for length in (75, 40, 40))  # shapes alone
    kernel = choose_kernel(query.device, dtype)
    output, lse = kernel.attend(query, key[:, :, :37], value[:, :, :37])
    assert name in kernel.name
    assert (output.shape, output.dtype, lse.shape, lse.dtype) == (query.shape, dtype, query.shape[:3], torch.float32)


def test_flash_attn_is_preferred_where_it_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(*inputs_BLND: torch.Tensor, return_attn_probs: bool) -> tuple[torch.Tensor, torch.Tensor, None]:
        output, lse = attention(*(one.transpose(1, 2) for one in inputs_BLND))
        assert return_attn_probs
        return output.transpose(1, 2), lse, None

    package = SimpleNamespace(__version__="2.8.3", flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    kernel = choose_kernel(torch.device("cuda"), torch.bfloat16)
    assert kernel.name == "flash-attn 2.8.3"
    query, key, value = (torch.randn(1, 3, length, 8) for length in (7, 5, 5))
    for found, expected in zip(kernel.attend(query, key, value), attention(query, key, value), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_merged_blocks_are_attention_over_all_keys(scale: float) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 9, 16) * factor for factor in (scale, 1.0, 1.0))
    output, lse = torch.zeros_like(query), torch.full(query.shape[:3], -torch.inf)
    for block in (slice(0, 4), slice(4, 5), slice(5, 9)):
        found, found_lse = attention(query, key[:, :, block], value[:, :, block])
        output, lse = merge(output, lse, found.float(), found_lse.float())
    expected, expected_lse = attention(query, key, value)
    torch.testing.assert_close(output.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)
