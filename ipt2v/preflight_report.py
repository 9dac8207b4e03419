"""What the ranks of a preflight report, where, and what is wrong with it. Pure: reads no file, knows no torch, no scheduler."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")

# Speeds are judged on GPUs only: ranks on CPUs take turns on the cores, and any of them may be ten times slower
SLOW_MATMUL = 0.8  # of the median of GPUs of the same kind
SLOW_NETWORK = 0.5  # of what is usual between nodes, or inside one
SLOW_READING = 0.25  # a node may have read the file before
CLOCK_SECONDS = 5.0
LATE_SECONDS = 10.0  # until a file of another node is seen
RUNS_GB, SHM_GB = 10.0, 0.5  # free; NCCL's buffers between GPUs of a node that do not reach each other directly
STRANGERS_GB = 2.0  # of a GPU's memory in use before we use any; CUDA itself takes half a GB
ACROSS_GB_PER_S = 1.0  # a rank's share; one 400 Gbit/s card is 50, an Ethernet of 10 Gbit/s is 1.2
KEEP_OFF = "keep off the node: the last line is for the cluster file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a rank sees by itself, before it has met another."""

    element: int
    rank: int
    local_rank: int
    node: str  # as the launcher calls it
    host: str  # as the machine calls itself
    gpus_asked: int  # for the node
    versions: dict[str, str]
    free_gb: dict[str, float]  # folder, as the cluster file calls it -> GB
    folder_problems: dict[str, str]  # the same -> why it cannot be used
    missing_commands: tuple[str, ...] = ()
    weights_gb: float = 0.0  # of all files that the run loads; this and the next three from the first rank of a node only
    weights_bytes: dict[str, int] = field(default_factory=dict)  # file -> size, of those that are there
    weights_problems: tuple[str, ...] = ()
    read_gb_per_s: float = 0.0  # of one large file; 0: not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """What a rank measures, by itself and with the others."""

    element: int
    rank: int
    node: str
    num_nodes: int
    device: str  # cuda or cpu
    kind: str  # of GPU or CPU
    gpu_id: str = ""
    total_gb: float = 0.0  # of the GPU
    free_gb: float = 0.0  # before we used any
    tflops: float = 0.0
    wrong_rows: int = 0  # of a product whose every value is known
    rendezvous_seconds: float = 0.0  # until all ranks had met
    node_gb_per_s: float = 0.0  # that this rank sends in an all-to-all of its node; 0: it is alone there
    all_gb_per_s: float = 0.0  # the same, of all ranks
    pairs: dict[str, float] = field(default_factory=dict)  # other node -> GB/s to the same rank there
    wrong_from: tuple[int, ...] = ()  # ranks whose data came out wrong
    clock: float = 0.0  # Unix time at a moment that is the same for all ranks of an element
    server_seconds: float = 0.0  # that the file server's clock is ahead of ours
    visible_seconds: float = 0.0  # until a new file of rank 0 was seen, and then one of every rank; inf: never
    unseen: tuple[int, ...] = ()  # ranks whose file was not seen
    has_link: bool = False  # it was the one that made a name by link(2)
    has_lock: bool = False  # it was the one that got flock(2)
    link_problem: str = ""
    lock_problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Of one element, or of several together. An element that has died has hosts only, perhaps not of all ranks."""

    hosts: tuple[Host, ...] = ()
    ranks: tuple[Rank, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    node: str  # or several, or none, if it is not a node's
    check: str
    found: str
    expected: str
    todo: str
    is_problem: bool = True  # rather than a warning
    exclude: tuple[str, ...] = ()  # nodes to keep off

    def __str__(self) -> str:
        where = f"{self.node}: " if self.node else ""
        word = "problem" if self.is_problem else "warning"
        return f"{word}: {where}{self.check}: found {self.found}, expected {self.expected}; {self.todo}"


def host_path(folder: Path, element: int, rank: int) -> Path:
    """Where a rank writes, by itself, what it sees."""
    return folder / "reports" / f"{element:03d}" / f"{rank:04d}.json"


def report_path(folder: Path, element: int) -> Path:
    return folder / "reports" / f"{element:03d}.json"


def dump(report: Report | Host) -> str:
    return json.dumps(asdict(report), indent=1) + "\n"


def load_report(text: str) -> Report:
    return TypeAdapter(Report).validate_python(json.loads(text))


def load_host(text: str) -> Host:
    return TypeAdapter(Host).validate_python(json.loads(text))


def judge(report: Report) -> tuple[Finding, ...]:
    """What is wrong, problems first; [] of an element that reports nothing, which is for the caller to notice."""
    found = [
        *(_odd_versions(report.hosts), _commands(report.hosts), _folders(report.hosts), _weights(report.hosts)),
        *(_places(report.ranks), _gpus(report), _matmuls(report.ranks), _network(report.ranks), _pairs(report.ranks)),
        *(_files(report.ranks), _names(report.ranks), _clocks(report.ranks)),
    ]
    distinct = dict.fromkeys(finding for findings in found for finding in findings)
    return tuple(sorted(distinct, key=lambda finding: not finding.is_problem))


# --- what hosts see by themselves ---------------------------------------------------------------------------------------


def _odd_versions(hosts: Sequence[Host]) -> Iterator[Finding]:
    todo = "install into an environment that every node sees, and name it in `setup` of the cluster file"
    for name in dict.fromkeys(name for host in hosts for name in host.versions):
        yield from _odd(name, {host.node: host.versions.get(name, "none") for host in hosts}, todo)


def _odd(check: str, values: Mapping[str, str], todo: str, *, is_problem: bool = True) -> Iterator[Finding]:
    """A finding for each node whose value is not the usual one; one for all if none is usual. `values` by node."""
    counts = Counter(values.values()).most_common()
    if len(counts) < 2:
        return
    usual, most = counts[0]
    odd = [node for node, value in values.items() if value != usual]
    if counts[1][1] == most:
        found = "; ".join(f"{value} on {_names_of(node for node in values if values[node] == value)}" for value, _ in counts)
        yield Finding(node=_names_of(values), check=check, found=found, expected="the same", todo=todo, is_problem=is_problem)
        return
    for node in odd:
        exclude = (node,) if is_problem else ()
        expected = f"{usual} as on {_names_of(one for one in values if values[one] == usual)}"
        yield Finding(
            node=node, check=check, found=values[node], expected=expected, todo=todo, is_problem=is_problem, exclude=exclude
        )


def _commands(hosts: Sequence[Host]) -> Iterator[Finding]:
    """A command that is missing on some nodes is their problem; one that is missing everywhere costs what it is for."""
    nodes = _distinct(host.node for host in hosts)
    for name in _distinct(name for host in hosts for name in host.missing_commands):
        without = _distinct(host.node for host in hosts if name in host.missing_commands)
        lost = "an element that runs there cannot put itself back into the queue when its time is up: submit again by hand"
        if len(without) == len(nodes):
            what = Finding(
                node="all nodes", check=name, found="none on PATH", expected="one", todo=f"without it, {lost}", is_problem=False
            )
            yield what
            continue
        having = _names_of(node for node in nodes if node not in without)
        for node in without:
            todo = f"correct PATH there, or keep off: {lost}"
            yield Finding(
                node=node, check=name, found="none on PATH", expected=f"one as on {having}", todo=todo, exclude=(node,)
            )


def _folders(hosts: Sequence[Host]) -> Iterator[Finding]:
    has_gpus = any(host.gpus_asked for host in hosts)
    needed_gb = max((host.weights_gb for host in hosts), default=0.0)
    limits = {
        "runs_dir": (RUNS_GB, True, "free space: videos and records go there"),
        "local_weights_dir": (needed_gb, False, "weights that do not fit are read from the shared folder, by each rank"),
        "/dev/shm": (
            SHM_GB if has_gpus else 0.0,
            False,
            "NCCL may fail on it; give the container more, or the host's /dev/shm",
        ),
    }
    for host in hosts:
        for name, why in host.folder_problems.items():
            todo = limits[name][2]
            yield Finding(node=host.node, check=name, found=why, expected="a folder to write to", todo=todo, is_problem=False)
        for name, free_gb in host.free_gb.items():
            least_gb, is_problem, todo = limits[name]
            if free_gb < least_gb:
                node = "" if name == "runs_dir" else host.node
                found, expected = f"{free_gb:.1f} GB free", f"at least {least_gb:.1f}"
                yield Finding(node=node, check=name, found=found, expected=expected, todo=todo, is_problem=is_problem)


def _weights(hosts: Sequence[Host]) -> Iterator[Finding]:
    firsts = [host for host in hosts if host.local_rank == 0]
    broken = {host.node: host.weights_problems for host in firsts if host.weights_problems}
    is_all = len(broken) == len({host.node for host in firsts})
    todo = "is the folder mounted there? `ipt2v weights check CONFIG` lists what is missing"
    for node, problems in broken.items():
        found = f"{len(problems)} files missing or damaged, the first: {problems[0]}"
        where = "all nodes" if is_all else node
        yield Finding(
            node=where, check="weights", found=found, expected="all whole", todo=todo, exclude=() if is_all else (node,)
        )
        if is_all:
            break
    seen = [host for host in firsts if host.weights_bytes and host.node not in broken]
    for name in _distinct(name for host in seen for name in host.weights_bytes):
        sizes = {host.node: f"{host.weights_bytes.get(name, 0)} bytes" for host in seen}
        yield from _odd(f"size of {name}", sizes, "the nodes do not see the same file: which folder is mounted there?")
    speeds = {host.node: host.read_gb_per_s for host in firsts if host.read_gb_per_s}
    for node, speed, usual in _slow(speeds, SLOW_READING):
        found, expected = f"{speed:.3g} GB/s", f"about {usual:.3g} as elsewhere"
        todo = "the node may have to fetch what others have in memory; if it stays, keep off"
        yield Finding(node=node, check="reading weights", found=found, expected=expected, todo=todo, is_problem=False)


# --- what ranks measure -------------------------------------------------------------------------------------------------


def _places(ranks: Sequence[Rank]) -> Iterator[Finding]:
    """Ranks are to be numbered node by node: neighbours share one."""
    for mine in _elements(ranks):
        in_order = [one.node for one in sorted(mine, key=lambda one: one.rank)]
        blocks = sum(1 for one, other in zip(in_order, ["", *in_order[:-1]], strict=True) if one != other)
        if blocks != len(set(in_order)):
            expected = "ranks numbered node by node"
            todo = "--distribution=block, in the site's SBATCH_DISTRIBUTION or SLURM_DISTRIBUTION"
            yield Finding(node="", check="order of ranks", found=" ".join(in_order), expected=expected, todo=todo)
        if len(set(in_order)) != mine[0].num_nodes:
            found, expected = f"{len(set(in_order))} ({_names_of(in_order)})", str(mine[0].num_nodes)
            todo = "the launcher counts nodes in another way than they call themselves"
            yield Finding(node="", check="number of nodes", found=found, expected=expected, todo=todo, is_problem=False)


def _gpus(report: Report) -> Iterator[Finding]:
    ranks = report.ranks
    yield from _odd("device", _by_node((one.node, one.device) for one in ranks), "torch sees no GPU there; " + KEEP_OFF)
    kinds = _by_node((one.node, one.kind) for one in ranks)
    yield from _odd("kind of GPU or CPU", kinds, "`constraint` picks one kind", is_problem=False)
    if any(host.gpus_asked for host in report.hosts) and all(one.device == "cpu" for one in ranks) and ranks:
        has_cuda = any(host.versions.get("cuda", "none") != "none" for host in report.hosts)
        found = "no GPU that torch sees" if has_cuda else "a build of torch without CUDA"
        todo = "everything would be computed on CPUs; see `setup` and `container`, and the driver"
        yield Finding(node="all nodes", check="GPUs", found=found, expected="GPUs", todo=todo, is_problem=has_cuda)
    totals_gb = _usual((one.kind, one.total_gb) for one in ranks if one.total_gb)
    for one in ranks:
        alike = [other.rank for other in ranks if one.gpu_id and (other.gpu_id, other.element) == (one.gpu_id, one.element)]
        if len(alike) > 1:
            found, todo = f"ranks {_numbers(alike)} on the same one", "gpus_per_node has to be tasks_per_node, or more"
            yield Finding(node=one.node, check="GPUs", found=found, expected="one for each rank", todo=todo)
            continue
        used_gb = one.total_gb - one.free_gb
        if used_gb > STRANGERS_GB:
            found, expected = (
                f"{used_gb:.1f} of {one.total_gb:.0f} GB in use (rank {one.rank})",
                f"less than {STRANGERS_GB:.0f}",
            )
            todo = "somebody else's process is on the GPU, or an old one of ours; " + KEEP_OFF
            yield Finding(node=one.node, check="GPU memory", found=found, expected=expected, todo=todo, exclude=(one.node,))
        if one.total_gb < 0.9 * totals_gb.get(one.kind, 0):
            found, expected = f"{one.total_gb:.0f} GB in all (rank {one.rank})", f"{totals_gb[one.kind]:.0f} as elsewhere"
            yield Finding(node=one.node, check="GPU memory", found=found, expected=expected, todo=KEEP_OFF, exclude=(one.node,))


def _matmuls(ranks: Sequence[Rank]) -> Iterator[Finding]:
    usual = _usual((one.kind, one.tflops) for one in ranks)
    for one in ranks:
        if one.wrong_rows:
            found = f"{one.wrong_rows} wrong rows (rank {one.rank}, {one.gpu_id or one.kind})"
            todo = "broken hardware, tell your administrators; " + KEEP_OFF
            yield Finding(node=one.node, check="matmul", found=found, expected="none", todo=todo, exclude=(one.node,))
        elif one.device == "cuda" and one.tflops < SLOW_MATMUL * usual[one.kind]:
            found = f"{one.tflops:.3g} TFLOP/s (rank {one.rank})"
            expected = f"about {usual[one.kind]:.3g} as on the others"
            todo = "throttled, or not ours alone; all ranks of a video wait for it; " + KEEP_OFF
            yield Finding(node=one.node, check="matmul", found=found, expected=expected, todo=todo, exclude=(one.node,))


def _network(ranks: Sequence[Rank]) -> Iterator[Finding]:
    for mine in _elements(ranks):
        node_of = {one.rank: one.node for one in mine}
        bad = [(one.node, node_of[other]) for one in mine for other in one.wrong_from]
        yield from _blame("all-to-all", bad, "wrong values", "what was sent", "broken hardware; " + KEEP_OFF)
    gpus = [one for one in ranks if one.device == "cuda"]
    inside = {node: min(one.node_gb_per_s for one in gpus if one.node == node) for node in _distinct(one.node for one in gpus)}
    for node, speed, usual in _slow({node: speed for node, speed in inside.items() if speed}, SLOW_NETWORK):
        found, expected = f"{speed:.3g} GB/s a rank", f"about {usual:.3g} as elsewhere"
        yield Finding(
            node=node, check="all-to-all inside the node", found=found, expected=expected, todo=KEEP_OFF, exclude=(node,)
        )
    across = [one.all_gb_per_s for one in gpus if one.num_nodes > 1]
    if across and statistics.median(across) < ACROSS_GB_PER_S:
        found = f"{statistics.median(across):.3g} GB/s a rank"
        todo = "NCCL may have fallen back to TCP: NCCL_DEBUG=INFO in `setup` says which network it takes"
        expected = f"more than {ACROSS_GB_PER_S:.0f}"
        yield Finding(node="", check="all-to-all across nodes", found=found, expected=expected, todo=todo, is_problem=False)


def _pairs(ranks: Sequence[Rank]) -> Iterator[Finding]:
    """A node is slow if it is slow with everybody: so of each node the best pair counts."""
    speeds: dict[frozenset[str], float] = {}
    for one in (one for one in ranks if one.device == "cuda"):
        for other, speed in one.pairs.items():
            pair = frozenset((one.node, other))
            speeds[pair] = min(speed, speeds.get(pair, math.inf))
    mine = {node: [pair for pair in speeds if node in pair] for node in _distinct(node for pair in speeds for node in pair)}
    best = {node: max(speeds[pair] for pair in pairs) for node, pairs in mine.items()}
    slow = _slow(best, SLOW_NETWORK)
    names = {node for node, _, _ in slow}
    for node, speed, usual in slow:
        others = {other for pair in mine[node] for other in pair} - {node}
        found, expected = f"{speed:.3g} GB/s at best, with {_names_of(others)}", f"about {usual:.3g} as between others"
        guilty = () if others <= names else (node,)  # else each says that the other is slow
        todo = KEEP_OFF if guilty else "one of the two, or what is between them: other pairs would tell, run it again"
        yield Finding(node=node, check="network to other nodes", found=found, expected=expected, todo=todo, exclude=guilty)


def _files(ranks: Sequence[Rank]) -> Iterator[Finding]:
    for mine in _elements(ranks):
        node_of = {one.rank: one.node for one in mine}
        bad = [(one.node, node_of[other]) for one in mine for other in one.unseen]
        todo = "the runs folder has to be one shared folder on all nodes; " + KEEP_OFF
        yield from _blame("shared files", bad, "files of other ranks that never came into sight", "all", todo)
        late = {one.node: one.visible_seconds for one in mine if LATE_SECONDS < one.visible_seconds < math.inf}
        for node, seconds in late.items():
            todo = "slow, not wrong: what is decided by files is decided by rank 0"
            found, expected = f"files seen after {seconds:.0f} s", f"less than {LATE_SECONDS:.0f}"
            yield Finding(node=node, check="shared files", found=found, expected=expected, todo=todo, is_problem=False)


def _names(ranks: Sequence[Rank]) -> Iterator[Finding]:
    """Of all ranks one makes a name by link(2), and one gets a lock: whatever node it is on."""
    for mine in _elements(ranks):
        refused = _distinct(one.link_problem for one in mine if one.link_problem)
        winners = [one.node for one in mine if one.has_link]
        if refused:
            todo = "leases are then files that are created, not linked: two elements may now and then make the same video"
            yield Finding(node="", check="link(2)", found=refused[0], expected="hard links", todo=todo, is_problem=False)
        elif len(winners) != 1:
            found, todo = (
                f"{len(winners)} ranks made it ({_names_of(winners)})",
                "two elements would take one lease: " + _OTHER_DISK,
            )
            yield Finding(node="", check="one name made by all ranks at once", found=found, expected="1", todo=todo)
        refused = _distinct(one.lock_problem for one in mine if one.lock_problem)
        winners = [one.node for one in mine if one.has_lock]
        if refused or len(winners) != 1:
            found = refused[0] if refused else f"{len(winners)} ranks got it ({_names_of(winners)})"
            todo = "do not submit one run from two machines at once: the lock does not keep them apart"
            yield Finding(node="", check="flock(2)", found=found, expected="one holder", todo=todo, is_problem=False)


_OTHER_DISK = "put runs_dir on another file system"


def _clocks(ranks: Sequence[Rank]) -> Iterator[Finding]:
    todo = "let chrony or ntpd run there: time limits and ages of leases are read off it"
    for mine in _elements(ranks):
        usual = statistics.median(one.clock for one in mine)
        for node, skew in {one.node: one.clock - usual for one in mine}.items():
            if abs(skew) > CLOCK_SECONDS:
                found, expected = f"{skew:+.0f} s against the other nodes", f"less than {CLOCK_SECONDS:.0f}"
                yield Finding(node=node, check="clock", found=found, expected=expected, todo=todo, is_problem=False)
    ahead = statistics.median(one.server_seconds for one in ranks) if ranks else 0.0
    if abs(ahead) > CLOCK_SECONDS:
        found, expected = f"{ahead:+.0f} s against the nodes", f"less than {CLOCK_SECONDS:.0f}"
        yield Finding(node="", check="the file server's clock", found=found, expected=expected, todo=todo, is_problem=False)


# --- who stands out -----------------------------------------------------------------------------------------------------


def _blame(check: str, pairs: Sequence[tuple[str, str]], found: str, expected: str, todo: str) -> Iterator[Finding]:
    """A finding about what failed between two nodes each: about the one that was in all of it, if there is one."""
    if not pairs:
        return
    always = set.intersection(*(set(pair) for pair in pairs))
    nodes = _distinct(node for pair in pairs for node in pair)
    guilty = tuple(always) if len(always) == 1 else ()
    node = guilty[0] if guilty else _names_of(nodes)
    between = f"{found} ({len(pairs)} times, between {_names_of(nodes)})"
    yield Finding(node=node, check=check, found=between, expected=expected, todo=todo, exclude=guilty)


def _slow(speeds: Mapping[str, float], limit: float) -> list[tuple[str, float, float]]:
    """(node, its speed, the usual one) of nodes below `limit` of the median."""
    if not speeds:
        return []
    usual = statistics.median(speeds.values())
    return [(node, speed, usual) for node, speed in speeds.items() if speed < limit * usual]


def _usual(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """kind -> median."""
    by_kind: dict[str, list[float]] = {}
    for kind, value in values:
        by_kind.setdefault(kind, []).append(value)
    return {kind: statistics.median(found) for kind, found in by_kind.items()}


def _by_node(values: Iterable[tuple[str, str]]) -> dict[str, str]:
    """node -> what its ranks have, several joined."""
    values = list(values)
    return {node: "/".join(sorted({value for other, value in values if other == node})) for node, _ in values}


def _elements(ranks: Sequence[Rank]) -> list[list[Rank]]:
    numbers = _distinct(one.element for one in ranks)
    return [[one for one in ranks if one.element == number] for number in numbers]


def _distinct(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _names_of(nodes: Iterable[str], most: int = 4) -> str:
    names = sorted(set(nodes))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _numbers(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
