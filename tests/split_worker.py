"""One rank of test_split.py: compares each result of the ranks with that of the unsplit model, writes what it finds as JSON.

Started by torchrun as `split_worker.py WEIGHTS OUT JSON`; no test by itself. JSON: {"splits": [[cfg, ulysses, ring], ...],
"forwards": ["FRAMES,HEIGHT,WIDTH[,DTYPE]", ...] in latent pixels, "videos": ["WIDTHxHEIGHTxFRAMES", ...]}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import WanVACETransformer3DModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ipt2v.config import VideoConfig
from ipt2v.models.vace.degrees import Degrees
from ipt2v.models.vace.hints import make_hints_lazy
from ipt2v.models.vace.load import load_animator
from ipt2v.models.vace.position import Position
from ipt2v.models.vace.ring import choose_kernel, ring_attention
from ipt2v.models.vace.split import parallelise
from ipt2v.models.vace.ulysses import heads_for_tokens, tokens_for_heads
from ipt2v.parallel import Group, group_from_environment
from ipt2v.records import FirstFrame, TextEmbedding
from ipt2v.xdit import Subgroups

MODEL = "Wan2.1-VACE-14B-diffusers"


@contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """What this rank sends to others from here on: bytes of each kind."""
    sent = {"swap": 0, "ring": 0, "gather": 0}
    names = ("all_to_all_single", "batch_isend_irecv", "all_gather")
    swap, send, gather = (getattr(dist, name) for name in names)

    def count(kind: str, num_bytes: float) -> None:
        sent[kind] += round(num_bytes)

    def counting_swap(output: torch.Tensor, own: torch.Tensor, group: Any) -> Any:
        others = dist.get_world_size(group) - 1
        count("swap", own.nbytes * others / (others + 1))  # a rank keeps its own part
        return swap(output, own, group=group)

    def counting_send(operations: list[dist.P2POp]) -> Any:
        count("ring", sum(one.tensor.nbytes for one in operations if one.op is dist.isend))
        return send(operations)

    def counting_gather(parts: list[torch.Tensor], own: torch.Tensor, group: Any) -> Any:
        count("gather", own.nbytes * (dist.get_world_size(group) - 1))
        return gather(parts, own, group=group)

    for name, function in zip(names, (counting_swap, counting_send, counting_gather), strict=True):
        setattr(dist, name, function)
    try:
        yield sent
    finally:
        for name, function in zip(names, (swap, send, gather), strict=True):
            setattr(dist, name, function)


def load(folder: Path, dtype: torch.dtype) -> WanVACETransformer3DModel:
    return WanVACETransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype).eval()


@cache
def reference(folder: Path, dtype: torch.dtype) -> WanVACETransformer3DModel:
    """diffusers' own, on one rank, all hints first."""
    return load(folder, dtype)


def inputs_of(size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(size[1])
    return {
        "hidden_states": torch.randn((1, 16, *size), generator=generator).to(dtype),
        "control_hidden_states": torch.randn((1, 96, *size), generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn((1, 20, 32), generator=generator).to(dtype),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5], dtype=dtype),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }


def forwards(folder: Path, group: Group, subgroups: Subgroups, cases: list[str]) -> Iterator[dict[str, Any]]:
    """Of one split model for each dtype, a forward of each case, in turn: the length of one must not stay for the next."""
    split = {name: load(folder, getattr(torch, name)) for name in ("float32", "bfloat16")}
    for name, transformer in split.items():
        make_hints_lazy(transformer)
        parallelise(transformer, subgroups, choose_kernel(group.device, getattr(torch, name)))
    for case in cases:
        frames, height, width, *names = case.split(",")
        size, name = (int(frames), int(height), int(width)), names[0] if names else "float32"
        inputs = inputs_of(size, getattr(torch, name))
        with torch.inference_mode():
            expected = reference(folder, getattr(torch, name))(**inputs)[0].double()
            with counted_bytes() as sent:
                found = split[name](**inputs)[0].double()
        yield {
            "case": case,
            "tokens": size[0] * size[1] * size[2] // 4,
            "difference": (found - expected).abs().max().item(),
            "largest": expected.abs().max().item(),
            "same_on_every_rank": torch.equal(found, group.from_first(found)),
            "sent": dict(sent),
        }


def sharded_difference(folder: Path, group: Group, subgroups: Subgroups) -> float:
    """The same with the weights of each block sharded over all ranks: they are gathered when the block runs."""
    transformer, inputs = load(folder, torch.float32), inputs_of((3, 10, 10), torch.float32)
    make_hints_lazy(transformer)
    parallelise(transformer, subgroups, choose_kernel(group.device, torch.float32))
    mesh = init_device_mesh("cpu", (group.world_size,))
    for block in (*transformer.blocks, *transformer.vace_blocks):
        fully_shard(block, mesh=mesh)
    with torch.inference_mode():
        return (transformer(**inputs)[0] - reference(folder, torch.float32)(**inputs)[0]).abs().max().item()


def first_frame_of(width: int, height: int) -> FirstFrame:
    random = np.random.default_rng(0)
    positive, negative = (
        TextEmbedding(text=name, embedding_LD=random.normal(size=(7, 32)).astype(np.float32)) for name in ("walks", "blurred")
    )
    return FirstFrame(
        key="identity/prompt",
        subject="A person",
        spatial_prompt="",
        temporal_prompt="walks",
        image_HWC=random.integers(0, 256, (height, width, 3), dtype=np.uint8),
        reference_HWC=random.integers(0, 256, (24, 16, 3), dtype=np.uint8),
        similarity=None,
        attempts=(),
        notes=(),
        temporal=positive,
        negative=negative,
    )


def video(folder: Path, group: Group, split: Degrees, size: str) -> dict[str, Any]:
    """Latents of all ranks against those of one rank alone, of a second video, and of rank 0; what a video sends."""
    width, height, num_frames = map(int, size.split("x"))
    config = VideoConfig(
        model=MODEL,
        dtype="float32",
        width=width,
        height=height,
        num_frames=num_frames,
        num_inference_steps=3,
        guidance_scale=5.0,
        max_text_tokens=32,
    )
    first_frame, positions, positions_alone = first_frame_of(width, height), list[Position](), list[Position]()
    alone = Group(rank=0, world_size=1, num_nodes=1, device=group.device)
    animate_alone = load_animator(folder, config, alone).animate
    expected = animate_alone(first_frame, 5, positions_alone.append)
    animate = load_animator(folder, config, group, split).animate
    with counted_bytes() as sent:
        found = animate(first_frame, 5, positions.append)
    again = animate(first_frame, 5)
    resumed = (animate(first_frame, 5, start=positions_alone[1]), animate_alone(first_frame, 5, start=positions[1]))
    return {
        "size": size,
        "to_one_rank": float(np.abs(found - expected).max()),
        "to_second_call": float(np.abs(found - again).max()),
        "resumed_to_one_rank": max(float(np.abs(one - expected).max()) for one in resumed),
        "same_on_every_rank": np.array_equal(found, group.from_first(found)),
        "largest": float(np.abs(expected).max()),
        "sent": dict(sent),
        "latent_bytes": expected.nbytes,
        "steps": [(position.num_done, position.num_steps) for position in positions],
    }


def swaps(subgroups: Subgroups) -> dict[str, bool]:
    """Tokens for heads and back, on a tensor whose every value says which token, head and channel it is."""
    num_ranks, rank, local = dist.get_world_size(subgroups.ulysses), dist.get_rank(subgroups.ulysses), 3
    all_BLND = torch.arange(num_ranks * local * 4 * 2).float().view(1, num_ranks * local, 4, 2)
    own_BsND = all_BLND[:, rank * local : (rank + 1) * local]
    swapped = tokens_for_heads(own_BsND, subgroups.ulysses)
    return {
        "all_tokens_own_heads": torch.equal(swapped, all_BLND.chunk(num_ranks, dim=2)[rank]),
        "and_back": torch.equal(heads_for_tokens(swapped, subgroups.ulysses), own_BsND),
    }


def ring_events(subgroups: Subgroups) -> list[str]:
    """In which order a ring of ranks sends, attends and waits; the last block of the ring is all padding."""
    events, num_ranks, send = list[str](), dist.get_world_size(subgroups.ring), dist.batch_isend_irecv

    class Noted:
        def __init__(self, request: Any) -> None:
            self.request = request

        def wait(self) -> None:
            events.append("wait")
            self.request.wait()

    def noting_send(operations: list[dist.P2POp]) -> list[Noted]:
        events.append("send")
        return [Noted(request) for request in send(operations)]

    def noting_attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        events.append(f"attend {key.shape[2]}")
        return choose_kernel(query.device, query.dtype).attend(query, key, value)

    dist.batch_isend_irecv = noting_send
    try:
        valid = [*range(7, 7 + num_ranks - 1), 0]
        ring_attention(torch.ones(1, 2, 9, 8), torch.ones(2, 1, 2, 9, 8), valid, subgroups.ring, noting_attend)
    finally:
        dist.batch_isend_irecv = send
    return events


def refusal(folder: Path, group: Group, named: Degrees | None) -> str:
    """What load_animator says to ranks that cannot share the 4 heads."""
    illegal = Group(rank=group.rank, world_size=12, num_nodes=4, device=group.device)
    try:
        load_animator(folder, VideoConfig(model=MODEL, dtype="float32"), illegal, named)
    except ValueError as error:
        return str(error)
    return "not refused"


def of_split(folder: Path, group: Group, split: Degrees, wanted: dict[str, Any]) -> dict[str, Any]:
    subgroups = group.split(cfg=split.cfg, ulysses=split.ulysses, ring=split.ring)
    names = ("cfg", "ring", "ulysses", "sequence")
    return {
        "split": [split.cfg, split.ulysses, split.ring],
        "groups": {name: dist.get_process_group_ranks(getattr(subgroups, name)) for name in names},
        "swaps": swaps(subgroups),
        "ring_events": ring_events(subgroups),
        "forwards": list(forwards(folder, group, subgroups, wanted["forwards"])),
        "sharded_difference": sharded_difference(folder, group, subgroups),
        "videos": [video(folder, group, split, size) for size in wanted["videos"]],
    }


def main(weights: str, out: str, wanted_json: str) -> None:
    folder, wanted = Path(weights) / MODEL, json.loads(wanted_json)
    with group_from_environment() as group:
        found: dict[str, Any] = {
            "rank": group.rank,
            "world_size": group.world_size,
            "num_nodes": group.num_nodes,
            "from_first": group.from_first({"rank": group.rank, "text": "色"}),
            "from_first_nothing": group.from_first(() if group.is_first else (group.rank,)) == (),
            "is_first": group.is_first,
            "splits": [
                of_split(folder, group, Degrees(cfg=cfg, ulysses=ulysses, ring=ring), wanted)
                for cfg, ulysses, ring in wanted["splits"]
            ],
            "refusals": [refusal(folder, group, None), refusal(folder, group, Degrees(ulysses=3, ring=4))],
        }
    found["left_behind"] = dist.is_initialized()
    path = Path(out) / f"{os.environ['RANK']}.json"
    path.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
