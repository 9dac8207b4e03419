"""The LLM and the text encoder by DeepSpeed's ZeRO-3, on two ranks or offloaded on one, give what they give plain, to the bit.

Ranks are processes of zero3_worker.py over gloo, started once in twos and once alone; the tests read what they found.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ipt2v.config import DecoupleConfig, TextEncoderConfig, VideoConfig
from ipt2v.models.llm import load_generator
from ipt2v.models.umt5 import load_text_encoder

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("zero3_worker.py")
NUM_RANKS = 2
CPU = torch.device("cpu")

Found = dict[str, Any]


def start(out: Path, *command: str) -> str:
    """What the worker printed."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -e .[shard]")
    unwanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(WORKER.parent.parent)}
    environment |= {"TORCH_EXTENSIONS_DIR": str(out / "compiled")}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def ranks(toy_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of two ranks found."""
    out = tmp_path_factory.mktemp("ranks")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS))
    printed = start(out, *torchrun, str(WORKER), str(toy_weights), str(out))
    assert printed == "" and not (out / "compiled").exists()
    return [json.loads((out / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(NUM_RANKS)]


@pytest.fixture(scope="module")
def alone(toy_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What a rank without torchrun found."""
    out = tmp_path_factory.mktemp("alone")
    assert start(out, str(WORKER), str(toy_weights), str(out)) == ""
    found: Found = json.loads((out / "alone.json").read_text(encoding="utf-8"))
    return found


# ---- the LLM


@pytest.mark.parametrize("case", ["0.0 bfloat16", "0.9 bfloat16", "0.9 float32"])
def test_the_ranks_together_answer_what_one_alone_answers(ranks: list[Found], case: str) -> None:
    expected = ranks[0]["answers"][case]["alone"]
    assert len({text for text, _ in expected}) > 1
    for rank in ranks:
        assert rank["answers"][case]["together"] == rank["answers"][case]["again"] == expected


def test_each_rank_holds_half_of_the_llm(ranks: list[Found]) -> None:
    for rank in ranks:
        share = rank["share"]
        assert 0.5 <= share["own"] / share["whole"] < 0.51  # what is odd is padded
        assert share["gathered"] == 0
        assert share["dtypes"] == ["torch.bfloat16"] and share["buffers"] and all(share["buffers"])


# ---- the text encoder


def test_ranks_with_unequal_numbers_of_texts_embed_them_as_one_alone_does(ranks: list[Found]) -> None:
    expected = ranks[0]["embeddings alone"]
    texts = list(expected)
    assert len(set(expected.values())) == len(texts) == 4
    assert [rank["embeddings first"] for rank in ranks] == [expected, {}]
    assert ranks[0]["embeddings second"] == {text: expected[text] for text in texts[:1]}
    assert ranks[1]["embeddings second"] == {text: expected[text] for text in texts[2:]}


def test_no_texts_are_embedded_on_no_rank(ranks: list[Found]) -> None:
    assert [rank["embeddings none"] for rank in ranks] == [{}, {}]


# ---- the stage


def test_two_ranks_make_the_first_frames_of_one(ranks: list[Found]) -> None:
    expected = ranks[0]["stage alone"]
    assert set(expected) == {"p0/0", "p1/0", "p2/0"} and "failure" not in expected.values()
    assert [set(rank["stage"]) for rank in ranks] == [{"p0/0", "p2/0"}, {"p1/0"}]
    assert ranks[0]["stage"] | ranks[1]["stage"] == expected


def test_a_rank_without_a_photo_helps_the_other(ranks: list[Found]) -> None:
    name = "stage, rank 1 without a photo"
    assert set(ranks[0][name]) == {"p0/0", "p2/0"} and ranks[1][name] == {"p1/0": "failure"}
    expected = ranks[0]["stage alone"]
    assert all(made[2] == expected[key][2] and made[-2:] == expected[key][-2:] for key, made in ranks[0][name].items())


def test_if_no_rank_has_a_photo_no_model_is_loaded(ranks: list[Found]) -> None:
    assert set(ranks[0]["stage, no photo"].values()) | set(ranks[1]["stage, no photo"].values()) == {"failure"}


# ---- one rank, offloaded


def test_one_rank_with_offloaded_weights_gives_the_same(alone: Found) -> None:
    for kind in ("prompts", "embeddings"):
        assert alone[f"{kind} plain"] == alone[f"{kind} offloaded"] == alone[f"{kind} again"]


# ---- afterwards


def test_afterwards_a_model_is_loaded_whole_and_nothing_is_left(ranks: list[Found], alone: Found) -> None:
    assert alone["failure"] == "OSError"
    for found in (alone["left"], alone["left after a failure"], *(rank["left"] for rank in ranks)):
        assert found["whole"] and found["linear"] and not found["enabled"]
        assert found["numel"] == ranks[0]["share"]["whole"]
        assert found["hooks"] == 0
        assert found["left"] == 0
    assert alone["left"]["local_rank"] is None and not alone["left"]["group"]
    assert [rank["left"]["local_rank"] for rank in ranks] == ["0", "1"]


def test_without_deepspeed_zero3_is_refused_in_one_line(toy_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"^weights_sharding zero3 needs deepspeed.*pip install 'ipt2v\[shard\]'$"
    settings = DecoupleConfig(weights_sharding="zero3")
    with pytest.raises(ValueError, match=message):
        load_generator(toy_weights / "Qwen3-8B", settings, base_seed=7, device=CPU, num_ranks=3)  # 3 divide no heads
    sharing, video = TextEncoderConfig(weights_sharding="zero3", cpu_offload=True), VideoConfig()
    with pytest.raises(ValueError, match=message):
        load_text_encoder(toy_weights / video.model, video, device=CPU, sharing=sharing)
