"""What `plan` says about cost: asks cost.py, and the run's records for what its videos took. Decides and submits nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from ipt2v import hdf5
from ipt2v.models.catalogue import transformer_sizes
from ipt2v.models.vace.degrees import Degrees, degrees
from ipt2v.models.vace.memory import Sizes
from launch.cluster import Cluster
from launch.cost import (
    GPUS,
    Candidate,
    Machine,
    Measured,
    Plan,
    Shape,
    Work,
    forward_flops,
    measured_share,
    num_forwards,
    plan_splits,
    price,
)
from launch.freeze import Prepared

MAX_MEASURED = 64  # records that are read to measure by
NUM_NEXT = 2  # further ways that are shown beside the best


def cost_lines(
    prepared: Prepared, site: Cluster, shards: tuple[int, ...], *, deadline_hours: float = math.inf, every: bool = False
) -> list[str]:
    """What the missing videos of `shards` cost as the cluster file has it, and in better and refused ways; all, if `every`.

    Where the hardware is not known, what is known without it.
    """
    missing = {count.shard: count.missing for count in prepared.counts() if count.stage == "video"}
    head = _head(prepared, sum(missing[shard] for shard in shards))
    try:
        machine = machine_of(site, len(shards))
    except ValueError as error:
        return [head, f"       seconds are not known: {error}"]
    share, source = _share(prepared, machine)
    work = replace(_work(prepared, site, tuple(missing[shard] for shard in shards), share), deadline_hours=deadline_hours)
    now, found = _now(site, work, machine), plan_splits(_planned(prepared, work), machine)
    ranked = found.ranked if every else found.ranked[: 1 + NUM_NEXT]
    # of a run that is there, nobody can change the number of shards
    elements = "elements" if prepared.run.root.exists() else "num_shards"
    notes = _notes(site, work, source)
    if any(one.replicas > site.video.array_parallelism for one in ranked):
        notes.append("       array_parallelism of the video stage must be as large as `at once`")
    return [
        f"{head}; {machine.num_gpus} {site.hardware.gpu} at once",
        *notes,
        _header(elements),
        _priced("now", now),
        *(_priced("next" if index else "best", one) for index, one in enumerate(ranked)),
        *_refused(found, every=every),
        *(f"  warning: {text}" for text in warnings(now, found, work)),
    ]


def machine_of(site: Cluster, num_elements: int) -> Machine:
    """The nodes that `num_elements` may use at once. Raises ValueError, with what to set, if the cluster file does not say."""
    hardware, video = site.hardware, site.video
    if not video.gpus_per_node:
        raise ValueError("the cluster file gives a video no GPUs; set video.gpus_per_node")
    if video.num_tasks_per_node != video.gpus_per_node:
        found = f"video has {video.num_tasks_per_node} tasks and {video.gpus_per_node} GPUs on a node"
        raise ValueError(f"{found}; prices are for one task on each GPU")
    if hardware.gpu not in GPUS:
        found = "does not name the GPUs" if hardware.gpu is None else f"names a GPU {hardware.gpu} that has no rates here"
        raise ValueError(f"the cluster file {found}; set hardware.gpu to one of {', '.join(GPUS)}")
    gpus_per_node = hardware.gpus_per_node or video.gpus_per_node
    nodes_together = -(-min(video.array_parallelism, num_elements) // (gpus_per_node // video.gpus_per_node)) * video.nodes
    return Machine(
        gpu=GPUS[hardware.gpu],
        num_nodes=hardware.num_nodes or nodes_together,
        gpus_per_node=gpus_per_node,
        nics_per_node=hardware.nics_per_node,
    )


def _head(prepared: Prepared, num_items: int) -> str:
    settings, sizes = prepared.config.video, _sizes(prepared)
    flops = forward_flops(sizes, settings) * num_forwards(settings) * settings.num_inference_steps
    size = f"{settings.width}x{settings.height}x{settings.num_frames}, {settings.num_inference_steps} steps"
    guided = ", guided" if num_forwards(settings) == 2 else ""
    return f"cost   {num_items} videos left, {flops / 1e15:.3g} PFLOP each ({size}{guided})"


def _work(prepared: Prepared, site: Cluster, missing: tuple[int, ...], share: float) -> Work:
    """`missing` videos of each element, as they are divided now."""
    return Work(
        sizes=_sizes(prepared),
        settings=prepared.config.video,
        num_items=sum(missing),
        max_elements=len({item.identity for items in prepared.shards for item in items}),
        timeout_minutes=site.video.timeout_minutes,
        shards=missing,
        share=share,
    )


def _sizes(prepared: Prepared) -> Sizes:
    return transformer_sizes(Path(prepared.environment.weights_dir), prepared.config)


def measured(prepared: Prepared) -> list[Measured]:
    """Videos that this run has made on GPUs, at most MAX_MEASURED of them; none of a run that is not there."""
    found: list[Measured] = []
    for shard, items in enumerate(prepared.shards if prepared.run.root.exists() else ()):
        for key, path in prepared.run.record_paths("video", shard, [item.key for item in items]).items():
            if len(found) == MAX_MEASURED:
                return found
            try:
                made = hdf5.load_provenance(path, key, run_digest=prepared.environment.run_digest)
            except FileNotFoundError:
                continue  # a job has just sealed its shard
            if made.device.startswith("cuda"):  # a rehearsal on a CPU says nothing about GPUs
                found.append(Measured(seconds=made.seconds, num_ranks=made.num_ranks))
    return found


def warnings(now: Candidate, found: Plan, work: Work) -> list[str]:
    """What will go wrong if the cluster file stays as it is."""
    texts = []
    if now.refusal is not None:
        texts.append(f"as the cluster file has it: {now.refusal.reason}")
    elif now.element_minutes > work.timeout_minutes:
        texts.append(
            f"the longest element takes {now.element_minutes:.0f} minutes, timeout_minutes is {work.timeout_minutes:g}; "
            "finished videos stay, and submitting again goes on with the rest"
        )
    if now.makespan_hours > work.deadline_hours:
        first = found.ranked[0].makespan_hours if found.ranked else math.inf
        met = first <= work.deadline_hours
        other = f"the best way takes {_digits(first)}" if met else "no way meets it: more nodes, fewer steps or a smaller video"
        texts.append(f"{_digits(now.makespan_hours)} hours are more than the {work.deadline_hours:g} of --deadline; {other}")
    if found.ranked and found.ranked[0].element_minutes > work.timeout_minutes:
        minutes = math.ceil(found.ranked[0].element_minutes)
        texts.append(f"the best way ends in one go with timeout_minutes: {minutes}")
    if not found.ranked:
        texts.append("no split of these GPUs can make the videos; the reasons are above")
    return texts


def _planned(prepared: Prepared, work: Work) -> Work:
    """The shards of a new run are not frozen yet: the planner may divide its items otherwise."""
    return work if prepared.run.root.exists() else replace(work, shards=())


def _now(site: Cluster, work: Work, machine: Machine) -> Candidate:
    video = site.video
    heads, guided = work.sizes["num_attention_heads"], num_forwards(work.settings) == 2
    split = degrees(video.num_tasks, video.nodes, heads, guided=guided)
    shape = Shape(nodes=video.nodes, gpus_per_node=video.gpus_per_node)
    return price(work, machine, shape, split, video.array_parallelism)


def _share(prepared: Prepared, machine: Machine) -> tuple[float, str]:
    """Share of the floor that one GPU reaches, and how we know."""
    videos = measured(prepared)
    try:
        share = measured_share(videos, _sizes(prepared), prepared.config.video, machine)
        return share, f"measured on {len(videos)} videos of this run"
    except ValueError:  # it has none yet
        return machine.gpu.share, "as published; the best has 0.82 on an H100"


def _notes(site: Cluster, work: Work, source: str) -> list[str]:
    """Where the seconds come from, and what they leave out."""
    rate = f"{GPUS[site.hardware.gpu or ''].tflops:g} TFLOP/s"
    lines = [f"s/step is the floor, at {rate}, over {work.share:.2g} ({source}), more for each further GPU"]
    if site.hardware.num_nodes is None:
        lines.append("hardware.num_nodes is not set: taken are as many nodes as the elements of the cluster file use at once")
    left_out = {
        "what sharded weights send": work.settings.weights_sharding != "none",
        "what the step cache saves": work.settings.step_cache.threshold > 0,
    }
    if any(left_out.values()):
        lines.append(f"not counted: {' and '.join(name for name, is_on in left_out.items() if is_on)}")
    return [f"       {line}" for line in lines]


def _header(elements: str) -> str:
    return _row("", "", elements, "cfg x ulysses x ring", "at once", "s/step", "floor", "s/video", "GPU-h", "hours", "GB/GPU")


def _priced(tag: str, one: Candidate) -> str:
    return _row(
        tag,
        f"video: {one.shape}",
        one.num_elements,
        _short(one.split),
        one.replicas,
        _digits(one.step_seconds),
        _digits(one.floor_step_seconds),
        f"{one.video_seconds:.0f}",
        f"{one.gpu_hours:.1f}",
        _digits(one.makespan_hours),
        f"{one.memory.total:.1f}",
    )


def _row(tag: str, shape: str, elements: object, split: str, *numbers: object) -> str:
    columns = "".join(f" {number!s:>{width}}" for number, width in zip(numbers, (7, 6, 6, 7, 8, 6, 6), strict=True))
    return f"  {tag:<5}{shape:<36}{elements!s:>10}  {split:<20}{columns}"


def _refused(found: Plan, *, every: bool) -> list[str]:
    """A line for each refused split, or for the first that each rule refuses."""
    firsts = {one.refusal.rule: one for one in reversed(found.refused) if one.refusal and one.refusal.rule != "order"}
    shown = found.refused if every else sorted(firsts.values(), key=lambda one: one.shape.num_gpus)
    lines = []
    for one in shown:
        assert one.refusal is not None
        floor = f" (floor {_digits(one.floor_step_seconds)} s/step)" if every else ""
        lines.append(f"  no   video: {one.shape!s:<29}{_short(one.split)}{floor}: {one.refusal.reason}")
    hidden = len(found.ranked) + len(found.refused) - 1 - NUM_NEXT - len(shown)
    return [*lines, *([f"       {hidden} more ways: --splits"] if not every and hidden > 0 else [])]


def _digits(number: float) -> str:
    """Three of them: 0.669, 3.20, 11.0, 597."""
    return f"{number:#.3g}".rstrip(".") if number < 1000 else f"{number:.0f}"


def _short(split: Degrees) -> str:
    return f"{split.cfg} x {split.ulysses} x {split.ring}"
