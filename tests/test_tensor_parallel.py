"""Two ranks, each with a slice of the LLM, answer what one rank answers; rank 0 asks, the others follow.

Ranks are processes of tensor_parallel_worker.py over gloo, started once; the tests read what they found.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ipt2v.config import DecoupleConfig
from ipt2v.models.llm import load_generator

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
ROOT = WORKER.parent.parent
NUM_RANKS = 2
CPU = torch.device("cpu")
SETTINGS = DecoupleConfig(dtype="float32", max_new_tokens=2)

Found = list[dict[str, Any]]  # of each rank


@pytest.fixture(scope="module")
def qwen(toy_weights: Path) -> Path:
    return toy_weights / "Qwen3-8B"


@pytest.fixture(scope="module")
def run(toy_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder into which the ranks wrote, and what they printed."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -e .[shard]")
    out = tmp_path_factory.mktemp("ranks")
    unwanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment |= {"TORCH_EXTENSIONS_DIR": str(out / "compiled")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS)]
    command = [*torchrun, str(WORKER), str(toy_weights), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stdout


@pytest.fixture(scope="module")
def ranks(run: tuple[Path, str]) -> Found:
    """What each rank found."""
    return [json.loads((run[0] / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(NUM_RANKS)]


# ---- answers


@pytest.mark.parametrize("temperature", ["0.0", "0.9"])
def test_the_ranks_together_answer_what_one_alone_answers(ranks: Found, temperature: str) -> None:
    expected = ranks[0][f"alone {temperature}"]
    assert len({text for text, _ in expected}) == len(expected)
    assert {finished for _, finished in expected} == {True, False}
    for rank in ranks:
        assert rank[f"together {temperature}"] == rank[f"again {temperature}"] == expected


@pytest.mark.parametrize("temperature", ["0.0", "0.9"])
def test_a_rank_whose_scores_are_others_still_gives_the_answers_of_rank_0(ranks: Found, temperature: str) -> None:
    for rank in ranks:
        assert rank[f"disturbed {temperature}"] == ranks[0][f"together {temperature}"]


def test_in_half_precision_too_all_ranks_give_the_same_answers(ranks: Found) -> None:
    assert ranks[0]["bfloat16"] == ranks[1]["bfloat16"]


# ---- slices


def test_each_rank_holds_half_of_every_matrix_but_the_embedding(ranks: Found) -> None:
    for rank in ranks:
        whole, own = rank["slices"]["whole"], rank["slices"]["own"]
        assert whole.keys() == own.keys()
        shares = {name: torch.Size(own[name]).numel() / torch.Size(shape).numel() for name, shape in whole.items()}
        kept = {name for name, share in shares.items() if share == 1}
        assert {name for name in kept if "norm" not in name} == {"model.embed_tokens.weight"}
        assert {shares[name] for name in shares.keys() - kept} == {1 / NUM_RANKS}
        assert "lm_head.weight" not in kept


def test_each_rank_holds_clearly_less_than_the_whole_model(ranks: Found) -> None:
    for rank in ranks:
        whole, own = (sum(torch.Size(shape).numel() for shape in rank["slices"][name].values()) for name in ("whole", "own"))
        assert own < 0.7 * whole  # a third of the toy is its embedding; of Qwen3-8B, a thirteenth


def test_weights_are_cast_as_asked_and_rotary_frequencies_are_not(ranks: Found) -> None:
    for rank in ranks:
        assert rank["slices"]["dtypes"] == ["torch.bfloat16"]
        assert rank["slices"]["buffers"]["model.rotary_emb.inv_freq"] == ["torch.float32", True]
        assert {tuple(found) for found in rank["slices"]["buffers"].values()} == {("torch.float32", True)}


def test_nothing_is_compiled_and_nothing_is_printed(run: tuple[Path, str], ranks: Found) -> None:
    out, printed = run
    assert sorted(path.name for path in out.iterdir()) == [f"{rank}.json" for rank in range(NUM_RANKS)]
    assert printed == ""


# ---- what cannot be cut


@pytest.mark.parametrize("num_ranks", [3, 4, 8])
def test_ranks_that_do_not_divide_the_heads_are_refused_before_tensors_are_read(
    qwen: Path, tmp_path: Path, num_ranks: int
) -> None:
    folder = shutil.copytree(qwen, tmp_path / qwen.name, ignore=shutil.ignore_patterns("*.safetensors*"))
    message = f"{num_ranks} ranks do not divide the 4 attention heads and the 2 key-value heads of Qwen3-8B; use one of 1, 2$"
    with pytest.raises(ValueError, match=message):
        load_generator(folder, SETTINGS, base_seed=7, device=CPU, num_ranks=num_ranks)


def test_every_rank_refuses_what_cannot_be_cut(ranks: Found) -> None:
    for rank in ranks:
        assert rank["refusal"].startswith("3 ranks do not divide")


def test_without_deepspeed_several_ranks_are_refused_in_one_line(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"^Qwen3-8B on 2 ranks needs deepspeed.*pip install 'ipt2v\[shard\]'.*$"):
        load_generator(qwen, SETTINGS, base_seed=7, device=CPU, num_ranks=2)


def test_one_rank_needs_no_deepspeed(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # whoever imports it fails
    assert len(load_generator(qwen, SETTINGS, base_seed=7, device=CPU)(["a dog"])) == 1


# ---- rank 0 asks, the others follow


def test_what_rank_0_asks_all_ranks_answer(ranks: Found) -> None:
    leader, follower = (rank["three_batches"] for rank in ranks)
    assert leader["returned"] == leader["answers"] == follower["answers"]
    assert [len(batch) for batch in leader["returned"]] == [2, 1, 2]
    assert [answer for batch in leader["returned"] for answer in batch] == ranks[0]["alone 0.9"]


def test_no_messages_are_answered_without_the_others(ranks: Found) -> None:
    assert ranks[0]["three_batches"]["empty"] == []


def test_the_model_is_not_loaded_before_the_first_question(ranks: Found) -> None:
    assert ranks[0]["three_batches"]["loaded_before"] is False
    assert [rank["nothing_to_ask"] for rank in ranks] == ["ended"] * NUM_RANKS


def test_the_others_end_when_rank_0_fails_between_batches(ranks: Found) -> None:
    assert [rank["failure_between_batches"] for rank in ranks] == [["first", "disk full"], ["first"]]


def test_nothing_is_sent_into_the_collectives_of_a_generate_that_failed_on_rank_0_alone(ranks: Found) -> None:
    assert [rank["failure_inside_of_generate"] for rank in ranks] == [["of rank 0"], ["rank 0's next collective"]]
