"""Logs, faults and times as people read them: plain lines, node lists written out, what to do, nodes to leave out. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from ipt2v.run_dir import STAGES
from launch.fault_words import NODE_KINDS, Fault, Kind, RankLog

MAX_NODES = 4096  # of a node list that is written out


def expand_nodes(text: str) -> tuple[str, ...]:
    """SLURM's node lists written out: a[1-2,07] is a1, a2, a07. What is no node list gives none."""
    if not text or text.lower() in {"none", "(null)", "none assigned", "n/a"}:
        return ()
    nodes: list[str] = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        names = [""]
        for plain, numbers in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", word):
            tails = [plain] if plain else list(_numbers(numbers))
            names = list(islice((name + tail for name in names for tail in tails), MAX_NODES))
        nodes += names
    return tuple(nodes[:MAX_NODES])


def _numbers(ranges: str) -> Iterator[str]:
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        if not high:
            yield low
        elif low.isdigit() and high.isdigit():
            yield from (f"{number:0{len(low)}d}" for number in range(int(low), min(int(high), int(low) + MAX_NODES) + 1))


_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)|\x1b[ -/]*[0-~]?")


def printable(text: str, width: int = 240) -> str:
    """A line of somebody else's as a terminal may show it: no escape sequence, no control or bidi character, of finite length.

    Of a progress bar, which writes over itself, the last state.
    """
    last = _ESCAPES.sub("", text.rstrip()).rpartition("\r")[2].replace("\t", "    ")
    clean = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in last[: 4 * width])
    return clean if len(clean) <= width else clean[: width - 3] + "..."


def unit_of(seconds: float) -> tuple[str, float]:
    """The largest unit of which there are two."""
    return next(
        ((name, size) for name, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)) if seconds >= 2 * size), ("s", 1.0)
    )


def span(seconds: float) -> str:
    """12 s, 5.0 min, 3.5 h, 12 d."""
    unit, size = unit_of(seconds)
    value = max(0.0, seconds) / size
    return f"{value:.1f} {unit}" if value < 10 and size > 1 else f"{value:.0f} {unit}"


def ago(seconds: float) -> str:
    """12 s, 5 min, 3 h, 2 d."""
    unit, size = unit_of(seconds)
    return f"{max(0.0, seconds) / size:.0f} {unit}"


def explain(fault: Fault, run: object) -> list[str]:
    """A fault as lines for a terminal; `run` is named in the commands."""
    lines = [f"{fault.stage} {fault.shard}: {fault.kind}", f"  {fault.text}"]
    said: dict[str, list[str]] = {}  # all ranks may have written the same
    for quote in fault.quotes:
        where = f"rank {quote.rank}" + (f" on {printable(quote.node)}" if quote.node else "")
        said.setdefault(printable(quote.line.strip()), []).append(where)
    lines += [f"  {', '.join(ranks)}: {line}" for line, ranks in said.items()]
    if fault.nodes and fault.kind in NODE_KINDS:
        lines.append(f"  node: {', '.join(map(printable, fault.nodes))}")
    if fault.advice:
        before = dict(zip(STAGES[1:], STAGES, strict=False)).get(fault.stage, fault.stage)
        lines.append(f"  to do: {fault.advice.format(run=run, stage=fault.stage, shard=fault.shard, before=before)}")
    return lines


_START = re.compile(r"- Starting with JobEnvironment\(.*?hostname=(?P<node>[\w.-]+)")
_TIME = re.compile(r"(?:^submitit [A-Z]+ \(| CANCELLED AT )(?P<time>\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d)")
_AFTERMATH = ("srun: ", "slurmstepd", "submitit ")


def newest_life(rank: int, output: Iterable[str], errors: Iterable[str]) -> tuple[RankLog, int]:
    """What a rank has written since it was last started, and how many starts there are in `output`.

    SLURM appends the logs of a requeued element. Output has a line for each start; errors have none, so what is older than the
    newest start is told by the times in lines of submitit and slurmstepd, and by what srun has to say after those.
    """
    output, errors = list(output), list(errors)
    starts = [(index, match) for index, line in enumerate(output) if (match := _START.search(line))]
    if not starts:
        return RankLog(rank=rank, lines=(*output, *errors)), 0
    index, match = starts[-1]
    if len(starts) > 1 and (begun := _TIME.search(output[index])):
        errors = errors[_first_since(begun["time"].replace("T", " "), errors) :]
    return RankLog(rank=rank, node=match["node"], lines=(*output[index:], *errors)), len(starts)


def _first_since(begun: str, errors: list[str]) -> int:
    times = [(index, match["time"].replace("T", " ")) for index, line in enumerate(errors) if (match := _TIME.search(line))]
    first = max((index + 1 for index, time in times if time < begun), default=0)
    while first < len(errors) and errors[first].startswith(_AFTERMATH) and not _TIME.search(errors[first]):
        first += 1
    return first


def nodes_to_exclude(faults: Iterable[Fault]) -> tuple[str, ...]:
    """Nodes that the next submission should not be given.

    One hard fault is enough: an Xid of the hardware, an uncorrectable ECC error, a GPU off the bus. Of soft ones (node failure,
    another CUDA error) it takes two. A fault that may be any of several nodes' counts for none: else one bad node would take
    its neighbours with it. Network errors never count, as they name two ends of a cable; nor do dead and hanging ranks, whose
    nodes are suspects only (`ipt2v nodes` lists them).
    """
    points: Counter[str] = Counter()
    for fault in faults:
        if len(fault.nodes) == 1 and fault.kind in {Kind.BAD_GPU, Kind.NODE_FAILURE}:
            points[fault.nodes[0]] += 2 if fault.is_hard else 1
    return tuple(sorted(node for node, count in points.items() if count >= 2))


def node_lines(faults: tuple[Fault, ...]) -> list[str]:
    """The nodes that faults point to, with what and how often, and the line for the cluster file."""
    counts: dict[str, Counter[str]] = {}
    for fault in faults:
        if fault.kind in NODE_KINDS:
            for node in fault.nodes:
                word = f"{fault.kind} (hardware)" if fault.is_hard else str(fault.kind)
                counts.setdefault(node, Counter())[word] += 1
    if not counts:
        return ["no element has failed in a way that points to a node"]
    lines = []
    for node, kinds in sorted(counts.items(), key=lambda pair: (-pair[1].total(), pair[0])):
        lines.append(f"{printable(node):<20} " + ", ".join(f"{kind} x {count}" for kind, count in kinds.most_common()))
    bad = nodes_to_exclude(faults)
    if bad:
        return [*lines, "", "for the cluster file, below `video:` or `first_frame:`", f"  exclude: {','.join(bad)}"]
    return [*lines, "", "none to exclude: that takes one hardware fault, or two others that point to one node alone"]
