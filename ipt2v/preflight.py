"""A look at the nodes before a long run: what each rank sees and measures, gathered to rank 0. Knows no scheduler.

Nothing of a run is read or touched. What is wrong with the numbers is told by preflight_report.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import platform
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from ipt2v.atomic import write_text
from ipt2v.config import RunConfig, load_settings
from ipt2v.models.catalogue import find_problems, stage_files
from ipt2v.parallel import Group, group_from_environment
from ipt2v.preflight_report import Host, Rank, Report, dump, host_path, report_path
from ipt2v.run_dir import STAGES
from ipt2v.version import COMPUTING_PACKAGES, code_version
from ipt2v.watch import beat, rest

VISIBLE_SECONDS = 70.0  # NFS may not look again for a minute: acregmax, acdirmax of nfs(5)
READ_MB, READ_SECONDS = 256, 10.0
MATMUL_SECONDS = {"cuda": 1.0, "cpu": 0.3}
SIZES_MB = {"cuda": (1, 4, 16, 64, 256), "cpu": (1, 4, 16)}  # that a rank sends in an all-to-all
ENOUGH_SECONDS = 0.75  # for one size: the next takes four times as long
NUM_TRIES = 3
MAX_ROUNDS = 15  # of pairs of nodes: with more nodes than 16 not every pair

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be looked at."""

    folder: Path  # of this preflight, on the shared disk; with a config.yaml if weights are to be looked at
    element: int
    node: str  # this node, as the launcher calls it
    num_gpus: int  # of this node
    weights_dir: str
    local_weights_dir: str  # as in the cluster file; empty: none
    commands: tuple[str, ...]  # that should be on PATH


def run_preflight(asked: Asked) -> None:
    """Look, measure, and have rank 0 write the report of the element; to be called on every rank.

    What a rank sees by itself is written before it meets the others: that stays if they never come.
    """
    beat()
    start, mine = time.monotonic(), look(asked)
    write_text(host_path(asked.folder, asked.element, mine.rank), dump(mine))
    log.info("preflight: rank %d on %s looks for the others", mine.rank, mine.node)
    met = time.monotonic()
    with group_from_environment() as group:
        memory_gb = _memory_gb(group.device)  # before we use any
        group.meet()
        rendezvous_seconds = time.monotonic() - met
        measured = _measure(asked, group, memory_gb, rendezvous_seconds)
        hosts, ranks = zip(*group.gather((mine, measured)), strict=True)
        if group.is_first:
            write_text(report_path(asked.folder, asked.element), dump(Report(hosts=hosts, ranks=ranks)))
            log.info("preflight: element %d reported after %.0f s", asked.element, time.monotonic() - start)
    rest()


# --- alone --------------------------------------------------------------------------------------------------------------


def look(asked: Asked) -> Host:
    """What this rank sees by itself."""
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    folders = {"runs_dir": str(asked.folder), "/dev/shm": "/dev/shm"}
    if asked.local_weights_dir:
        folders["local_weights_dir"] = asked.local_weights_dir
    found = {name: _free_gb(folder) for name, folder in folders.items()}
    config = asked.folder / "config.yaml"
    sizes: dict[str, int] = {}
    problems: tuple[str, ...] = ()
    speed = 0.0
    if local_rank == 0 and config.exists():  # once for a node: it is the same for all of its ranks
        weights_dir = Path(asked.weights_dir)
        sizes, problems = weights_seen(weights_dir, load_settings(RunConfig, config))
        speed = _read_gb_per_s(weights_dir / max(sizes, key=lambda name: sizes[name])) if sizes else 0.0
    return Host(
        element=asked.element,
        rank=rank,
        local_rank=local_rank,
        node=asked.node,
        host=socket.gethostname(),
        gpus_asked=asked.num_gpus,
        versions=versions(),
        free_gb={name: free for name, (free, _) in found.items() if math.isfinite(free)},
        folder_problems={name: problem for name, (_, problem) in found.items() if problem},
        missing_commands=tuple(name for name in asked.commands if shutil.which(name) is None),
        weights_gb=sum(sizes.values()) / 1e9,
        weights_bytes=sizes,
        weights_problems=problems,
        read_gb_per_s=speed,
    )


def versions() -> dict[str, str]:
    """Of all that should be equal on all nodes; "none" of what is not there."""
    found = {"python": platform.python_version(), "ipt2v": code_version()}
    for name in (*COMPUTING_PACKAGES, "deepspeed"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found | {"cuda": torch.version.cuda or "none", "driver": _driver()}


def _driver() -> str:
    """NVIDIA's kernel module; "none" if there is none, or it does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "none"
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text.partition("\n")[0])
    return match[1] if match else "none"


def _free_gb(folder: str) -> tuple[float, str]:
    """(GB free, why it cannot be used); what is not there yet counts as the folder above it."""
    expanded = os.path.expandvars(folder)
    if "$" in expanded or not os.path.isabs(expanded):
        return math.inf, f"{folder} is {expanded!r} there: the variable is not set"
    path = Path(expanded)
    while not path.exists():
        path = path.parent
    try:
        free_gb = shutil.disk_usage(path).free / 1e9
    except OSError as error:
        return math.inf, f"{path}: {error.strerror}"
    return free_gb, "" if os.access(path, os.W_OK) else f"{path}: not ours to write to"


def weights_seen(weights_dir: Path, config: RunConfig) -> tuple[dict[str, int], tuple[str, ...]]:
    """(file -> bytes, what is wrong) of all files that a run loads."""
    problems = tuple(problem.text for problem in find_problems(weights_dir, config))
    names: list[str] = []
    for stage in STAGES:
        try:
            names += stage_files(stage, weights_dir, config)
        except (OSError, ValueError) as error:
            problems = problems or (str(error),)
    sizes = {}
    for name in dict.fromkeys(names):
        try:
            sizes[name] = (weights_dir / name).stat().st_size
        except OSError as error:
            problems = problems or (str(error),)
    return sizes, problems


def _read_gb_per_s(path: Path) -> float:
    """Of the beginning of a file, past this node's own memory where the kernel lets us."""
    read, start = 0, time.monotonic()
    try:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while read < READ_MB << 20 and time.monotonic() - start < READ_SECONDS and (block := file.read(8 << 20)):
                read += len(block)
    except OSError:  # what is wrong with it is among the weights' problems
        return 0.0
    return read / 1e9 / max(time.monotonic() - start, 1e-9)


# --- together -----------------------------------------------------------------------------------------------------------


def _measure(asked: Asked, group: Group, memory_gb: tuple[float, float], rendezvous_seconds: float) -> Rank:
    """What this rank measures, the steps in the same order on all."""
    beat()
    tflops, wrong_rows = matmul(group.device)
    node_speed, all_speed, pairs, wrong_from = _network(asked, group)
    with _probe_folder(asked, group) as folder:
        visible_seconds, unseen = _visibility(folder, group)
        beat()
        has_link, link_problem = _try_link(folder, group)
        has_lock, lock_problem = _try_lock(folder, group)
        server_seconds = _server_seconds(folder / f"clock-{group.rank}")
    group.meet()
    clock = time.time()
    free_gb, total_gb = memory_gb
    return Rank(
        element=asked.element,
        rank=group.rank,
        node=asked.node,
        num_nodes=group.num_nodes,
        device=group.device.type,
        kind=_kind(group.device),
        gpu_id=_gpu_id(group.device),
        total_gb=total_gb,
        free_gb=free_gb,
        tflops=tflops,
        wrong_rows=wrong_rows,
        rendezvous_seconds=rendezvous_seconds,
        node_gb_per_s=node_speed,
        all_gb_per_s=all_speed,
        pairs=pairs,
        wrong_from=wrong_from,
        clock=clock,
        server_seconds=server_seconds,
        visible_seconds=visible_seconds,
        unseen=unseen,
        has_link=has_link,
        has_lock=has_lock,
        link_problem=link_problem,
        lock_problem=lock_problem,
    )


def _memory_gb(device: torch.device) -> tuple[float, float]:
    """(free, total) of a GPU."""
    if device.type != "cuda":
        return 0.0, 0.0
    free, total = torch.cuda.mem_get_info(device)
    return free / 1e9, total / 1e9


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.machine()


def _gpu_id(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def matmul(device: torch.device) -> tuple[float, int]:
    """(TFLOP/s, wrong rows of the first and the last product) of as many products as fit into a second.

    The factors are -1, 0 and 1, seldom enough that every sum is below 256: exact in bfloat16, whatever the order. So the right
    product is known (Freivalds' check: C v = A (B v)) and need not be compared with another GPU's, which may be the wrong one.
    """
    size, dtype, num = (4096, torch.bfloat16, 50) if device.type == "cuda" else (512, torch.float32, 1)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(0, 4, (size, size), generator=generator) for _ in range(2)]
    left, right = ((draw == 3).double() - (draw == 0).double() for draw in draws)
    vector = torch.randint(1, 1000, (size,), generator=generator).double()
    expected = left @ (right @ vector)
    first, second = left.to(device, dtype), right.to(device, dtype)
    product = first @ second
    wrong = int((product.cpu().double() @ vector != expected).sum())
    end, best = time.monotonic() + MATMUL_SECONDS[device.type], math.inf
    while time.monotonic() < end:
        start = time.monotonic()
        for _ in range(num):
            product = first @ second
        _finish(device)
        # of a GPU the last, when it is warm; on CPUs others take turns with us
        seconds = (time.monotonic() - start) / num
        best = seconds if device.type == "cuda" else min(best, seconds)
    wrong += int((product.cpu().double() @ vector != expected).sum())
    return 2 * size**3 / best / 1e12, wrong


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _network(asked: Asked, group: Group) -> tuple[float, float, dict[str, float], tuple[int, ...]]:
    """(GB/s inside the node, of all ranks, of each pair of nodes; ranks whose data came out wrong)."""
    if group.world_size == 1:
        return 0.0, 0.0, {}, ()
    per_node = group.world_size // group.num_nodes
    nodes = [tuple(range(first, first + per_node)) for first in range(0, group.world_size, per_node)]
    everybody = tuple(range(group.world_size))
    node_speed, wrong = 0.0, set[int]()
    if group.num_nodes > 1 and per_node > 1:
        groups = [dist.new_group(list(ranks)) for ranks in nodes]  # each has to be made by all
        mine = group.rank // per_node
        node_speed, wrong = _all_to_all(group, nodes[mine], groups[mine])
    beat()
    all_speed, all_wrong = _all_to_all(group, everybody, dist.group.WORLD)
    if group.num_nodes == 1:
        node_speed = all_speed
    beat()
    names = group.gather(asked.node)
    pairs: dict[str, float] = {}
    for peer in _peers(group.rank // per_node, group.num_nodes):
        rank = peer * per_node + group.rank % per_node
        speed, is_wrong = _exchange(group, rank if peer >= 0 else -1)
        if peer >= 0:
            pairs[names[rank]] = speed
            all_wrong |= {rank} if is_wrong else set()
    return node_speed, all_speed, pairs, tuple(sorted(wrong | all_wrong))


def _peers(node: int, num_nodes: int) -> Iterator[int]:
    """The node to pair with in each round, -1 for none: as in a tournament, everybody meets everybody (circle method)."""
    if num_nodes == 1:
        return
    seats = num_nodes + num_nodes % 2
    for turn in range(min(seats - 1, MAX_ROUNDS)):
        order = [0, *((turn + seat) % (seats - 1) + 1 for seat in range(seats - 1))]
        peer = order[seats - 1 - order.index(node)]
        yield peer if peer < num_nodes else -1


def _all_to_all(group: Group, members: tuple[int, ...], process_group: dist.ProcessGroup | None) -> tuple[float, set[int]]:
    """(GB/s that this rank sends to the other members, members whose data came out wrong), of the largest size that fits."""
    num, place = len(members), members.index(group.rank)

    def send(received: torch.Tensor, sent: torch.Tensor) -> None:
        dist.all_to_all_single(received, sent, group=process_group)

    def is_from(source: int, block: torch.Tensor) -> bool:
        return torch.equal(block, _pattern(members[source], members[place], len(block), group.device))

    speed, wrong = 0.0, set[int]()
    for size_mb in SIZES_MB[group.device.type]:
        length = (size_mb << 20) // 4 // num
        sent = torch.cat([_pattern(group.rank, other, length, group.device) for other in members])
        received = torch.zeros_like(sent)
        seconds = _timed(group, send, received, sent)
        blocks = received.view(num, length)
        wrong |= {members[source] for source in range(num) if not is_from(source, blocks[source])}
        speed = length * 4 * (num - 1) / seconds / 1e9
        if max(group.gather(seconds)) > ENOUGH_SECONDS:
            break
    return speed, wrong


def _exchange(group: Group, peer: int) -> tuple[float, bool]:
    """(GB/s to and from a rank at once, whether its data came out wrong); -1: look on, as all have to come to each step."""

    def swap(received: torch.Tensor, sent: torch.Tensor) -> None:
        if peer >= 0:
            both = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]
            for work in dist.batch_isend_irecv(both):
                work.wait()

    speed, is_wrong = 0.0, False
    for size_mb in SIZES_MB[group.device.type]:
        length = (size_mb << 20) // 4
        sent = _pattern(group.rank, peer, length, group.device)
        received = torch.zeros_like(sent)
        seconds = _timed(group, swap, received, sent)
        is_wrong |= peer >= 0 and not torch.equal(received, _pattern(peer, group.rank, length, group.device))
        speed = length * 4 / seconds / 1e9
        if max(group.gather(seconds)) > ENOUGH_SECONDS:
            break
    return speed, is_wrong


def _timed(
    group: Group, move: Callable[[torch.Tensor, torch.Tensor], None], received: torch.Tensor, sent: torch.Tensor
) -> float:
    """Seconds of the fastest of a few tries, after one that opens the connections."""
    best = math.inf
    for number in range(1 + NUM_TRIES):
        _finish(group.device)
        group.meet()
        start = time.monotonic()
        move(received, sent)
        _finish(group.device)
        if number:
            best = min(best, time.monotonic() - start)
    return max(best, 1e-9)


def _pattern(source: int, target: int, length: int, device: torch.device) -> torch.Tensor:
    """What one rank sends another: int32 that neither another pair nor another place has."""
    return torch.arange(length, dtype=torch.int32, device=device) * 31 + (source * 7919 + target * 104729)


@contextmanager
def _probe_folder(asked: Asked, group: Group) -> Iterator[Path]:
    """A folder that no earlier life of the element has used; gone when all are through."""
    name = group.from_first(uuid.uuid4().hex[:8])
    folder = asked.folder / "probe" / f"{asked.element:03d}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    group.meet()
    yield folder
    group.meet()
    if group.is_first:
        shutil.rmtree(folder, ignore_errors=True)


def _visibility(folder: Path, group: Group) -> tuple[float, tuple[int, ...]]:
    """(seconds until new files of the others were seen, ranks whose file was not seen)."""
    names = [f"rank-{rank}" for rank in range(group.world_size)]
    _await_files(folder, ["first", *names], 0)  # as jobs do: NFS remembers what was not there when somebody has looked
    group.meet()
    if group.is_first:
        write_text(folder / "first", "0\n")
    group.meet()
    seconds, missing = _await_files(folder, ["first"], VISIBLE_SECONDS)
    beat()
    is_shared = not group.anywhere(bool(missing))
    write_text(folder / names[group.rank], f"{group.rank}\n")
    group.meet()
    more, unseen = _await_files(folder, names, VISIBLE_SECONDS if is_shared else 0)
    return (max(seconds, more) if not unseen and not missing else math.inf), tuple(names.index(name) for name in unseen)


def _await_files(folder: Path, names: Collection[str], seconds: float) -> tuple[float, list[str]]:
    """(seconds until all are whole, names of those that are not after `seconds`)."""
    start, missing = time.monotonic(), list(names)
    while True:
        missing = [name for name in missing if not _is_whole(folder / name)]
        waited = time.monotonic() - start
        if not missing or waited > seconds:
            return waited, missing
        time.sleep(0.02 if waited < 1 else 0.5)


def _is_whole(path: Path) -> bool:
    """Whether it is there, with its line; a file without it would be one that is renamed before it is written."""
    try:
        return path.read_text(encoding="utf-8").endswith("\n")
    except OSError:
        return False


def _try_link(folder: Path, group: Group) -> tuple[bool, str]:
    """(whether this rank was the one that made the name, why links do not work); all try at once, as leases are taken."""
    group.meet()
    try:
        os.link(folder / f"rank-{group.rank}", folder / "lease")
    except FileExistsError:
        return False, ""
    except OSError as error:
        return False, f"{errno.errorcode.get(error.errno or 0, '?')} ({error.strerror})"
    return True, ""


def _try_lock(folder: Path, group: Group) -> tuple[bool, str]:
    """(whether this rank was the one that got the lock, why locks do not work); it is held until all have tried."""
    group.meet()
    with (folder / "lock").open("ab") as file:
        has_lock, problem = True, ""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            has_lock = False
        except OSError as error:
            has_lock, problem = False, f"{errno.errorcode.get(error.errno or 0, '?')} ({error.strerror})"
        group.meet()
    return has_lock, problem


def _server_seconds(path: Path) -> float:
    """How far the clock that dates files is ahead of this node's."""
    before = time.time()
    path.write_text("", encoding="utf-8")
    after = time.time()
    return path.stat().st_mtime - (before + after) / 2
