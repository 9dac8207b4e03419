"""The transformer's weights: whole on every rank or shared, they are what diffusers' from_pretrained reads, each read once.

Ranks are four processes of vace_weights_worker.py over gloo, two on each of two pretended nodes, started once.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import WanVACETransformer3DModel
from helpers import VACE_14B
from safetensors.torch import load_file, save_file

from ipt2v.config import VideoConfig
from ipt2v.models.vace.degrees import Degrees
from ipt2v.models.vace.memory import check_memory, count_float32_parameters, count_parameters, memory_gb
from ipt2v.models.vace.sharding import load_weights
from ipt2v.models.vace.weights import NAME, dtype_of
from ipt2v.parallel import Group

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("vace_weights_worker.py")
ROOT = WORKER.parent.parent
MODEL = "Wan2.1-VACE-14B-diffusers"
NUM_RANKS, RANKS_PER_NODE = 4, 2
ALONE = Group(rank=0, world_size=1, num_nodes=1, device=torch.device("cpu"))

# what is different in the 1.3B model's transformer/config.json
VACE_1_3B = VACE_14B | {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30, "vace_layers": list(range(0, 30, 2))}

Found = list[dict[str, Any]]  # of each rank


@pytest.fixture(scope="module")
def folder(toy_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder whose transformer is in many files."""
    folder = tmp_path_factory.mktemp("many_files") / MODEL
    shutil.copytree(toy_weights / MODEL, folder, ignore=shutil.ignore_patterns("transformer"))
    transformer = WanVACETransformer3DModel.from_pretrained(toy_weights / MODEL / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="150KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) >= 5
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of 0.57 GB in float32, stored in bfloat16, so that what is read must be converted."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"num_attention_heads": 16, "attention_head_dim": 64, "ffn_dim": 4096, "text_dim": 64, "num_layers": 6}
    model = WanVACETransformer3DModel.from_config({**VACE_14B, **sizes, "vace_layers": [0, 3]})
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="50MB")
    return folder


@pytest.fixture(scope="module")
def broken_copy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """broken_copy(change): the transformer's folder, with the tensors of its second file changed."""

    def make(change: Callable[[dict[str, torch.Tensor]], object], *, file_index: int = 1) -> Path:
        copy = tmp_path_factory.mktemp("broken") / "transformer"
        shutil.copytree(folder / "transformer", copy)
        file = sorted(copy.glob("*.safetensors"))[file_index]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return copy

    return make


def drop_first(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


@pytest.fixture(scope="module")
def run(
    folder: Path, large: Path, broken_copy: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The folder into which the ranks wrote, and what each printed."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install -e .[shard]")
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    unwanted = ("LOCAL_SIZE", "DS_ACCELERATOR")
    common = {name: value for name, value in os.environ.items() if name not in unwanted}
    common |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    # freed memory goes back at once, so that it is not mistaken for used
    common |= {"MALLOC_MMAP_THRESHOLD_": "65536", "TORCH_EXTENSIONS_DIR": str(out / "compiled")}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(NUM_RANKS)}
    common |= {"LOCAL_WORLD_SIZE": str(RANKS_PER_NODE)}
    command = [sys.executable, str(WORKER), str(folder), str(large), str(broken_copy(drop_first)), str(out)]
    outputs = [(open(out / f"{rank}.out", "w+"), open(out / f"{rank}.err", "w+")) for rank in range(NUM_RANKS)]  # noqa: SIM115
    ranks = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank % RANKS_PER_NODE)},
            stdout=outputs[rank][0],
            stderr=outputs[rank][1],
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        codes = [rank.wait(timeout=250) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for files in outputs:
            for file in files:
                file.close()
    errors = [(out / f"{rank}.err").read_text(encoding="utf-8")[-3000:] for rank in range(NUM_RANKS)]
    assert codes == [0] * NUM_RANKS, "\n---\n".join(errors)
    return out, [(out / f"{rank}.out").read_text(encoding="utf-8") for rank in range(NUM_RANKS)]


@pytest.fixture(scope="module")
def ranks(run: tuple[Path, list[str]]) -> Found:
    """What each rank found."""
    return [json.loads((run[0] / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(NUM_RANKS)]


# ---- on four ranks of two nodes


WAYS = ("none", "fsdp2", "zero3", "zero3 offload")
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's files."""
    return {name: one for file in (folder / "transformer").glob("*.safetensors") for name, one in load_file(file).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_parameters_equal_those_of_from_pretrained_bit_for_bit(ranks: Found, way: str, dtype: str) -> None:
    for rank in ranks:
        found = rank[dtype][way]
        assert found["different"] == [] and found["same_names"] and found["same_buffers"] and not found["trained"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_weights_are_read_once_on_each_node(ranks: Found, stored: dict[str, torch.Tensor], dtype: str) -> None:
    once = {name: tensor.nbytes for name, tensor in stored.items()}
    assert [rank["nodes"] for rank in ranks] == [2] * NUM_RANKS
    assert [rank[dtype]["none"]["read"] for rank in ranks] == [once, {}] * 2


@pytest.mark.parametrize("way", ["fsdp2", "zero3", "zero3 offload"])
def test_shared_weights_are_read_once_in_all(ranks: Found, stored: dict[str, torch.Tensor], way: str) -> None:
    read = Counter[str]()
    for rank in ranks:
        read.update(rank["float32"][way]["read"])
    assert read == {name: tensor.nbytes for name, tensor in stored.items()}


@pytest.mark.parametrize("way", ["fsdp2", "zero3", "zero3 offload"])
def test_each_rank_keeps_its_share_of_the_parameters(ranks: Found, way: str) -> None:
    # in FSDP2 rank 0 alone keeps what has one row: the tables of the blocks
    limits = (0.24, 0.26) if way == "fsdp2" else (0.25, 0.251)
    for rank in ranks:
        assert limits[0] <= rank["float32"][way]["part"] <= limits[1]


@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_loading_takes_no_more_private_memory_than_the_share(ranks: Found, way: str) -> None:
    for rank in ranks:
        found = rank["memory"][way]
        assert found["whole"] > 500e6
        assert 0.95 <= found["peak"] / (found["whole"] / NUM_RANKS) <= 1.1, found


@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_on_four_ranks_equal_those_of_one_bit_for_bit(ranks: Found, dtype: str) -> None:
    for rank in ranks:
        differences = dict(rank["videos"][dtype])
        assert differences.pop("largest") > 1
        assert set(differences.values()) == {0}, differences


@pytest.mark.parametrize("way", WAYS)
def test_what_one_rank_alone_misses_all_ranks_raise(ranks: Found, way: str) -> None:
    refusals = [rank["refusals"][way] for rank in ranks]
    assert "-00002-of-" in refusals[0] and ": missing" in refusals[0]
    assert refusals == refusals[:1] * NUM_RANKS


def test_deepspeed_prints_and_compiles_nothing(run: tuple[Path, list[str]], ranks: Found) -> None:
    assert run[1] == [""] * NUM_RANKS
    assert not (run[0] / "compiled").exists()
    # written by deepspeed 0.19.8 itself, when it is imported
    assert {name for rank in ranks for name in rank["environment_changed"]} <= {"PYTORCH_NVML_BASED_CUDA_CHECK"}


# ---- strictness, on one rank


def drop(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[key]


def replace(tensors: dict[str, torch.Tensor], key: str, value: torch.Tensor) -> None:
    tensors[key] = value


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], object], str]] = {
    "missing": (drop, r"{key}: missing;"),
    "unexpected": (lambda tensors, key: replace(tensors, "lora.weight", torch.ones(2)), r"lora\.weight: unexpected"),
    "mis-shaped": (lambda tensors, key: replace(tensors, key, torch.ones(3, 7)), r"{key}: found shape \[3, 7\], expected \["),
    "no float": (lambda tensors, key: replace(tensors, key, tensors[key].to(torch.int8)), r"{key}: found I8, expected one of"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_tensor_that_does_not_fit_is_named_with_its_file(broken_copy: Callable[..., Path], kind: str) -> None:
    change, words = CHANGES[kind]
    keys: list[str] = []

    def change_first(tensors: dict[str, torch.Tensor]) -> None:
        keys.append(min(tensors))
        change(tensors, keys[0])

    folder = broken_copy(change_first)
    with pytest.raises(ValueError, match=r"-00002-of-\d+\.safetensors: " + words.format(key=keys[0].replace(".", r"\."))):
        load_weights(folder, VideoConfig(), ALONE)


def test_a_tensor_in_two_files_is_named(broken_copy: Callable[..., Path], stored: dict[str, torch.Tensor]) -> None:
    folder = broken_copy(lambda tensors: tensors.update(stored))
    with pytest.raises(ValueError, match=r"found a second time, expected once; it is in diffusion_pytorch_model-0000"):
        load_weights(folder, VideoConfig(), ALONE)


@pytest.mark.parametrize("damage", ["gone", "cut off", "index"])
def test_a_file_that_cannot_be_read_is_named(broken_copy: Callable[..., Path], damage: str) -> None:
    folder = broken_copy(lambda tensors: None)
    file = sorted(folder.glob("*.safetensors"))[2] if damage != "index" else folder / f"{NAME}.index.json"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"^{file}: not readable as .*; fetch it again$"):
        load_weights(folder, VideoConfig(), ALONE)


def test_offloading_is_refused_to_one_rank(folder: Path) -> None:
    settings = VideoConfig(weights_sharding="zero3", cpu_offload=True)
    with pytest.raises(ValueError, match="found cpu_offload on one rank, expected 2 or more"):
        load_weights(folder / "transformer", settings, ALONE)


@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_on_one_rank_nothing_is_shared(folder: Path, sharding: Any) -> None:
    found = load_weights(folder / "transformer", VideoConfig(dtype="float32", weights_sharding=sharding), ALONE)
    expected = WanVACETransformer3DModel.from_pretrained(folder / "transformer").state_dict()
    assert {type(parameter) for parameter in found.parameters()} == {torch.nn.Parameter}
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


# ---- what a rank needs, of the published sizes


@pytest.mark.parametrize(("sizes", "billions"), [(VACE_14B, 17.34), (VACE_1_3B, 2.15)], ids=["14B", "1.3B"])
def test_parameters_are_counted_as_the_model_has_them(sizes: dict[str, Any], billions: float) -> None:
    with init_empty_weights(include_buffers=False):
        model = WanVACETransformer3DModel.from_config(sizes)
    kept = [one for name, one in model.named_parameters() if dtype_of(name, torch.bfloat16) == torch.float32]
    assert count_parameters(sizes) == sum(parameter.numel() for parameter in model.parameters())
    assert count_float32_parameters(sizes) == sum(parameter.numel() for parameter in kept)
    assert round(count_parameters(sizes) / 1e9, 2) == billions


def test_sharing_divides_the_weights_and_gathers_some() -> None:
    split = Degrees(cfg=2, ulysses=4)
    none, fsdp2, offload = (
        memory_gb(VACE_14B, VideoConfig(weights_sharding=sharding, cpu_offload=offload), split)
        for sharding, offload in (("none", False), ("fsdp2", False), ("zero3", True))
    )
    assert none.weights - offload.weights == pytest.approx(34.7, abs=0.1)  # 17.34 billion in bfloat16
    assert fsdp2.weights - offload.weights == pytest.approx((none.weights - offload.weights) / 8)
    assert none.gathered == 0 < fsdp2.gathered < 4
    assert none.activations == fsdp2.activations == offload.activations


def test_a_kept_text_counts_with_its_keys_and_values_in_every_block() -> None:
    for changes, num_texts in (({}, 2), ({"guidance_scale": 1.0}, 1)):
        kept, not_kept = (VideoConfig(**changes, speed={"keep_text": keep}) for keep in (True, False))
        more = memory_gb(VACE_14B, kept, Degrees()).activations - memory_gb(VACE_14B, not_kept, Degrees()).activations
        assert more == pytest.approx(num_texts * 48 * 2 * 512 * 5120 * 2 / 1e9)
    paired = memory_gb(VACE_14B, VideoConfig(), Degrees(cfg=2)).activations
    assert memory_gb(VACE_14B, VideoConfig(), Degrees()).activations - paired == pytest.approx(48 * 2 * 512 * 5120 * 2 / 1e9)


def test_what_a_gpu_cannot_hold_is_refused_with_what_would_fit() -> None:
    check_memory(VACE_14B, VideoConfig(), Degrees(), 80)
    with pytest.raises(ValueError) as caught:
        check_memory(VACE_14B, VideoConfig(), Degrees(cfg=2, ulysses=2), 24)
    text = str(caught.value)
    assert "Wan2.1-VACE-14B-diffusers in bfloat16, 832x480x81, on cfg 2 x ulysses 2 x ring 1 needs at least 3" in text
    assert "found 24.0 GB; what would fit: video.weights_sharding=fsdp2 on 4 ranks (" in text
    with pytest.raises(ValueError, match=r"nothing would fit; make a smaller video$"):
        check_memory(VACE_14B, VideoConfig(), Degrees(), 0.5)
