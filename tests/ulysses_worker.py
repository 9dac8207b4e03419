"""One rank of test_ulysses.py: compares each result of the group with that of the unsplit model, writes what it finds as JSON.

Started by torchrun as `ulysses_worker.py WEIGHTS OUT FRAMES,HEIGHT,WIDTH[,DTYPE] ...`, with latent sizes; no test by itself.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import WanVACETransformer3DModel

from ipt2v.config import VideoConfig
from ipt2v.models.vace.load import load_animator
from ipt2v.models.vace.ulysses import heads_for_tokens, parallelise, tokens_for_heads
from ipt2v.parallel import Group, group_from_environment
from ipt2v.records import FirstFrame, TextEmbedding

MODEL = "Wan2.1-VACE-14B-diffusers"


def forward_difference(folder: Path, group: Group, case: str) -> dict[str, Any]:
    """Largest absolute difference between split and unsplit forward, and the largest value of the unsplit one."""
    frames, height, width, *names = case.split(",")
    size, dtype = (int(frames), int(height), int(width)), getattr(torch, names[0] if names else "float32")
    unsplit, split = (WanVACETransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype).eval() for _ in range(2))
    assert group.ulysses is not None
    parallelise(split, group.ulysses)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn((1, 16, *size), generator=generator).to(dtype),
        "control_hidden_states": torch.randn((1, 96, *size), generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn((1, 20, 32), generator=generator).to(dtype),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5], dtype=dtype),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
    with torch.inference_mode():
        expected = unsplit(**inputs)[0].double()
        found = [split(**inputs)[0].double() for _ in range(2)]  # the second forward must not see the first
    return {
        "case": case,
        "tokens": size[0] * size[1] * size[2] // 4,
        "difference": max((one - expected).abs().max().item() for one in found),
        "largest": expected.abs().max().item(),
    }


def sizes_in_turn_difference(folder: Path, group: Group) -> float:
    """One split model, forwards of several lengths: the length of one must not stay for the next."""
    unsplit, split = (WanVACETransformer3DModel.from_pretrained(folder / "transformer").eval() for _ in range(2))
    assert group.ulysses is not None
    parallelise(split, group.ulysses)
    differences = []
    for size in ((3, 10, 10), (2, 4, 6), (3, 6, 6), (3, 10, 10)):
        generator = torch.Generator().manual_seed(size[1])
        inputs = {
            "hidden_states": torch.randn((1, 16, *size), generator=generator),
            "control_hidden_states": torch.randn((1, 96, *size), generator=generator),
            "encoder_hidden_states": torch.randn((1, 20, 32), generator=generator),
            "timestep": torch.tensor([500.0]),
            "return_dict": False,
        }
        with torch.inference_mode():
            differences.append((split(**inputs)[0] - unsplit(**inputs)[0]).abs().max().item())
    return max(differences)


def animate_difference(folder: Path, group: Group, size: tuple[int, int, int]) -> dict[str, float]:
    """Largest difference between latents of the whole group and of one rank alone; the ranks' own among each other."""
    width, height, num_frames = size
    config = VideoConfig(
        model=MODEL,
        dtype="float32",
        width=width,
        height=height,
        num_frames=num_frames,
        num_inference_steps=3,
        max_text_tokens=32,
    )
    random = np.random.default_rng(0)
    positive, negative = (
        TextEmbedding(text=name, embedding_LD=random.normal(size=(7, 32)).astype(np.float32)) for name in ("walks", "blurred")
    )
    first_frame = FirstFrame(
        key="identity/prompt",
        subject="A person",
        spatial_prompt="",
        temporal_prompt="walks",
        image_HWC=random.integers(0, 256, (height, width, 3), dtype=np.uint8),
        similarity=None,
        attempts=(),
        notes=(),
        temporal=positive,
        negative=negative,
    )
    alone = Group(rank=0, world_size=1, device=group.device, ulysses=None)
    expected = load_animator(folder, config, alone).animate(first_frame, 5)
    animate = load_animator(folder, config, group).animate
    found = [animate(first_frame, 5) for _ in range(2)]
    from_rank_0 = group.from_first(found[0])
    return {
        "to_one_rank": float(np.abs(found[0] - expected).max()),
        "to_second_call": float(np.abs(found[0] - found[1]).max()),
        "to_rank_0": float(np.abs(found[0] - from_rank_0).max()),
        "largest": float(np.abs(expected).max()),
    }


def swaps(group: Group) -> dict[str, bool]:
    """Tokens for heads and back, on a tensor whose every value says which token, head and channel it is."""
    assert group.ulysses is not None
    ranks, local = group.world_size, 3
    all_BLND = torch.arange(ranks * local * 4 * 2).float().view(1, ranks * local, 4, 2)
    own_BsND = all_BLND[:, group.rank * local : (group.rank + 1) * local]
    swapped = tokens_for_heads(own_BsND, group.ulysses)
    return {
        "all_tokens_own_heads": torch.equal(swapped, all_BLND.chunk(ranks, dim=2)[group.rank]),
        "and_back": torch.equal(heads_for_tokens(swapped, group.ulysses), own_BsND),
    }


def refusal(folder: Path, group: Group) -> str:
    """What load_animator says when one more rank than these asks for a share of the 4 heads."""
    illegal = Group(rank=group.rank, world_size=3, device=group.device, ulysses=group.ulysses)
    try:
        load_animator(folder, VideoConfig(model=MODEL, dtype="float32"), illegal)
    except ValueError as error:
        return str(error)
    return "not refused"


def main(weights: str, out: str, *cases: str) -> None:
    folder = Path(weights) / MODEL
    with group_from_environment() as group:
        found = {
            "world_size": group.world_size,
            "ulysses_ranks": dist.get_world_size(group.ulysses),
            "ulysses_rank": dist.get_rank(group.ulysses),
            "device": str(group.device),
            "from_first": group.from_first({"rank": group.rank, "text": "色"}),
            "from_first_nothing": group.from_first(() if group.is_first else (group.rank,)) == (),
            "is_first": group.is_first,
            "swaps": swaps(group),
            "forwards": [forward_difference(folder, group, case) for case in cases],
            "sizes_in_turn": sizes_in_turn_difference(folder, group),
            "animate_48x32x5": animate_difference(folder, group, (48, 32, 5)),
            "animate_80x48x17": animate_difference(folder, group, (80, 48, 17)),  # 75 tokens
            "refusal": refusal(folder, group),
        }
    found["left_behind"] = dist.is_initialized()
    path = Path(out) / f"{os.environ['RANK']}.json"
    path.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
