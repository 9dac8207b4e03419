"""`ipt2v preflight`: submit a look at the nodes with the resources of a video element, wait for it, say what is wrong.

Its folder has what `ipt2v logs`, `nodes` and `cancel` want of a run's, and nothing of any run in it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ipt2v.atomic import write_text
from ipt2v.config import dump_settings
from ipt2v.preflight_report import Finding, Rank, Report, host_path, judge, load_host, load_report, report_path
from ipt2v.run_dir import Environment, RunDir
from ipt2v.version import code_version
from launch.cluster import Cluster
from launch.evidence import Known, collect, gather
from launch.fault_text import printable
from launch.fault_words import NODE_KINDS, Kind, RankLog
from launch.faults import classify
from launch.job import PreflightJob
from launch.local import submit_local
from launch.plan import Submission
from launch.progress import QUEUE_POLL_SECONDS, ranges
from launch.queue import Submitted, cancel, is_idle, live_elements, newest
from launch.submit import Submitter

if TYPE_CHECKING:
    from ipt2v.config import RunConfig

TIMEOUT_MINUTES = 5
SIGNAL_SECONDS = 20  # before that; there is nothing to save
STAGE = "video"  # whose resources the job has
LATE_SECONDS = 5.0  # that the report of an element that has ended may come after its end
LAST_LINES = 4  # of a log that says nothing that we know


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What is to be looked at, and from where."""

    run: RunDir
    site: Cluster
    weights_dir: Path
    num_elements: int
    on_slurm: bool  # rather than on this machine

    @property
    def elements(self) -> tuple[int, ...]:
        return tuple(range(self.num_elements))

    def missing(self) -> list[int]:
        """Elements without a report. By a listing, which NFS does not answer from memory as it does the question for a file."""
        paths = [report_path(self.run.root, element) for element in self.elements]
        folder = paths[0].parent
        there = set(os.listdir(folder)) if folder.exists() else set()
        return [element for element, path in enumerate(paths) if path.name not in there]


def prepare(
    site: Cluster, *, config: RunConfig | None, runs_dir: Path, weights_dir: Path, num_elements: int, on_slurm: bool
) -> Preflight:
    """A new folder below `runs_dir`. Without a config no weights are looked at.

    Raises ValueError if it cannot be run in this place.
    """
    if on_slurm and shutil.which("srun") is None:
        raise ValueError("preflight --on slurm: no srun on PATH; log in to the cluster, or use --on local")
    if not on_slurm and (site.video.nodes > 1 or num_elements > 1):
        raise ValueError(
            f"preflight --on local: found {num_elements} elements of {site.video.nodes} nodes, expected 1 of 1: "
            "this machine is one node; use another --cluster file, or --on slurm"
        )
    run = RunDir(runs_dir.absolute() / f"preflight-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}")
    environment = Environment(  # for `logs`, `nodes` and `cancel`
        run_digest="preflight",
        manifest_digest="",
        weights_dir=str(weights_dir.absolute()),
        weights={},
        testset_format="",
        num_shards=num_elements,
        code_version=code_version(),
        packages={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_text(run.environment_path, json.dumps(asdict(environment)) + "\n")
    for element in range(num_elements):
        write_text(run.shard_path(element), "")
    if config is not None:
        write_text(run.config_path, dump_settings(config))
    resources = site.video.model_copy(update={"timeout_minutes": TIMEOUT_MINUTES, "array_parallelism": num_elements})
    short = site.model_copy(update={"video": resources, "signal_delay_seconds": SIGNAL_SECONDS})
    return Preflight(run=run, site=short, weights_dir=weights_dir.absolute(), num_elements=num_elements, on_slurm=on_slurm)


@contextmanager
def started(preflight: Preflight, tell: Callable[[Submitted], None]) -> Iterator[Callable[[], bool]]:
    """Submit it; gives what tells whether it is over. Whatever ends this before that, Ctrl-C too, cancels it.

    Raises ValueError if SLURM refuses it, OSError if SLURM does not answer.
    """
    try:
        yield _submit(preflight, tell) if preflight.on_slurm else _start_local(preflight, tell)
    except BaseException:
        cancel(preflight.run)
        raise


def _submit(preflight: Preflight, tell: Callable[[Submitted], None]) -> Callable[[], bool]:
    def make_job(run: RunDir, cluster: Cluster, stage: str) -> PreflightJob:
        return _job(preflight, commands=("scontrol",))  # by which submitit puts an element back into the queue

    plan = (Submission(stage=STAGE, shards=preflight.elements, after=False),)
    Submitter(run=preflight.run, cluster=preflight.site, make_job=make_job).submit(plan, tell)
    return lambda: is_idle(preflight.run)


def _start_local(preflight: Preflight, tell: Callable[[Submitted], None]) -> Callable[[], bool]:
    job, submitted = submit_local(preflight.run, STAGE, preflight.site.video, _job(preflight, commands=()), 0)
    tell(submitted)
    return lambda: bool(job.done())


def _job(preflight: Preflight, *, commands: tuple[str, ...]) -> PreflightJob:
    resources = preflight.site.video
    return PreflightJob(
        folder=str(preflight.run.root),
        num_tasks=resources.num_tasks,
        num_gpus=resources.gpus_per_node,
        weights_dir=str(preflight.weights_dir),
        local_weights_dir=preflight.site.local_weights_dir or "",
        commands=commands,
    )


def wait(preflight: Preflight, is_over: Callable[[], bool]) -> None:
    """Return when every element has reported, or none runs any more; prints how far they are when that changes."""
    start, last, ended = time.monotonic(), "", 0.0
    while True:
        now = time.monotonic()
        missing = preflight.missing()
        live = live_elements(preflight.run)
        words = Counter(live.get((STAGE, element), "not in the queue").lower() for element in missing)
        words["reported"] = preflight.num_elements - len(missing)
        line = ", ".join(f"{number} {word}" for word, number in words.items() if number)
        if line != last:
            last = line
            print(f"{now - start:6.0f} s  {line}", flush=True)
        if not missing or (ended and now - ended > LATE_SECONDS):
            return
        if not ended and is_over():
            ended = now
        time.sleep(QUEUE_POLL_SECONDS if preflight.num_elements > 1 else 1)


def read(preflight: Preflight) -> Report:
    """What all elements have reported; of one that has died, what its ranks had seen before they met."""
    reports = []
    for element in preflight.elements:
        path = report_path(preflight.run.root, element)
        if path.exists():
            reports.append(load_report(path.read_text(encoding="utf-8")))
        else:
            alone = sorted(host_path(preflight.run.root, element, 0).parent.glob("*.json"))
            reports.append(Report(hosts=tuple(load_host(one.read_text(encoding="utf-8")) for one in alone)))
    hosts = tuple(host for report in reports for host in report.hosts)
    return Report(hosts=hosts, ranks=tuple(rank for report in reports for rank in report.ranks))


def deaths(preflight: Preflight, report: Report) -> Iterator[Finding]:
    """Why the elements without a report have none."""
    dead = preflight.missing()
    known = gather(preflight.run) if dead else None
    for element in dead:
        assert known is not None  # there is one that is dead
        yield _death(preflight, known, element, {host.rank: host.node for host in report.hosts if host.element == element})


def _death(preflight: Preflight, known: Known, element: int, came: Mapping[int, str]) -> Finding:
    """`came`: rank -> node, of those that wrote what they had seen by themselves."""
    evidence = collect(known, STAGE, element, newest(known.submitted, STAGE, element))
    fault, resources = classify(evidence), preflight.site.video
    missing = [rank for rank in range(resources.num_tasks) if rank not in came]
    # who never came is to blame for it that the others waited, whoever's time was up first
    absent = {_node_of(rank, resources.num_tasks_per_node, came, evidence.nodes) for rank in missing} if came else set()
    nodes = fault.nodes or tuple(sorted(absent - {""}))
    is_a_nodes = len(nodes) == 1 and "" not in absent and fault.kind in NODE_KINDS - {Kind.NETWORK}
    said = [f"Log of rank {quote.rank}{f' on {quote.node}' * bool(quote.node)}: {quote.line.strip()}" for quote in fault.quotes]
    found = [f"{fault.kind}. {fault.text}", *(said or [_last_words(evidence.logs)])]
    if missing and came:
        found.append(f"Never got as far as to look for the others: ranks {ranges(missing)}")
    return Finding(
        node=", ".join(nodes or evidence.nodes),
        check=f"element {element}",
        found=printable(" ".join(found), 600).rstrip(" ."),
        expected="a report",
        todo=f"`ipt2v logs {preflight.run.root} {STAGE} {element}` has all of it",
        exclude=nodes if is_a_nodes else (),
    )


def _node_of(rank: int, per_node: int, came: Mapping[int, str], nodes: Sequence[str]) -> str:
    """The node of a rank that has said nothing: its neighbours', or by SLURM's list; "" if neither tells."""
    index = rank // per_node
    for other, node in came.items():
        if other // per_node == index:
            return node
    return nodes[index] if index < len(nodes) else ""


def _last_words(logs: Sequence[RankLog]) -> str:
    return " | ".join(line.strip() for log in logs[:1] for line in log.lines[-LAST_LINES:])


# --- on the terminal ----------------------------------------------------------------------------------------------------

_COLUMNS = ("node", "ranks", "device", "GB free", "TFLOP/s", "GB/s node", "all", "to node", "files s", "clock s", "disk GB")


def table(report: Report) -> list[str]:
    """A line for each node of each element: of its ranks the worst."""
    places = dict.fromkeys((rank.element, rank.node) for rank in report.ranks)
    if not places:
        return []
    first_clock = {rank.element: rank.clock for rank in reversed(report.ranks)}
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for element, node in places:
        mine = [rank for rank in report.ranks if (rank.element, rank.node) == (element, node)]
        disks_gb = [host.free_gb["runs_dir"] for host in report.hosts if host.node == node and "runs_dir" in host.free_gb]
        rows.append(_row(mine, first_clock[element], min(disks_gb, default=0.0)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place < 3 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _row(mine: Sequence[Rank], first_clock: float, disk_gb: float) -> tuple[str, ...]:
    pairs = [speed for rank in mine for speed in rank.pairs.values()]
    return (
        printable(mine[0].node),
        ranges([rank.rank for rank in mine]),
        printable(mine[0].kind, 32),
        _number(min(rank.free_gb for rank in mine)),
        _number(min(rank.tflops for rank in mine)),
        _number(min(rank.node_gb_per_s for rank in mine)),
        _number(min(rank.all_gb_per_s for rank in mine)),
        _number(min(pairs, default=0.0)),
        f"{max(rank.visible_seconds for rank in mine):.1f}",
        f"{mine[0].clock - first_clock:+.1f}",
        f"{disk_gb:.0f}",
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if value else "-"


def summary(report: Report) -> list[str]:
    """What is equal on all nodes, how long the ranks took to meet, and what was seen of the weights."""
    lines, versions = [], {name: {host.versions.get(name) for host in report.hosts} for name in _names(report)}
    same = [f"{name} {next(iter(found))}" for name, found in versions.items() if len(found) == 1 and found != {"none"}]
    if same:
        lines.append(f"the same on all ranks: {', '.join(same)}")
    if report.ranks:
        lines.append(f"all ranks had met after {max(rank.rendezvous_seconds for rank in report.ranks):.1f} s")
    readers = [host for host in report.hosts if host.weights_bytes]
    if readers:
        slowest = min(host.read_gb_per_s for host in readers)
        count, total_gb = len(readers[0].weights_bytes), readers[0].weights_gb
        lines.append(f"weights: {count} files, {total_gb:.3g} GB; read at {slowest:.2g} GB/s or more")
    return lines


def _names(report: Report) -> dict[str, None]:
    return dict.fromkeys(name for host in report.hosts for name in host.versions)


def verdict(findings: Sequence[Finding], site: Cluster) -> list[str]:
    """The findings, and the line that keeps the bad nodes out of the next submission."""
    lines = [printable(str(finding), 800) for finding in findings]
    bad = sorted({node for finding in findings for node in finding.exclude})
    if bad:
        lines += ["", "for the cluster file, below `video:`", f"  exclude: {site.without(tuple(bad)).video.exclude}"]
    elif not any(finding.is_problem for finding in findings):
        lines.append("all good" + (" but for the warnings" if findings else ""))
    return lines


def look_at_nodes(preflight: Preflight) -> int:
    """Submit, wait, print; the exit code: 0 if all is good, 1 if there is a problem."""
    resources = preflight.site.video
    size = f"elements {preflight.num_elements}  nodes of each {resources.nodes}  ranks of a node {resources.num_tasks_per_node}"
    print(f"preflight  {preflight.run.root}\n{size}", flush=True)
    with started(preflight, lambda one: print(f"job  {one.job_id}", flush=True)) as is_over:
        wait(preflight, is_over)
    report = read(preflight)
    findings = (*deaths(preflight, report), *judge(report))
    for lines in (table(report), summary(report), verdict(findings, preflight.site)):
        if lines:
            print("\n".join(["", *lines]))
    return 1 if any(finding.is_problem for finding in findings) else 0
