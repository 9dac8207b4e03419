"""One rank of two for test_step_cache.py and test_speed.py: writes what it finds as JSON.

Started by torchrun as `speed_worker.py step_cache|speed OUT`; no test by itself.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import UniPCMultistepScheduler, WanVACETransformer3DModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ipt2v.models.vace.denoise import Guidance, denoise, guided_velocity
from ipt2v.models.vace.hints import make_hints_lazy
from ipt2v.models.vace.position import Position
from ipt2v.models.vace.ring import choose_kernel
from ipt2v.models.vace.speed import compile_blocks, fuse_qkv
from ipt2v.models.vace.split import parallelise
from ipt2v.models.vace.step_cache import CacheRule, StepCache, cache_steps
from ipt2v.parallel import Group, group_from_environment
from ipt2v.xdit import Subgroups

Transformer = WanVACETransformer3DModel
SPLITS = {"ulysses": (1, 2, 1), "ring": (1, 1, 2), "cfg": (2, 1, 1)}  # (cfg, ulysses, ring)
NUM_STEPS = 12
RULE = CacheRule(threshold=0.05, num_first_blocks=2, warmup_steps=2, max_skips=3)
SIZE, ODD_SIZE = (4, 4, 6), (3, 4, 6)  # 24 tokens; 18 are 9 a rank, and 3 x 2 x 5 = 30 would be 15


def toy() -> Transformer:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 16, "ffn_dim": 24}
    return Transformer(**sizes, num_layers=6, vace_layers=[0, 1, 3, 5], rope_max_seq_len=64).eval().requires_grad_(False)


def split_toy(group: Group, subgroups: Subgroups | None) -> Transformer:
    transformer = toy()
    make_hints_lazy(transformer)
    if subgroups is not None and dist.get_world_size(subgroups.sequence) > 1:
        parallelise(transformer, subgroups, choose_kernel(group.device, torch.float32))
    return transformer


def inputs_of(moved: float, size: tuple[int, int, int] = SIZE) -> dict[str, Any]:
    """The second half of the frames moves, the first does not: of two ranks, one sees the change and one hardly does."""
    generator = torch.Generator().manual_seed(1)
    latents, other, control = (torch.randn((1, channels, *size), generator=generator) for channels in (16, 16, 96))
    latents[:, :, size[0] // 2 :] += moved * other[:, :, size[0] // 2 :]
    return {
        "hidden_states": latents,
        "control_hidden_states": control,
        "encoder_hidden_states": torch.randn((1, 20, 32), generator=generator),
        "control_hidden_states_scale": torch.tensor([1.0, 0.75, 0.5, 0.25]),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }


def own_sums(transformer: Transformer) -> torch.Tensor:
    """[change, size] of what the first blocks give to this rank's tokens."""
    seen: list[torch.Tensor] = []
    handle = transformer.blocks[RULE.num_first_blocks].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    for moved in (0.0, 0.5):
        transformer(**inputs_of(moved))
    handle.remove()
    return torch.stack([(seen[1] - seen[0]).double().abs().sum(), seen[0].double().abs().sum()])


def decisions(group: Group, subgroups: Subgroups) -> dict[str, Any]:
    """What two ranks decide of a change that one of them alone would call small and the other large."""
    sums = own_sums(split_toy(group, subgroups))
    own, total = (sums[0] / sums[1]).item(), torch.zeros(2, dtype=torch.float64)
    every = group.gather(sums)
    total = torch.stack(every).sum(0)
    changes, together = [(one[0] / one[1]).item() for one in every], (total[0] / total[1]).item()
    found: dict[str, Any] = {"own_change": own, "together": together}
    for name, extreme in (("low", min(changes)), ("high", max(changes))):
        transformer = split_toy(group, subgroups)
        threshold = (extreme + together) / 2
        cache = cache_steps(transformer, replace(RULE, threshold=threshold, warmup_steps=1), subgroups)
        calls: list[int] = []
        transformer.blocks[-1].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        cache.reset(2, 1)
        skips = []
        for moved in (0.0, 0.5):
            before = len(calls)
            transformer(**inputs_of(moved))
            skips.append(len(calls) == before)
        found |= {name: threshold, f"skipped_at_{name}": skips}
    return found


def latents_of(
    transformer: Transformer, cache: StepCache | None = None, pair: dist.ProcessGroup | None = None
) -> tuple[torch.Tensor, str]:
    """A guided video's latents, and a 1 for each step that was skipped."""
    generator = torch.Generator().manual_seed(2)
    texts, pattern, before = torch.randn((2, 1, 20, 32), generator=generator), "", [0]
    guidance = Guidance(
        positive_BLD=texts[0],
        negative_BLD=texts[1],
        condition_BCthw=torch.randn((1, 96, *SIZE), generator=generator),
        conditioning_scale=1.0,
        guidance_scale=5.0,
    )
    skips: list[int] = []

    def note(_position: Position) -> None:
        skips.append(0 if cache is None else cache.saved().num_skipped)

    if cache is not None:
        cache.reset(NUM_STEPS, 2 if pair is None else 1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    noise = torch.randn((1, 16, *SIZE), generator=generator)
    latents = denoise(guided_velocity(transformer, guidance, pair), scheduler, noise, NUM_STEPS, note)
    pattern = "".join(str(int(after > so_far)) for so_far, after in zip(before + skips, skips, strict=False))
    return latents, pattern


def cached_video(group: Group, subgroups: Subgroups | None, *, is_sharded: bool = False) -> tuple[torch.Tensor, str]:
    transformer = split_toy(group, subgroups)
    if is_sharded:
        mesh = init_device_mesh("cpu", (group.world_size,))
        for module in (*transformer.blocks, *transformer.vace_blocks, transformer):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    has_pair = subgroups is not None and dist.get_world_size(subgroups.cfg) > 1
    cache = cache_steps(transformer, RULE, subgroups)
    return latents_of(transformer, cache, subgroups.cfg if subgroups is not None and has_pair else None)


def step_cache(group: Group) -> dict[str, Any]:
    alone, pattern = cached_video(group, None)
    uncached, _ = latents_of(split_toy(group, None))
    found: dict[str, Any] = {
        "alone": {"pattern": pattern, "difference_to_uncached": (alone - uncached).abs().max().item()},
    }
    for name, (cfg, ulysses, ring) in SPLITS.items():
        subgroups = group.split(cfg=cfg, ulysses=ulysses, ring=ring)
        latents, pattern = cached_video(group, subgroups)
        found[name] = {"pattern": pattern, "difference_to_alone": (latents - alone).abs().max().item()}
        if cfg == 1:
            found[name] |= decisions(group, subgroups)
        else:  # a CFG pair whose two ranks share each block's weights would hang if one of them skipped alone
            latents, pattern = cached_video(group, subgroups, is_sharded=True)
            found["fsdp2"] = {"pattern": pattern, "difference_to_alone": (latents - alone).abs().max().item()}
    return found


def speed(group: Group) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("ulysses", "ring"):
        _, ulysses, ring = SPLITS[name]
        subgroups, found[name] = group.split(cfg=1, ulysses=ulysses, ring=ring), {}
        for switch in ("fused", "compiled"):
            transformer = split_toy(group, subgroups)
            if switch == "fused":
                fuse_qkv(transformer)
            else:
                compile_blocks(transformer, backend="eager")
            inputs = inputs_of(0.0, ODD_SIZE)
            plain = split_toy(group, subgroups)(**inputs)[0]
            found[name][switch] = (transformer(**inputs)[0] - plain).abs().max().item()
    subgroups = group.split(cfg=1, ulysses=2, ring=1)
    transformer = split_toy(group, subgroups)
    mesh = init_device_mesh("cpu", (group.world_size,))
    for block in (*transformer.blocks, *transformer.vace_blocks):
        fully_shard(block, mesh=mesh)
    try:
        fuse_qkv(transformer)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def main(what: str, out: str) -> None:
    with group_from_environment() as group, torch.inference_mode():
        found = {"step_cache": step_cache, "speed": speed}[what](group)
    (Path(out) / f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
