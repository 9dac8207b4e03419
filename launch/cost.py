"""What videos cost on so many GPUs, and how to share them out. Pure arithmetic: no torch, no files, no scheduler.

Two prices. The floor follows from the layers' products, the bytes that ranks send and the rates of the hardware. What to expect
is the floor times a slowdown, from published speeds until a run's records say better.
Not counted: what sharded weights send (video.weights_sharding), what a step cache skips, the VAE, the queue.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ipt2v.config import VideoConfig
from ipt2v.models.vace.degrees import Degrees, check_degrees, degrees, divisors
from ipt2v.models.vace.memory import BYTES, MemoryGb, Sizes, count_parameters, memory_gb

NIC_GB_PER_SECOND = 50.0  # one 400 Gbit/s card, one way
# What each further GPU of a video costs beside its bytes: n GPUs take 1 + 0.016 (n - 1) times the floor's time (Amdahl's law).
# From the 86 % on 8 GPUs of LightX2V's README. With it Ulysses over 2, 4 and 8 GPUs has 97, 93 and 87 % at 720p; Wan2.1's table
# has 97, 92 and 80, decoding included. Nothing is published for more than 8 GPUs.
SERIAL_SHARE = 0.016
READ_GB_PER_SECOND = 2.0  # of weights from a shared disk, an estimate; each element reads them once per node
START_SECONDS = 60.0  # imports, CUDA, NCCL, an estimate
NEARLY_AS_FAST = 1.05  # a plan this close to the fastest one may win by fewer GPU-hours
MAX_NODES = 8  # of one video

Rule = Literal["heads", "ring", "memory", "walltime", "order"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    tflops: float  # bfloat16, 0.8 of the data sheet's dense peak: what large products reach at best
    share: float  # of the floor that one GPU reaches, as published for Wan2.1-14B: see below
    memory_gb: float
    nvlink_gb_per_second: float  # to the other GPUs of the node, one way


# Rates are of NVIDIA's data sheets, SXM forms, with dense bfloat16 peaks of 989, 989, 312, 312 and 148 TFLOP/s.
# Shares: Diffusers, whose layers these are, has 0.43 on an H100 (LightX2V's README: 9.77 s a step of Wan2.1-14B at 480p),
# Wan2.1 itself 0.45 (table of its README: 1837.9 s, 720p), LightX2V, the best, 0.82. An H200 computes as fast. A100 and H20 are
# from Wan2.1's table, too (3342.6 and 6935.5 s).
GPUS = {
    "H100": Gpu(tflops=790, share=0.43, memory_gb=80, nvlink_gb_per_second=450),
    "H200": Gpu(tflops=790, share=0.43, memory_gb=141, nvlink_gb_per_second=450),
    "A100": Gpu(tflops=250, share=0.78, memory_gb=80, nvlink_gb_per_second=300),
    "A100-40GB": Gpu(tflops=250, share=0.78, memory_gb=40, nvlink_gb_per_second=300),
    "H20": Gpu(tflops=118, share=0.80, memory_gb=96, nvlink_gb_per_second=450),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The nodes that one may use at once."""

    gpu: Gpu
    num_nodes: int
    gpus_per_node: int
    nics_per_node: int = 1

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one element gets, as the cluster file says it. Its ranks make one video at a time."""

    nodes: int
    gpus_per_node: int

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{{nodes: {self.nodes}, gpus_per_node: {self.gpus_per_node}}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is left to do, and how long it may take."""

    sizes: Sizes
    settings: VideoConfig
    num_items: int
    max_elements: int  # an identity is never divided
    timeout_minutes: float  # of an element
    deadline_hours: float = math.inf
    shards: tuple[int, ...] = ()  # items of each element, where they are frozen; empty: the planner divides
    share: float  # of the floor that one GPU reaches: Gpu.share, or measured_share()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """One denoising step, at the rates of the hardware."""

    compute: float
    all_to_all: float  # of Ulysses; nothing hides it
    ring: float  # what attention does not hide of it

    @property
    def total(self) -> float:
        return self.compute + self.all_to_all + self.ring


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a split is not offered."""

    rule: Rule
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to make what is left, and its price."""

    shape: Shape
    split: Degrees
    replicas: int  # elements, and so videos, at once
    num_elements: int
    floor_step_seconds: float
    step_seconds: float  # expected, as all that follows
    video_seconds: float  # denoising; encoding its condition is in measured seconds, decoding runs beside the next video
    element_minutes: float  # the longest element, start-up included
    gpu_hours: float  # start-up included
    makespan_hours: float  # first start to last end, no waiting in the queue
    memory: MemoryGb  # of each GPU, at least
    efficiency: float  # share of what its GPUs could compute
    refusal: Refusal | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All ways that were weighed."""

    ranked: tuple[Candidate, ...]  # what can be done, best first
    refused: tuple[Candidate, ...]  # narrowest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A video that was made, from its record."""

    seconds: float
    num_ranks: int


# ---- the choice


def plan_splits(work: Work, machine: Machine) -> Plan:
    """Every split of every element that the machine can give, ranked by best().

    Elements are a part of a node that divides it, or whole nodes. The ranks of an element take the split that degrees()
    finds; others of the same ranks are listed as refused.
    """
    candidates = [
        price(work, machine, shape, split)
        for shape in _shapes(machine)
        for split in _splits(shape, guided=_guided(work.settings))
    ]
    ranked, left = [], [one for one in candidates if one.refusal is None]
    while left:
        ranked.append(best(left, work.deadline_hours))
        left.remove(ranked[-1])
    return Plan(ranked=tuple(ranked), refused=tuple(one for one in candidates if one.refusal is not None))


def best(candidates: Sequence[Candidate], deadline_hours: float = math.inf) -> Candidate:
    """The one with the fewest GPU-hours, of those that meet the deadline; without one, of those that are nearly the fastest.

    If none meets the deadline, the fastest. Narrow elements need fewer GPU-hours, so they win while there are videos for all
    GPUs; with fewer videos than that, wide ones are faster.
    """
    fastest = min(candidates, key=lambda one: (one.makespan_hours, one.gpu_hours))
    limit = fastest.makespan_hours * NEARLY_AS_FAST if math.isinf(deadline_hours) else deadline_hours
    enough = [one for one in candidates if one.makespan_hours <= limit] or [fastest]
    return min(enough, key=lambda one: (one.gpu_hours, one.makespan_hours))


def price(work: Work, machine: Machine, shape: Shape, split: Degrees, max_at_once: int | None = None) -> Candidate:
    """What it costs to make what is left on elements of this shape; at most `max_at_once` of them run together."""
    floor = step_seconds(work.sizes, work.settings, split, machine, shape.nodes).total
    expected = floor * slowdown(split, work.share)
    video = expected * work.settings.num_inference_steps
    slots = machine.num_nodes // shape.nodes * (machine.gpus_per_node // shape.gpus_per_node)
    replicas = max(1, min(slots, max_at_once or slots, len(work.shards) or work.max_elements, work.num_items))
    start = start_seconds(work.sizes, work.settings)
    items = work.shards or _even_shards(work, replicas, start, video)
    busy = sum(start + count * video for count in items)
    memory = memory_gb(work.sizes, work.settings, split)
    flops = num_forwards(work.settings) * forward_flops(work.sizes, work.settings)
    return Candidate(
        shape=shape,
        split=split,
        replicas=replicas,
        num_elements=len(items),
        floor_step_seconds=floor,
        step_seconds=expected,
        video_seconds=video,
        element_minutes=(start + max(items, default=0) * video) / 60,
        gpu_hours=busy * split.world_size / 3600,
        makespan_hours=makespan([start + count * video for count in items], replicas) / 3600,
        memory=memory,
        efficiency=flops / (machine.gpu.tflops * 1e12) / split.world_size / expected,
        refusal=_refusal(work, machine, shape, split, (start + video) / 60),
    )


def makespan(seconds: Sequence[float], at_once: int) -> float:
    """When the last of these elements ends, if each starts, in their order, as soon as one of `at_once` places is free."""
    ends = [0.0] * min(at_once, len(seconds))
    for one in seconds:
        heapq.heappush(ends, heapq.heappop(ends) + one)
    return max(ends, default=0.0)


def start_seconds(sizes: Sizes, settings: VideoConfig) -> float:
    """Until an element denoises its first video; an estimate."""
    return START_SECONDS + count_parameters(sizes) * BYTES[settings.dtype] / 1e9 / READ_GB_PER_SECOND


def _even_shards(work: Work, replicas: int, start: float, video: float) -> tuple[int, ...]:
    """Items of each element: the same number of elements for each replica, as few as end within the walltime limit."""
    each = math.ceil(work.num_items / replicas)
    fit = max(1, int((work.timeout_minutes * 60 - start) / video))
    waves = max(1, min(math.ceil(each / fit), work.max_elements // replicas))
    num_elements = min(replicas * waves, work.num_items)
    return tuple(len(range(index, work.num_items, num_elements)) for index in range(num_elements))


def _shapes(machine: Machine) -> Iterator[Shape]:
    for gpus in divisors(machine.gpus_per_node):
        yield Shape(nodes=1, gpus_per_node=gpus)
    for nodes in range(2, min(machine.num_nodes, MAX_NODES) + 1):
        yield Shape(nodes=nodes, gpus_per_node=machine.gpus_per_node)


def _splits(shape: Shape, *, guided: bool) -> Iterator[Degrees]:
    for cfg in (2, 1) if guided and shape.num_gpus % 2 == 0 else (1,):
        sequence = shape.num_gpus // cfg
        for ulysses in reversed(divisors(sequence)):
            yield Degrees(cfg=cfg, ulysses=ulysses, ring=sequence // ulysses)


# ---- refusals


def _refusal(work: Work, machine: Machine, shape: Shape, split: Degrees, minutes: float) -> Refusal | None:
    """The first rule that speaks against a split, or None. `minutes`: start-up and one video."""
    heads, guided = work.sizes["num_attention_heads"], _guided(work.settings)
    try:
        check_degrees(split, shape.num_gpus, heads, guided=guided, num_nodes=shape.nodes)
    except ValueError as error:
        return Refusal(rule="heads", reason=str(error).removeprefix(f"{split}: "))
    senders = ring_senders(split, shape.gpus_per_node)
    if senders and machine.nics_per_node < machine.gpus_per_node:
        found = f"found nics_per_node {machine.nics_per_node} for {machine.gpus_per_node} GPUs"
        return Refusal(rule="ring", reason=f"a ring over nodes needs a network card for each GPU, {found}")
    if senders and split.ulysses == 1 and shape.gpus_per_node > 1:
        return Refusal(rule="ring", reason="a ring over nodes without ulysses would send all keys and values between them")
    need = memory_gb(work.sizes, work.settings, split)
    if need.total > machine.gpu.memory_gb:
        return Refusal(rule="memory", reason=f"needs at least {need} on each GPU, found {machine.gpu.memory_gb:g} GB")
    if minutes > work.timeout_minutes:
        found = f"start-up and one video take {minutes:.0f} minutes, timeout_minutes is {work.timeout_minutes:g}"
        return Refusal(rule="walltime", reason=f"{found}: no element would finish a video")
    taken = degrees(shape.num_gpus, shape.nodes, heads, guided=guided)  # there is one: this split is legal
    return None if split == taken else Refusal(rule="order", reason=f"would work, but these ranks take {taken}")


# ---- seconds


def step_seconds(
    sizes: Sizes, settings: VideoConfig, split: Degrees, machine: Machine, num_nodes: int = 1, *, overlapped: bool = True
) -> StepSeconds:
    """One step at the rates of the hardware: compute at the GPUs' rate, all-to-all exposed, the ring behind attention.

    A ring passes R - 1 blocks on while it attends over R, so (R - 1) / R of attention can hide it, if `overlapped`.
    A node's network cards are shared by the ranks that send at once. All-to-all inside and between nodes overlap.
    """
    per_node, num = split.world_size // num_nodes, num_forwards(settings)
    rate = machine.gpu.tflops * 1e12 * split.world_size / num
    cards = machine.nics_per_node * NIC_GB_PER_SECOND * per_node / machine.gpus_per_node  # this element's part of them
    nvlink = machine.gpu.nvlink_gb_per_second
    swapped, passed = (num / split.cfg * sent(sizes, settings, split) / 1e9 for sent in (ulysses_bytes, ring_bytes))

    away = max(0, split.ulysses - per_node) / max(1, split.ulysses - 1)  # part of a rank's all-to-all that leaves the node
    all_to_all = max(swapped * (1 - away) / nvlink, swapped * away / min(NIC_GB_PER_SECOND, cards / per_node))
    senders = ring_senders(split, per_node)
    ring = passed / (min(NIC_GB_PER_SECOND, cards / senders) if senders else nvlink)
    hidden = attention_flops(sizes, settings) / rate * (split.ring - 1) / split.ring if overlapped else 0.0
    return StepSeconds(compute=forward_flops(sizes, settings) / rate, all_to_all=all_to_all, ring=max(0.0, ring - hidden))


def slowdown(split: Degrees, share: float) -> float:
    """Expected seconds over those of the floor."""
    return (1 + SERIAL_SHARE * (split.world_size - 1)) / share


def measured_share(measured: Sequence[Measured], sizes: Sizes, settings: VideoConfig, machine: Machine) -> float:
    """Share of the floor on one GPU, as the videos of a run tell it: the median, so that a few odd ones do not matter.

    Videos of more ranks than a node has are taken to be made on whole nodes; where those ranks would have no split, they do not
    count. Raises ValueError if no video is left.
    """
    shares = []
    for video in measured:
        num_nodes = max(1, video.num_ranks // machine.gpus_per_node)
        try:
            split = degrees(video.num_ranks, num_nodes, sizes["num_attention_heads"], guided=_guided(settings))
        except ValueError:
            continue
        step = step_seconds(sizes, settings, split, machine, num_nodes).total * slowdown(split, 1.0)
        shares.append(step * settings.num_inference_steps / video.seconds)
    if not shares:
        raise ValueError(f"found {len(measured)} videos, none of a known split, expected at least one to measure by")
    return statistics.median(shares)


def ring_senders(split: Degrees, per_node: int) -> int:
    """Most ranks of a node that send their keys and values to another node; 0 if every ring stays inside a node."""
    senders: dict[int, int] = {}
    for rank in range(split.world_size):
        within = rank % split.sequence
        successor = rank - within + (within + split.ulysses) % split.sequence
        if successor // per_node != rank // per_node:
            senders[rank // per_node] = senders.get(rank // per_node, 0) + 1
    return max(senders.values(), default=0)


# ---- FLOP and bytes: the layers as diffusers' WanVACETransformer3DModel has them, with the sizes of transformer/config.json


def num_tokens(sizes: Sizes, settings: VideoConfig) -> int:
    """L, as the transformer sees the video: (1 + (F-1)/4 + references) x H/16 x W/16 for the published patch of 1x2x2."""
    depth, height, width = sizes["patch_size"]
    frames = (settings.num_frames - 1) // 4 + 1 + (settings.condition != "first_frame")  # a reference is one more
    return frames // depth * (settings.height // 8 // height) * (settings.width // 8 // width)


def num_forwards(settings: VideoConfig) -> int:
    """Of the transformer in a step: with guidance one with the prompt and one without."""
    return 2 if _guided(settings) else 1


def forward_flops(sizes: Sizes, settings: VideoConfig) -> float:
    """Multiplications and additions of one forward; norms, softmax and the like, below 0.1 %, are left out.

    L tokens, T of text, width d, inner width f of the feed-forward. A product of [L,a] and [a,b] is 2 L a b.
    Block: self-attention 2L(4d^2) + 4L^2 d, cross-attention 2L(2d^2) + 2T(2d^2) + 4LTd, feed-forward 2L(2df).
    VACE blocks: each a block and a projection 2Ld^2 for its hint, the first one more for its input. The rest is embeddings.
    """
    num_blocks = sizes["num_layers"] + len(sizes["vace_layers"])
    num_projections = len(sizes["vace_layers"]) + 1
    length, text, width = num_tokens(sizes, settings), settings.max_text_tokens, _width(sizes)
    block = 12 * length * width**2 + 4 * text * width**2 + 4 * length * text * width + 4 * length * width * sizes["ffn_dim"]
    projections = num_projections * 2 * length * width**2
    channels = sizes["in_channels"] + sizes["vace_in_channels"] + (sizes["out_channels"] or sizes["in_channels"])
    patches = 2 * length * channels * math.prod(sizes["patch_size"]) * width
    texts = 2 * text * (sizes["text_dim"] + width) * width
    time = 2 * (sizes["freq_dim"] + 7 * width) * width
    return num_blocks * block + attention_flops(sizes, settings) + projections + patches + texts + time


def attention_flops(sizes: Sizes, settings: VideoConfig) -> float:
    """Of one forward's self-attentions: queries with keys and scores with values, 2 L^2 d each, in every block."""
    num_blocks = sizes["num_layers"] + len(sizes["vace_layers"])
    return num_blocks * 4.0 * num_tokens(sizes, settings) ** 2 * _width(sizes)


def ulysses_bytes(sizes: Sizes, settings: VideoConfig, split: Degrees) -> float:
    """That a rank sends in one forward: queries, keys, values and the result of its tokens, all but its own heads' part."""
    return 4 * _tensor_bytes(sizes, settings, split) * (split.ulysses - 1) / split.ulysses


def ring_bytes(sizes: Sizes, settings: VideoConfig, split: Degrees) -> float:
    """That a rank sends in one forward: keys and values, own ones and those passed on. A CFG pair's one latent is nothing."""
    return 2 * _tensor_bytes(sizes, settings, split) * (split.ring - 1)


def _tensor_bytes(sizes: Sizes, settings: VideoConfig, split: Degrees) -> float:
    """Queries of a rank, in all blocks."""
    num_blocks = sizes["num_layers"] + len(sizes["vace_layers"])
    return num_blocks * num_tokens(sizes, settings) / split.sequence * _width(sizes) * BYTES[settings.dtype]


def _width(sizes: Sizes) -> int:
    return int(sizes["num_attention_heads"] * sizes["attention_head_dim"])


def _guided(settings: VideoConfig) -> bool:
    return settings.guidance_scale > 1
