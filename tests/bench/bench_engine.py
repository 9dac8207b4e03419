"""Our denoising loop against others' on one VACE model with random weights: seconds, ratios, and how far the latents differ.

    python tests/bench/bench_engine.py [--width 384] [--layers 8] [--latents 5 16 24] [--steps 4] [--rounds 5]

One process, one thread: load_engine + guided_velocity + denoise against diffusers' WanVACEPipeline(output_type="latent").
Two processes over gloo, one thread each: ours as Ulysses 2 and as CFG pair against xDiT's VACE wrapper and diffusers' context
parallelism, both Ulysses 2, with our loop around them; all four call the same CPU attention (SDPA).
Noise, text embeddings and condition are given, on all sides: neither VAE nor text encoder is measured.

A round runs every candidate once, after a barrier, and every second round in reverse order; one round warms up. Seconds are of
the slower rank, the median over rounds, and in brackets the fastest, which a busy machine disturbs least; ratios are of these,
"to one" those to our one process. Differences are the largest to the latents of WanVACEPipeline.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import os
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel
from diffusers.models import ContextParallelConfig
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from ipt2v.config import VideoConfig
from ipt2v.models.vace.degrees import Degrees
from ipt2v.models.vace.denoise import Guidance, denoise, guided_velocity
from ipt2v.models.vace.engine import load_engine
from ipt2v.parallel import Group, group_from_environment

NUM_RANKS = 2
HEAD_WIDTH, TEXT_WIDTH, TEXT_TOKENS = 64, 64, 64
SETTINGS = VideoConfig(dtype="float32")
OURS, PIPELINE = "ours", "WanVACEPipeline"
ULYSSES, CFG, XFUSER, DIFFUSERS = "ours, Ulysses 2", "ours, CFG pair", "xDiT, Ulysses 2", "diffusers, Ulysses 2"

Run = Callable[[], torch.Tensor]  # -> latents


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is denoised; the same in every process."""

    folder: Path  # with the transformer, and what one process has found
    size: tuple[int, int, int]  # latent frames, height, width
    steps: int
    guidance_scale: float
    rounds: int

    @property
    def num_tokens(self) -> int:
        frames, height, width = self.size
        return frames * height * width // 4


@dataclass(frozen=True, slots=True)
class Measured:
    """One candidate: seconds of each round, and the latents of the last."""

    seconds: list[float]
    latents: torch.Tensor

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.seconds):.2f})"

    def to(self, other: Measured) -> str:
        return f"{self.median / other.median:.3f} ({min(self.seconds) / min(other.seconds):.3f})"


def write_transformer(folder: Path, width: int, num_layers: int, num_vace_layers: int) -> int:
    """Random weights as transformer/ of the folder; how many they are."""
    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(
        num_attention_heads=width // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        text_dim=TEXT_WIDTH,
        ffn_dim=width * 27 // 10,  # 13824 / 5120, as in VACE-14B
        num_layers=num_layers,
        vace_layers=[index * num_layers // num_vace_layers for index in range(num_vace_layers)],
    )
    transformer.save_pretrained(folder / "transformer")
    return transformer.num_parameters()


def make_inputs(case: Case) -> tuple[torch.Tensor, Guidance]:
    """The noise and what steers it."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn((1, 16, *case.size), generator=generator)
    positive, negative = (torch.randn((1, TEXT_TOKENS, TEXT_WIDTH), generator=generator) for _ in range(2))
    return noise, Guidance(
        positive_BLD=positive,
        negative_BLD=negative,
        condition_BCthw=torch.randn((1, 96, *case.size), generator=generator),
        conditioning_scale=1.0,
        guidance_scale=case.guidance_scale,
    )


def make_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def our_loop(case: Case, transformer: WanVACETransformer3DModel, pair: Any = None) -> Run:
    noise, guidance = make_inputs(case)
    scheduler = make_scheduler()
    return lambda: denoise(guided_velocity(transformer, guidance, pair), scheduler, noise, case.steps)


def pipeline_loop(case: Case) -> Run:
    """diffusers' whole call, except that the condition is not computed from a video."""
    noise, guidance = make_inputs(case)
    vae = AutoencoderKLWan(base_dim=3, num_res_blocks=1, dim_mult=[1, 1, 1, 1])  # asked for its dtype and scale factors alone
    transformer = WanVACETransformer3DModel.from_pretrained(case.folder / "transformer").eval()
    pipeline = WanVACEPipeline(None, None, vae=vae, scheduler=make_scheduler(), transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.preprocess_conditions = lambda *_: (None, None, [[]])
    pipeline.prepare_video_latents = lambda *_: guidance.condition_BCthw[:, :32]
    pipeline.prepare_masks = lambda *_: guidance.condition_BCthw[:, 32:]
    call = {
        "prompt_embeds": guidance.positive_BLD,
        "negative_prompt_embeds": guidance.negative_BLD,
        "num_frames": 4 * case.size[0] - 3,
        "height": 8 * case.size[1],
        "width": 8 * case.size[2],
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance_scale,
        "latents": noise,
        "output_type": "latent",
    }
    return lambda: pipeline(**call).frames


def xfuser_loop(case: Case) -> Run:
    """xDiT's wrapper in the groups that were made last; they must be Ulysses 2, and xfuser imported (ipt2v.xdit)."""
    package = importlib.import_module("xfuser")
    if not hasattr(package, "xFuserArgs"):  # on a CPU ipt2v.xdit leaves it unexecuted; its models need it
        package.__spec__.loader.exec_module(package)
    usp = importlib.import_module("xfuser.model_executor.layers.usp")
    usp.PROCESS_GROUP = importlib.import_module("yunchang.globals").PROCESS_GROUP  # None without an accelerator
    wrapper = importlib.import_module("xfuser.model_executor.models.transformers.transformer_wan_vace")
    runtime_state = importlib.import_module("xfuser.core.distributed.runtime_state")
    arguments = importlib.import_module("xfuser.config").xFuserArgs(
        model="random", ulysses_degree=NUM_RANKS, attention_backend="SDPA"
    )
    transformer = wrapper.xFuserWanVACETransformer3DWrapper.from_pretrained(case.folder / "transformer").eval()
    pipeline = SimpleNamespace(transformer=transformer)
    runtime_state.initialize_runtime_state(pipeline, arguments.create_config()[0])
    return our_loop(case, transformer)


def diffusers_loop(case: Case) -> Run:
    """diffusers' context parallelism, with a plan: it has one for Wan, and none for VACE."""
    tokens = ContextParallelInput(split_dim=1, expected_dims=3)
    rotary = ContextParallelInput(split_dim=1, expected_dims=4, split_output=True)
    plan = {
        "rope": {0: rotary, 1: rotary},
        "vace_blocks.0": {"hidden_states": tokens, "control_hidden_states": tokens},
        "blocks.0": {"hidden_states": tokens},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    torch.accelerator.device_count = lambda: 1  # on a CPU it is 0, and diffusers takes the rank modulo it
    transformer = WanVACETransformer3DModel.from_pretrained(case.folder / "transformer").eval()
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=NUM_RANKS), cp_plan=plan)
    return our_loop(case, transformer)


def measure(runs: dict[str, Run], num_rounds: int, group: Group) -> dict[str, Measured]:
    """Every candidate in turn, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    latents = {}
    for number in range(num_rounds + 1):
        for name in list(runs)[:: -1 if number % 2 else 1]:
            group.meet()
            start = time.monotonic()
            latents[name] = runs[name]()
            slowest = max(group.gather(time.monotonic() - start))
            if number:
                seconds[name].append(slowest)
    return {name: Measured(seconds[name], latents[name]) for name in runs}


def one_process(case: Case) -> None:
    torch.set_num_threads(1)
    group = Group(rank=0, world_size=1, num_nodes=1, device=torch.device("cpu"))
    transformer = load_engine(case.folder, SETTINGS, group, Degrees()).transformer
    found = measure({OURS: our_loop(case, transformer), PIPELINE: pipeline_loop(case)}, case.rounds, group)
    print("\n| one process | seconds | ratio to WanVACEPipeline |\n| --- | --- | --- |")
    for name, measured in found.items():
        print(f"| {name} | {measured} | {measured.to(found[PIPELINE])} |")
    same = torch.equal(found[OURS].latents, found[PIPELINE].latents)
    print(f"latents equal, bit for bit: {same}", flush=True)
    torch.save((found[OURS].seconds, found[PIPELINE].latents), case.folder / "one_process.pt")


def make_runs(case: Case, group: Group) -> tuple[dict[str, Run], dict[str, str]]:
    """The candidates that can run here; and why the others cannot."""
    # Ulysses last: xDiT keeps the groups that were made last alone. So the pair, the same two ranks, is over all ranks.
    pair_transformer = load_engine(case.folder, SETTINGS, group, Degrees(cfg=NUM_RANKS)).transformer
    transformer = load_engine(case.folder, SETTINGS, group, Degrees(ulysses=NUM_RANKS)).transformer
    runs = {
        ULYSSES: our_loop(case, transformer),
        CFG: our_loop(case, pair_transformer, torch.distributed.group.WORLD),
    }
    reasons = {}
    for name, make in {XFUSER: xfuser_loop, DIFFUSERS: diffusers_loop}.items():
        problem = ""
        try:
            runs[name] = make(case)
            runs[name]()
        except Exception as error:  # whatever it is, it belongs into the table
            problem = f"{type(error).__name__}: {error}".replace("\n", " ")
        if problems := [problem for problem in group.gather(problem) if problem]:
            runs.pop(name, None)
            reasons[name] = problems[0]
    return runs, reasons


def one_of_ranks(rank: int, port: int, case: Case) -> None:
    """A spawned process."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)  # diffusers calls a collective by its old name
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    with group_from_environment() as group:
        runs, reasons = make_runs(case, group)
        found = measure(runs, case.rounds, group)
        if group.is_first:
            report(case, found, reasons)


def report(case: Case, found: dict[str, Measured], reasons: dict[str, str]) -> None:
    seconds, expected = torch.load(case.folder / "one_process.pt")
    alone = Measured(seconds, expected)
    others = [name for name in (XFUSER, DIFFUSERS) if name in found]
    titles = ["two processes", "seconds", "ratio to one", *(f"ratio to {name}" for name in others), "difference"]
    print(f"\n| {' | '.join(titles)} |\n| {' | '.join('---' for _ in titles)} |")
    for name in (ULYSSES, CFG, XFUSER, DIFFUSERS):
        if name in reasons:
            print(f"| {name} | did not run: {reasons[name]} |")
            continue
        ratios = " | ".join(found[name].to(found[other]) for other in others)
        difference = (found[name].latents - expected).abs().max().item()
        print(f"| {name} | {found[name]} | {found[name].to(alone)} | {ratios} | {difference:.1e} |")
    print(f"largest latent: {expected.abs().max().item():.1f}", flush=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help=f"of the hidden states; heads are {HEAD_WIDTH} wide")
    parser.add_argument("--layers", type=int, default=8, help="main blocks")
    parser.add_argument("--vace-layers", type=int, default=2, help="VACE blocks")
    parser.add_argument("--latents", type=int, nargs=3, default=[5, 16, 24], help="latent frames, height, width; 4 a token")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5, help="measured runs of each candidate")
    chosen = parser.parse_args()
    if chosen.width % (HEAD_WIDTH * NUM_RANKS) or math.prod(chosen.latents) % (4 * NUM_RANKS):
        parser.error(
            f"heads ({HEAD_WIDTH} wide) and tokens (4 latent pixels) must be a multiple of {NUM_RANKS}, as the others ask"
        )
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        case = Case(
            folder=Path(folder),
            size=tuple(chosen.latents),
            steps=chosen.steps,
            guidance_scale=chosen.guidance,
            rounds=chosen.rounds,
        )
        num_weights = write_transformer(case.folder, chosen.width, chosen.layers, chosen.vace_layers)
        print(
            f"{chosen.layers} main and {chosen.vace_layers} VACE blocks of width {chosen.width} ({num_weights / 1e6:.1f} M "
            f"weights), float32; {case.num_tokens} tokens, {case.steps} steps, guidance {case.guidance_scale}; "
            f"{case.rounds} rounds, one thread a process",
            flush=True,
        )
        one_process(case)
        torch.multiprocessing.spawn(one_of_ranks, (free_port(), case), nprocs=NUM_RANKS)


if __name__ == "__main__":
    main()
