"""One rank of test_zero3.py: the LLM and the text encoder by ZeRO-3 and plain; writes what it finds as JSON.

Started as `zero3_worker.py WEIGHTS OUT`, by torchrun or, for a rank alone, without; no test by itself.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

from ipt2v.config import DecoupleConfig, FirstFrameConfig, HyperLoRAConfig, RunConfig, TextEncoderConfig, VideoConfig
from ipt2v.models.llm import load_generator
from ipt2v.models.zero3 import load_zero3, ready_for_zero3
from ipt2v.parallel import Group, group_from_environment, release
from ipt2v.records import Answer, Failure, FirstFrame, Item
from ipt2v.stages.first_frame import embed, make, split_prompts

MESSAGES = ("a woman walks", "two boys in the park, at night", "色调艳丽", "the dog")
TEXTS = ("A person walks.", "色调艳丽", "", "She laughs, then " * 9)
PAIRS = (("a woman walks", "A woman"), ("a dog", "A man"))
LINEAR = nn.functional.linear  # before DeepSpeed is imported
CONFIG = RunConfig(
    name="tiny",
    seed=11,
    testset={"path": "unused"},
    decouple=DecoupleConfig(temperature=1.0, max_new_tokens=24),  # bfloat16, as the text encoder
    hyperlora=HyperLoRAConfig(enabled=False),
    first_frame=FirstFrameConfig(
        dtype="float32", width=48, height=32, num_inference_steps=1, max_attempts=1, face_detailer={"enabled": False}
    ),
    video=VideoConfig(width=48, height=32, num_frames=5, max_text_tokens=24, negative_prompt="blurred"),
)


def by_zero3(config: RunConfig, *, cpu_offload: bool = False) -> RunConfig:
    sharing = {"weights_sharding": "zero3", "cpu_offload": cpu_offload}
    decouple = config.decouple.model_copy(update=sharing)
    return config.model_copy(update={"decouple": decouple, "text_encoder": TextEncoderConfig.model_validate(sharing)})


def ask_all(messages: Sequence[str], generate: Callable[[Sequence[str]], list[Answer]]) -> list[Answer]:
    """Remembers nothing."""
    return generate(messages)


def left_overs(folder: Path) -> dict[str, Any]:
    """What ZeRO-3 has left behind in this process, and whether a model that is loaded now is as if it had never been."""
    gc.collect()
    kinds = ("Qwen3ForCausalLM", "UMT5EncoderModel")
    models = [one for one in gc.get_objects() if type(one).__name__ in kinds]
    parameters = [parameter for one in models for parameter in one.parameters()]
    tensors = [one for parameter in parameters for one in (parameter, getattr(parameter, "ds_tensor", None)) if one is not None]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linear = nn.Linear(3, 2)
    return {
        "left": sum(one.numel() for one in tensors),
        "enabled": is_deepspeed_zero3_enabled(),
        "whole": all(one.numel() > 0 and not hasattr(one, "ds_id") for one in [*model.parameters(), *linear.parameters()]),
        "numel": sum(one.numel() for one in model.parameters()),
        "hooks": sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()),
        "linear": nn.functional.linear is LINEAR,
        "local_rank": os.environ.get("LOCAL_RANK"),
        "group": dist.is_initialized(),
    }


# ---- the LLM


def answers(folder: Path, group: Group, temperature: float, dtype: str) -> dict[str, Any]:
    """(text, finished) of each message: one rank's plain, and all ranks' by ZeRO-3, twice."""
    plain = DecoupleConfig(dtype=dtype, temperature=temperature, max_new_tokens=24, batch_size=3)
    shared = plain.model_copy(update={"weights_sharding": "zero3"})
    with ready_for_zero3(shared, group):
        alone, together = (
            load_generator(folder, settings, base_seed=7, device=group.device, num_ranks=num_ranks)
            for settings, num_ranks in ((plain, 1), (shared, group.world_size))
        )
        runs = [[(one.text, one.finished) for one in generate(MESSAGES)] for generate in (alone, together, together)]
    return {"alone": runs[0], "together": runs[1], "again": runs[2]}


def share(folder: Path, group: Group) -> dict[str, Any]:
    """How much of the LLM this rank holds, and what became of its buffers."""

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    plain, model = load(), load_zero3(load, torch.bfloat16, group.device, cpu_offload=False)
    buffers = dict(model.named_buffers())
    return {
        "whole": sum(one.numel() for one in plain.parameters()),
        "own": sum(one.ds_tensor.numel() for one in model.parameters()),
        "gathered": sum(one.numel() for one in model.parameters()),
        "dtypes": sorted({str(one.ds_tensor.dtype) for one in model.parameters()}),
        "buffers": [
            torch.equal(buffers[name], one) and buffers[name].dtype == one.dtype for name, one in plain.named_buffers()
        ],
    }


def failure(folder: Path, device: torch.device) -> str:
    """Of a model that is not there."""
    try:
        load_zero3(lambda: AutoModelForCausalLM.from_pretrained(folder / "no"), torch.float32, device, cpu_offload=False)
    except Exception as error:
        return type(error).__name__
    return "none"


# ---- the text encoder


def embeddings(weights: Path, group: Group, texts: Sequence[str], config: RunConfig) -> dict[str, str]:
    """text -> digest of its embedding."""
    return {text: digest(one.embedding_LD) for text, one in embed(texts, config, weights, group).items()}


def digest(values: np.ndarray[Any, Any]) -> str:
    return f"{values.shape} {hashlib.sha256(values.tobytes()).hexdigest()[:16]}"


# ---- the stage


def people(folder: Path, *, broken: Sequence[int], rank: int) -> list[Item]:
    """An item of each of three people; the photos with a number in `broken` cannot be decoded."""
    items = []
    for number in range(3):
        path = folder / f"{rank} {number} {len(broken)}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[:2000])
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        prompt = MESSAGES[number]
        items.append(Item(identity=f"p{number}", prompt_id="0", prompt=prompt, reference=str(path), reference_sha256=sha256))
    return items


def stage(weights: Path, group: Group, items: Sequence[Item], config: RunConfig) -> dict[str, Any]:
    """key -> all that was made of an item, or "failure"."""
    results = list(make(items, config, weights, group, ask_all))
    failures = {one.key: "failure" for one in results if isinstance(one, Failure)}
    return failures | {one.record.key: record(one.record) for one in results if not isinstance(one, Failure)}


def record(made: FirstFrame) -> list[Any]:
    texts = [made.subject, made.spatial_prompt, made.temporal_prompt, *made.notes, made.temporal.text, made.negative.text]
    arrays = [made.reference_HWC, made.temporal.embedding_LD, made.negative.embedding_LD]
    picture = "none" if made.image_HWC is None else digest(made.image_HWC)
    return [*texts, made.similarity, picture, *map(digest, arrays)]


# ---- ranks


def of_two(weights: Path, out: Path, group: Group) -> dict[str, Any]:
    alone, folder = Group(rank=0, world_size=1, num_nodes=1, device=group.device), weights / "Qwen3-8B"
    items, some = (people(out, broken=broken, rank=group.rank) for broken in ((), (1,)))
    none = people(out, broken=(0, 1, 2), rank=group.rank)
    zero3, reference = by_zero3(CONFIG), {"video": CONFIG.video.model_copy(update={"condition": "reference"})}
    found: dict[str, Any] = {"stage alone": stage(weights, alone, items, CONFIG)}
    cases = ((0.0, "bfloat16"), (0.9, "bfloat16"), (0.9, "float32"))
    found["answers"] = {f"{temperature} {dtype}": answers(folder, group, temperature, dtype) for temperature, dtype in cases}
    with ready_for_zero3(zero3.decouple, group):
        found["share"] = share(folder, group)
    found["embeddings alone"] = embeddings(weights, alone, TEXTS, CONFIG)
    for name, texts in (("first", TEXTS), ("none", ()), ("second", TEXTS[:1])):
        mine = TEXTS[2:] if name == "second" and not group.is_first else texts if group.is_first else ()
        found[f"embeddings {name}"] = embeddings(weights, group, mine, zero3)
    found["stage"] = stage(weights, group, items, zero3)
    found["stage, rank 1 without a photo"] = stage(weights, group, some, zero3.model_copy(update=reference))
    found["stage, no photo"] = stage(out / "no weights here", group, none, zero3)
    release(group.device)
    return found | {"left": left_overs(folder)}


def of_one(weights: Path, group: Group) -> dict[str, Any]:
    found: dict[str, Any] = {}
    offloaded = by_zero3(CONFIG, cpu_offload=True)
    for name, config in (("plain", CONFIG), ("offloaded", offloaded), ("again", offloaded)):
        found[f"prompts {name}"] = [asdict(one) for one in split_prompts(PAIRS, config, weights, group, ask_all)]
        found[f"embeddings {name}"] = embeddings(weights, group, TEXTS, config)
    found["left"] = left_overs(weights / "Qwen3-8B")
    split_prompts((), offloaded, weights / "no weights here", group, ask_all)
    with ready_for_zero3(offloaded.decouple, group):
        found["failure"] = failure(weights, group.device)
    return found | {"left after a failure": left_overs(weights / "Qwen3-8B")}


def main(weights: str, out: str) -> None:
    with group_from_environment() as group:
        found = of_one(Path(weights), group) if group.world_size == 1 else of_two(Path(weights), Path(out), group)
    name = "alone" if group.world_size == 1 else str(group.rank)
    (Path(out) / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
