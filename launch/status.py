"""How a run stands: counts, rates, what was used, until when, what failed. From record files; squeue adds the queue."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime

from ipt2v.records import Failure, reason_kind
from ipt2v.run_dir import RunDir, StageCount
from launch import controller
from launch.controller import NoAnswer
from launch.fault_text import printable, span, unit_of
from launch.measure import Measured, measure
from launch.progress import all_keys, count_all, shard_lines, summary
from launch.queue import Submitted, settle_if_known, states, submissions
from launch.rates import (
    SHORTEST_PAUSE_SECONDS,
    Element,
    Estimate,
    Rates,
    Used,
    estimate_by_rate,
    estimate_own,
    estimate_shared,
    later,
    pace,
    rates,
    used,
)

MAX_REASONS = 5
RUNNING = {"RUNNING", "COMPLETING", "CONFIGURING"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """What of a run is in the queue."""

    live: Mapping[tuple[str, int], str]  # (stage, shard) -> state
    starts: Mapping[tuple[str, int], float]  # when SLURM expects elements that wait to start, in seconds of Unix time
    at_once: Mapping[str, int]  # stage -> elements that may run at the same time; not there if nobody says
    has_driver: bool  # elements are started one after the other by `--on local`, and are in no queue before
    lost: str  # what is not known, and why


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLook:
    """One stage at one moment."""

    stage: str
    done: int
    failed: int
    missing: int
    num_sampled: int  # records that were opened
    rates: Rates | None
    seconds_per_item: float | None  # median
    used: Used
    last_finished: float | None  # seconds of Unix time
    estimate: Estimate | None  # until nothing is missing
    basis: str  # of the estimate, or why there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Failures of one kind."""

    stage: str
    num_items: int
    key: str  # of one of them
    text: str  # of the same one


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A run at one moment."""

    run: RunDir
    at: float  # seconds of Unix time
    counts: tuple[StageCount, ...]
    stages: tuple[StageLook, ...]
    queue: Queue
    reasons: tuple[Reason, ...]  # the most frequent first


@dataclass(slots=True, kw_only=True)
class Memory:
    """What need not be read twice by one who looks at a run again and again."""

    keys: dict[int, tuple[str, ...]] = field(default_factory=dict)  # of each shard: they never change
    measured: dict[str, Measured] = field(default_factory=dict)  # of each stage: anew when it has done more


def look_at(run: RunDir, queue: Queue, memory: Memory) -> Look:
    """All that `status` says."""
    memory.keys, now = memory.keys or all_keys(run), time.time()
    counts, measured = count_all(run, memory.keys), memory.measured
    stages = run.stages()
    for stage in stages:
        num_done = sum(count.done for count in counts if count.stage == stage)
        if stage not in measured or measured[stage].num_done != num_done:
            measured[stage] = measure(run, stage, counts, memory.keys)
    found: list[StageLook] = []
    for stage in stages:
        found.append(_look_at_stage(stage, counts, measured[stage], queue, (now, found[-1] if found else None)))
    reasons = tuple(group_reasons(run.failures()))
    return Look(run=run, at=now, counts=tuple(counts), stages=tuple(found), queue=queue, reasons=reasons)


def look_at_queue(run: RunDir) -> Queue:
    """Ask squeue, if anything was submitted to SLURM; without an answer only this machine's processes are known."""
    settle_if_known(run)
    known, lost = submissions(run), ""
    try:
        found = states(known)
    except NoAnswer as error:
        lost = f"squeue does not answer: the queue is not known ({printable(str(error), 120)})"
        found = states(one for one in known if one.place != "slurm")
    elements = {one.element(index): (one.stage, shard) for one in known for index, shard in enumerate(one.shards)}
    living = [one for one in known if any(one.element(index) in found for index in range(len(one.shards)))]
    starts = _expected_starts([one.job_id for one in living if one.place == "slurm"] if "PENDING" in found.values() else [])
    return Queue(
        live={place: found[element] for element, place in elements.items() if element in found},
        starts={elements[one]: at for one, at in starts.items() if found.get(one) == "PENDING" and one in elements},
        at_once=_at_once(run, living),
        has_driver=any(one.place == "local" for one in living),
        lost=lost,
    )


def group_reasons(failures: Iterable[Failure]) -> list[Reason]:
    """Failures by stage and kind of reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        groups.setdefault((failure.stage, reason_kind(failure.reason, failure.key)), []).append(failure)
    reasons = [
        Reason(stage=stage, num_items=len(alike), key=alike[0].key, text=alike[0].reason)
        for (stage, _), alike in groups.items()
    ]
    return sorted(reasons, key=lambda one: -one.num_items)


def status_lines(look: Look) -> list[str]:
    """A run for a terminal, or a file: shards, rates, reasons, queue, totals."""
    return [
        *shard_lines(list(look.counts), look.queue.live),
        "",
        *rate_lines(look),
        "",
        *reason_lines(look),
        *queue_lines(look),
        summary(list(look.counts)),
    ]


def rate_rows(look: Look) -> list[tuple[str, ...]]:
    """Head and a row for each stage: what the table of rates has in its columns."""
    rows: list[tuple[str, ...]] = [("", "items/h, last hour", "overall", "s/item", "used", "per item", "ready in")]
    for one in look.stages:
        about = "" if one.num_sampled >= one.done else "~"
        speed = (about + number(one.rates.last_hour), about + number(one.rates.overall)) if one.rates else ("-", "-")
        seconds = "-" if one.seconds_per_item is None else about + number(one.seconds_per_item)
        per_item = "-" if not one.num_sampled else about + hours(one.used, 1 / one.done)
        all_used = "-" if not one.num_sampled else about + hours(one.used, 1)
        rows.append((one.stage, *speed, seconds, all_used, per_item, ready_in(one)))
    return rows


def rate_lines(look: Look) -> list[str]:
    """The table of rates, and what it rests on."""
    rows = rate_rows(look)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells, row[-1]]).rstrip())
    return [*lines, *note_lines(look)]


def note_lines(look: Look) -> list[str]:
    """What the numbers rest on, where that is not all there is."""
    lines = []
    sampled = [f"{one.num_sampled} of {one.done:,} {one.stage}" for one in look.stages if 0 < one.num_sampled < one.done]
    if sampled:
        lines.append(f"~ is about: from {' and '.join(sampled)} records, evenly spread")
    if any(one.missing and one.estimate for one in look.stages):
        lines.append("ready in: by item times; loading models, which each element does once, is not in it")
    for one in look.stages:
        if one.missing and one.last_finished is not None:
            lines.append(f"{one.stage}: the last was finished {span(look.at - one.last_finished)} ago")
    return lines


def reason_lines(look: Look) -> list[str]:
    """Why items failed: the MAX_REASONS most frequent reasons. Nothing of them moves a terminal's cursor."""
    lines = []
    for one in look.reasons[:MAX_REASONS]:
        key, text = printable(one.key), printable(one.text)
        if one.num_items == 1:
            lines.append(f"failed: {key} ({one.stage}): {text}")
        else:
            lines.append(f"failed: {one.num_items} items ({one.stage}), {key} for one: {text}")
    left = look.reasons[MAX_REASONS:]
    if left:
        num_items = sum(one.num_items for one in left)
        lines.append(f"... and {num_items} more for {len(left)} other reasons, below {look.run.root / 'failure'}")
    return lines


def queue_lines(look: Look) -> list[str]:
    """How many elements are in which state, when the next is expected, and what is not known."""
    lines = []
    by_state = Counter((stage, state) for (stage, _), state in look.queue.live.items())
    if by_state:
        texts = [f"{num} {stage} {state.lower()}" for (stage, state), num in sorted(by_state.items())]
        lines.append(f"queue: {', '.join(texts)}")
    if look.queue.starts:
        lines.append(f"queue: SLURM expects the next to start in {span(min(look.queue.starts.values()) - look.at)}")
    return [*lines, *([look.queue.lost] if look.queue.lost else [])]


def ready_in(one: StageLook) -> str:
    """3.1 to 4.4 h (2 run, 3 wait)."""
    if not one.missing:
        return "nothing is missing" if one.done + one.failed else "nothing to make"
    if one.estimate is None:
        return one.basis
    low, high = one.estimate.low_seconds, one.estimate.high_seconds
    unit, size = unit_of(high)
    # nobody counts parts of a second
    first, last = (number(low / size), number(high / size)) if size > 1 else (f"{low:.0f}", f"{math.ceil(high)}")
    text = f"{first} to {last} {unit}"
    if first == last:
        text = f"about {last} {unit}"
    elif low < high / 20:
        text = f"at most {last} {unit}"
    return f"{text} ({one.basis})"


def json_rows(counts: Iterable[StageCount], queue: Queue) -> list[dict[str, object]]:
    """For programs: every stage of every shard, and its state in the queue."""
    return [asdict(count) | {"queue": queue.live.get((count.stage, count.shard), "")} for count in counts]


def as_json(look: Look) -> dict[str, object]:
    """For programs: the rows, and the rest."""
    return {
        "shards": json_rows(look.counts, look.queue),
        "stages": [asdict(one) for one in look.stages],
        "failures": [asdict(one) for one in look.reasons],
        "queue": {
            "not_known": look.queue.lost,
            "expected_starts": [
                {"stage": stage, "shard": shard, "at": at} for (stage, shard), at in sorted(look.queue.starts.items())
            ],
        },
    }


def number(value: float) -> str:
    """Three digits where they mean something: 0.003, 4.53, 81.2, 1,240."""
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:,.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def hours(one: Used, share: float) -> str:
    """GPU-hours, and apart from them rank-hours: one rank on a CPU for an hour."""
    parts = [f"{number(one.gpu_hours * share)} GPU-h"] if one.gpu_hours else []
    if one.cpu_rank_hours or not parts:
        parts.append(f"{number(one.cpu_rank_hours * share)} rank-h")
    return " + ".join(parts)


def _look_at_stage(
    stage: str, counts: Sequence[StageCount], measured: Measured, queue: Queue, when: tuple[float, StageLook | None]
) -> StageLook:
    """One stage; `when`: the time now, and the stage that comes before, if there is one."""
    mine = [count for count in counts if count.stage == stage]
    speed, sampled = rates(measured.finished, measured.sampled), measured.sampled
    seconds = sorted(one.seconds for one in sampled)
    last = max((one.at for one in measured.finished), default=None)
    estimate, basis = _estimate(mine, measured, speed, queue, when)
    return StageLook(
        stage=stage,
        done=sum(count.done for count in mine),
        failed=sum(count.failed for count in mine),
        missing=sum(count.missing for count in mine),
        num_sampled=len(sampled),
        rates=speed,
        seconds_per_item=(seconds[len(seconds) // 2] + seconds[(len(seconds) - 1) // 2]) / 2 if seconds else None,
        used=used(sampled, measured.num_done),
        last_finished=last,
        estimate=estimate,
        basis=basis,
    )


def _estimate(
    counts: Sequence[StageCount], measured: Measured, speed: Rates | None, queue: Queue, when: tuple[float, StageLook | None]
) -> tuple[Estimate | None, str]:
    """Until nothing of a stage is missing, and on what that rests; or None, and why not."""
    now, before = when
    each = pace(measured.sampled)
    missing = sum(count.missing for count in counts)
    if not missing:
        return Estimate(low_seconds=0, high_seconds=0), "nothing is missing"
    if each is None or speed is None:
        return None, "no estimate yet: nothing finished"
    waits_for = before if before is not None and before.missing else None
    if waits_for is not None and waits_for.estimate is None:
        return None, f"no estimate: there is none for {waits_for.stage}"
    elements = _elements(counts, queue, now, waits_for)
    stage = counts[0].stage
    if stage != "video":
        elements = [one for one in elements if one.missing]
    if not elements:
        estimate, basis = _estimate_without_queue(missing, measured, speed, queue, now)
    else:
        running = sum(one.is_running for one in elements)
        at_once = queue.at_once.get(stage, max(1, running) if queue.has_driver else len(elements))
        if stage != "video":  # videos alone are made by whoever has time
            estimate = estimate_own(elements, each, at_once)
        else:
            estimate = estimate_shared(missing, elements, each, at_once)
        basis = f"{running} run, {len(elements) - running} wait"
        left = missing - sum(one.missing for one in elements)
        if stage != "video" and left:
            basis += f"; {left} items are not in the queue: submit again"
        if estimate is None:
            basis = f"no estimate: {len(elements)} wait, none runs, SLURM does not say when one will"
    if estimate is not None and waits_for is not None and waits_for.estimate is not None:
        estimate = later(estimate, waits_for.estimate)
    return estimate, basis


def _estimate_without_queue(
    missing: int, measured: Measured, speed: Rates, queue: Queue, now: float
) -> tuple[Estimate | None, str]:
    """By what was finished lately: `--on here`, shards made by hand, and where squeue does not answer, are in no queue."""
    silent = now - max(one.at for one in measured.finished)
    if silent <= max(SHORTEST_PAUSE_SECONDS, 3 * max(one.seconds for one in measured.sampled)):
        return estimate_by_rate(missing, speed), "if it goes on as before; not by the queue"
    if queue.lost:
        return None, f"no estimate: the queue is not known, nothing was finished for {span(silent)}"
    return None, "no estimate: nothing of it is in the queue; submit again"


def _elements(counts: Sequence[StageCount], queue: Queue, now: float, waits_for: StageLook | None) -> list[Element]:
    """What runs and waits of a stage; with a driver also what it has not started yet.

    Also what has made its own shard: a video element goes on with others'.
    """
    elements = []
    for count in counts:
        place = (count.stage, count.shard)
        if place not in queue.live and not (queue.has_driver and count.missing):
            continue
        at, is_running = queue.starts.get(place), queue.live.get(place) in RUNNING
        starts_in = None if at is None else max(0.0, at - now)
        if starts_in is None and waits_for is not None and waits_for.estimate is not None:
            starts_in = waits_for.estimate.high_seconds  # its first frames are there by then
        elements.append(Element(missing=count.missing, is_running=is_running, starts_in=None if is_running else starts_in))
    return elements


def _expected_starts(job_ids: Sequence[str]) -> dict[str, float]:
    """Element -> seconds of Unix time, where SLURM says when it will start; it does so for the first in its queue at most."""
    try:
        # squeue and not another way to ask: it keeps a user's SQUEUE_* away, and knows what is no answer
        rows = controller.squeue("--start", "-r", "-o", "%i|%S", "-j", ",".join(job_ids)) if job_ids else []
    except NoAnswer:
        return {}
    starts = {}
    for row in rows:
        with contextlib.suppress(ValueError):  # N/A
            starts[row[0]] = datetime.fromisoformat(row[1]).timestamp()  # squeue speaks this machine's time
    return starts


def _at_once(run: RunDir, living: Iterable[Submitted]) -> dict[str, int]:
    """Stage -> elements that may run at once, as the scripts of its arrays have it: --array=0-9%4."""
    found: Counter[str] = Counter()
    unknown = set()
    for one in living:
        script = run.jobs_path(one.stage) / f"{one.name}.sh"
        limit = None
        with contextlib.suppress(OSError):
            limit = re.search(r"^#SBATCH --array=\S*%(\d+)", script.read_text(encoding="utf-8"), re.MULTILINE)
        if limit is None:
            unknown.add(one.stage)
        else:
            found[one.stage] += int(limit[1])
    return {stage: num for stage, num in found.items() if stage not in unknown}
