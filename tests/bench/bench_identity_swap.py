"""How long it takes to give a full-size SDXL UNet another person, against the time that it paints one picture.

    OMP_NUM_THREADS=2 python tests/bench/bench_identity_swap.py [--device cuda] [--dtype float16]

Measured: Slots.set_identity over all 560 projections at rank 8 (median of 20 swaps), and one UNet call at 832x480 with
guidance, so a batch of 2 (a warm-up call first, unless --cold), with empty slots and with a person set. A paint is taken
as 20 such calls; text encoders and VAE, which would only lower the ratio, are left out. Weights are made up: 5.1 GB in
two bytes a number. Making the LoRA from photos is not measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers import SDXL_UNET

from ipt2v.models.hyperlora.network import IdentityLoRA
from ipt2v.models.hyperlora.slots import Slots, install_slots

NUM_STEPS, RANK = 20, 8


def make_unet(device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """Full size, every weight small and none zero."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET).to(dtype)
    unet = unet.to_empty(device=device).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter.uniform_(-0.02, 0.02)
    return unet


def make_lora(slots: Slots, device: torch.device, seed: int) -> IdentityLoRA:
    """Random factors in float32 on the device, as load_hyperlora's generate gives them."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.01 * torch.randn(shape, generator=generator, device=device)

    linears = slots.linears.items()
    return IdentityLoRA(factors={path: (draw(RANK, one.in_features), draw(one.out_features, RANK)) for path, one in linears})


def seconds(act: Callable[[], object], device: torch.device) -> float:
    """How long one call takes until the device is done."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    act()
    synchronise()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cold", action="store_true", help="no warm-up call: for slow machines")
    options = parser.parse_args()
    device, dtype = options.device, getattr(torch, options.dtype)

    unet = make_unet(device, dtype)
    inputs = {"sample": torch.randn(2, 4, 480 // 8, 832 // 8), "encoder_hidden_states": torch.randn(2, 77, 2048)}
    conditions = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.tensor([[480.0, 832, 0, 0, 480, 832]] * 2)}
    inputs, conditions = ({name: one.to(device, dtype) for name, one in group.items()} for group in (inputs, conditions))

    def call() -> object:
        return unet(**inputs, timestep=500, added_cond_kwargs=conditions).sample

    start = time.perf_counter()
    slots = install_slots(unet)
    print(f"install once {time.perf_counter() - start:9.4f} s")
    if not options.cold:
        call()
    base = seconds(call, device)
    people = [make_lora(slots, device, seed) for seed in (1, 2)]
    swap = statistics.median(seconds(lambda at=at: slots.set_identity(people[at % 2], 0.85), device) for at in range(20))
    painted = seconds(call, device)
    print(f"swap         {swap:9.4f} s   {len(slots.linears)} projections, rank {RANK}, {device}, {options.dtype}")
    print(f"UNet call    {painted:9.4f} s   832x480, batch 2; {base:.4f} s with empty slots")
    print(f"{NUM_STEPS} calls     {NUM_STEPS * painted:9.4f} s   {NUM_STEPS} times the one that was measured")
    print(f"swap / paint {swap / (NUM_STEPS * painted):9.2e}")


if __name__ == "__main__":
    main()
