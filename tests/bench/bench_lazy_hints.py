"""What lazy hints save: peak memory of a forward's activations, all hints first (diffusers) against one at a time (ours).

    OMP_NUM_THREADS=1 python tests/bench/bench_lazy_hints.py [--device cuda] [--tokens 512 1024] [--width 256]

A model of VACE-14B's depth, 40 main and 8 VACE blocks, but narrow, with random weights. Measured: the peak of what one forward
allocates beyond weights and inputs (on a CPU the sum of every allocation and release that torch's profiler records, on a GPU
torch.cuda.max_memory_allocated); how many hints are alive at most when a main block starts, by weak references; seconds of
a forward after one to warm up. The outputs of both ways must be equal.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import WanVACETransformer3DModel
from torch.profiler import ProfilerActivity, profile

from ipt2v.models.vace.hints import make_hints_lazy

NUM_LAYERS, VACE_LAYERS = 40, list(range(0, 40, 5))  # transformer/config.json of Wan2.1-VACE-14B-diffusers
HEAD_WIDTH = 64
MIB = 2**20


def make_transformer(width: int, device: torch.device, dtype: torch.dtype) -> WanVACETransformer3DModel:
    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(
        num_attention_heads=width // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        text_dim=64,
        freq_dim=64,
        ffn_dim=width * 27 // 10,  # 13824 / 5120
        num_layers=NUM_LAYERS,
        vace_layers=VACE_LAYERS,
    )
    return transformer.to(device, dtype).eval().requires_grad_(False)


def make_inputs(num_tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    size = (num_tokens // 64, 16, 16)  # 8 x 8 patches a latent frame
    return {
        "hidden_states": torch.randn(1, 16, *size, device=device, dtype=dtype),
        "control_hidden_states": torch.randn(1, 96, *size, device=device, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 64, 64, device=device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=device),
        "return_dict": False,
    }


@torch.inference_mode()
def forward(transformer: WanVACETransformer3DModel, inputs: dict[str, Any]) -> torch.Tensor:
    return transformer(**inputs)[0]


def peak_bytes(transformer: WanVACETransformer3DModel, inputs: dict[str, Any], device: torch.device) -> int:
    """Most bytes allocated at once during a forward, beyond what is allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward(transformer, inputs)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        forward(transformer, inputs)
    recorded = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]")
    return most(change for _, change in changes)


def most(changes: Iterable[int]) -> int:
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest


def most_hints(transformer: WanVACETransformer3DModel, inputs: dict[str, Any]) -> int:
    """Most hints alive as a main block starts."""
    hints: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda *_: counts.append(sum(hint() is not None for hint in hints)))
        for block in transformer.blocks
    ]
    handles += [
        block.register_forward_hook(lambda _module, _args, output: hints.append(weakref.ref(output[0])))
        for block in transformer.vace_blocks
    ]
    forward(transformer, inputs)
    for handle in handles:
        handle.remove()
    return max(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--width", type=int, default=256)
    chosen = parser.parse_args()
    dtype = torch.bfloat16 if chosen.device.type == "cuda" else torch.float32
    transformer = make_transformer(chosen.width, chosen.device, dtype)
    print(f"{NUM_LAYERS} main and {len(VACE_LAYERS)} VACE blocks of width {chosen.width}, {dtype}, {chosen.device}")
    print("| tokens | hints | peak MiB | one hint MiB | hints alive when a main block starts | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    cases = [(num_tokens, make_inputs(num_tokens, chosen.device, dtype)) for num_tokens in chosen.tokens]
    outputs = []
    for kind in ("eager", "lazy"):
        if kind == "lazy":
            make_hints_lazy(transformer)
        for num_tokens, inputs in cases:
            outputs.append(forward(transformer, inputs))
            start = time.monotonic()
            forward(transformer, inputs).cpu()
            seconds = time.monotonic() - start
            peak, hint = peak_bytes(transformer, inputs, chosen.device), num_tokens * chosen.width * dtype.itemsize
            alive = most_hints(transformer, inputs)
            print(f"| {num_tokens} | {kind} | {peak / MIB:.1f} | {hint / MIB:.1f} | {alive} | {seconds:.2f} |", flush=True)
    same = all(torch.equal(one, other) for one, other in zip(outputs[: len(cases)], outputs[len(cases) :], strict=True))
    print(f"outputs equal, bit for bit: {same}")


if __name__ == "__main__":
    main()
