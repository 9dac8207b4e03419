"""What has happened to an element, and what to do about it, from what is known of it. Pure: reads no file, asks no scheduler.

A fault leaves words in many logs: the rank that fell says why, the others only that it is gone, and SLURM kills what is left
and says so too. So causes are looked for first, in the logs of all ranks, and consequences last.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

MAX_QUOTES = 4
MAX_NODES = 4096  # of a node list that is written out


class Kind(StrEnum):
    """What has happened."""

    DONE = "done"
    NOT_SUBMITTED = "not submitted"
    WAITING = "waiting"
    RUNNING = "running"
    REQUEUED = "requeued"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time limit"
    CANCELLED = "cancelled"
    DEPENDENCY = "dependency never satisfied"
    NODE_FAILURE = "node failure"
    BAD_GPU = "bad GPU"
    NETWORK = "network error"
    GPU_MEMORY = "out of GPU memory"
    HOST_MEMORY = "out of host memory"
    DISK_FULL = "disk full"
    BAD_INPUT = "bad input"
    BAD_ITEM = "crash in an item"
    MISSING_COMMAND = "missing command"
    ENVIRONMENT = "broken environment"
    HANG = "hanging collective"
    RANK_DIED = "a rank died"
    UNKNOWN = "unknown"


class Policy(StrEnum):
    """What is to be done. A free retry is no fault of the work; a counted one ends with a failure record after three."""

    NOTHING = "nothing to do"
    RETRY_FREE = "retry, not counted"
    RETRY_COUNTED = "retry, counted"
    EXCLUDE_NODE = "retry without the node"
    STOP = "stop until somebody has acted"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLog:
    """The end of what one rank has written in its newest life: its output, then its errors."""

    rank: int
    node: str = ""  # empty: not known
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one element. Everything but its name may be missing."""

    stage: str
    shard: int
    submitted: bool = True
    finished: bool = False  # every item of the shard is made, or has failed for good
    waits: bool = False  # for an element of another array
    blind: bool = False  # no scheduler could be asked: it may still wait or run
    state: str = ""  # by squeue
    accounted: str = ""  # by sacct, of the newest life: a hint, often late
    reason: str = ""  # by squeue
    exit_code: int | None = None
    signal: int | None = None
    nodes: tuple[str, ...] = ()
    num_restarts: int = 0
    logs: tuple[RankLog, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """A line of a log that says what has happened."""

    rank: int  # whose log it is
    node: str
    line: str
    about: str = ""  # another node than the rank's own, if the line names one


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What has happened to an element."""

    stage: str
    shard: int
    kind: Kind
    text: str  # in plain words
    policy: Policy
    advice: str  # what the user does; {run}, {stage} and {shard} stand for themselves
    quotes: tuple[Quote, ...] = ()
    nodes: tuple[str, ...] = ()  # that may be to blame
    is_hard: bool = False  # broken hardware, beyond doubt


@dataclass(frozen=True, slots=True)
class Meaning:
    text: str
    policy: Policy
    advice: str


SUBMIT = "`ipt2v submit` as before: finished items are kept, and a video that was cut off goes on at its last saved step"
MEANINGS = {
    Kind.DONE: Meaning("Everything of this shard is made, or has failed for good.", Policy.NOTHING, ""),
    Kind.NOT_SUBMITTED: Meaning("No submission has this shard.", Policy.NOTHING, SUBMIT),
    Kind.WAITING: Meaning("It waits in the queue.", Policy.NOTHING, ""),
    Kind.RUNNING: Meaning("It runs.", Policy.NOTHING, "`ipt2v logs {run} {stage} {shard} -f` follows it"),
    Kind.REQUEUED: Meaning("SLURM has ended it and runs it again by itself.", Policy.RETRY_FREE, ""),
    Kind.PREEMPTED: Meaning("A job with a higher priority took its nodes.", Policy.RETRY_FREE, SUBMIT),
    Kind.TIME_LIMIT: Meaning("It reached its time limit.", Policy.RETRY_FREE, SUBMIT),
    Kind.CANCELLED: Meaning("Somebody cancelled it.", Policy.NOTHING, SUBMIT),
    Kind.DEPENDENCY: Meaning(
        "It never started: the first_frame element that it waits for did not succeed.",
        Policy.RETRY_FREE,
        "`ipt2v why {run} first_frame {shard}` tells why; then " + SUBMIT,
    ),
    Kind.NODE_FAILURE: Meaning("A node failed, or SLURM lost sight of it.", Policy.RETRY_FREE, SUBMIT),
    Kind.BAD_GPU: Meaning(
        "A GPU or its driver failed.", Policy.EXCLUDE_NODE, "`ipt2v nodes {run}` has the line for the cluster file; then submit"
    ),
    Kind.NETWORK: Meaning(
        "The ranks could not reach each other: NCCL or the network between the nodes failed.",
        Policy.RETRY_COUNTED,
        "submit again; if it comes back, set NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME in `setup` of the cluster file",
    ),
    Kind.GPU_MEMORY: Meaning(
        "A GPU had too little memory.",
        Policy.STOP,
        "`ipt2v plan` prints what each GPU needs: more GPUs for a video, video.weights_sharding=fsdp2 or a smaller "
        "video.width; if the log shows memory in use by another process, the node was not yours alone",
    ),
    Kind.HOST_MEMORY: Meaning(
        "A node had too little memory, and the kernel killed a rank.",
        Policy.STOP,
        "raise mem_gb of {stage} in the cluster file; a local_weights_dir in memory (/dev/shm) counts, too",
    ),
    Kind.DISK_FULL: Meaning("A disk or a quota is full.", Policy.STOP, "free space; then " + SUBMIT),
    Kind.BAD_INPUT: Meaning("What it was given is not right; it will fail again.", Policy.STOP, "do what the line says"),
    Kind.BAD_ITEM: Meaning(
        "It crashed while it made an item.",
        Policy.RETRY_COUNTED,
        "submit again; after three crashes the item counts as failed and the others go on",
    ),
    Kind.MISSING_COMMAND: Meaning(
        "A command is not there on the node.", Policy.STOP, "correct `setup` or `container` in the cluster file"
    ),
    Kind.ENVIRONMENT: Meaning(
        "Python, a package or a driver on the node is not as it is where you submit.",
        Policy.STOP,
        "install into an environment that every node sees, and name it in `setup` of the cluster file",
    ),
    Kind.HANG: Meaning(
        "The ranks waited for each other until the time-out; each has written where it was.", Policy.RETRY_COUNTED, SUBMIT
    ),
    Kind.RANK_DIED: Meaning(
        "A rank was killed, or fell, from one moment to the next.",
        Policy.RETRY_COUNTED,
        "submit again; if it comes back, the node's memory is the first suspect (mem_gb in the cluster file)",
    ),
    Kind.UNKNOWN: Meaning(
        "It ended, and nothing says why.", Policy.RETRY_COUNTED, "`ipt2v logs {run} {stage} {shard}` has all there is; submit"
    ),
}
NO_REQUEUE = Meaning("Its time was up, and the node has no scontrol to put it back into the queue.", Policy.RETRY_FREE, SUBMIT)
KILLED = Meaning(
    "It was killed (SIGKILL) without a word: nearly always the kernel, out of memory.",
    Policy.STOP,
    MEANINGS[Kind.HOST_MEMORY].advice,
)
BLIND = Meaning(
    "Neither squeue nor sacct can be asked here: it may wait, run or have ended.",
    Policy.NOTHING,
    "ask again where they are; `ipt2v logs {run}` shows when each log was last written to",
)
NEVER_STARTED = Meaning("It left the queue before it started.", Policy.RETRY_FREE, SUBMIT)
SOME_MISSING = Meaning("It ended well, but items of its shard are missing.", Policy.RETRY_FREE, SUBMIT)
DAMAGED = Meaning(
    "A file of weights is damaged.", Policy.STOP, "`ipt2v weights check CONFIG --weights DIR --hash` finds it, `fetch` mends it"
)
FIRST_FRAME_CRASH = Meaning(
    "It crashed while it made an item.",
    Policy.RETRY_COUNTED,
    "submit again; if it comes back, `ipt2v logs {run} {stage} {shard}` shows after which item it was",
)
EXCEPTION = Meaning(
    "An exception ended it that is not in our table.", Policy.RETRY_COUNTED, "`ipt2v logs {run} {stage} {shard}` has all of it"
)
HELD = Meaning("It is held in the queue.", Policy.STOP, "`scontrol release` lets it go, or `ipt2v cancel {run}` and submit")


@dataclass(frozen=True, slots=True)
class Pattern:
    """Words of a log and what they mean."""

    kind: Kind
    regex: re.Pattern[str]
    is_hard: bool = False
    meaning: Meaning | None = None  # another than the kind's


def _row(kind: Kind, words: str, *, is_hard: bool = False, meaning: Meaning | None = None) -> Pattern:
    return Pattern(kind, re.compile(words), is_hard, meaning)


# The most specific first: of two rows that match, in whatever log, the upper one is the cause.
CAUSES = (
    # docs.nvidia.com/deploy/xid-errors: 13, 31, 43 and 45 are mostly the program's own fault, the others the hardware's
    _row(Kind.BAD_GPU, r"\bXid\b[^:]*(?::[^:]*){0,3}: (?!(?:13|31|43|45)\b)\d+\b", is_hard=True),
    # cudaErrorECCUncorrectable, cudaErrorNvlinkUncorrectable; dmesg of Xid 79; RmInitAdapter: the driver cannot start the GPU
    _row(Kind.BAD_GPU, r"(?i)uncorrectable (?:nvlink |ecc )+error|ECC_UNCORRECTABLE", is_hard=True),
    _row(Kind.BAD_GPU, r"fallen off the bus|NVRM: .*RmInitAdapter failed", is_hard=True),
    # ipt2v.atomic, strerror of ENOSPC and EDQUOT; saved steps may be lost without harm, and are then a warning
    _row(Kind.DISK_FULL, r"^(?!.*step \d+ not saved).*(?:disk full; free space|No space left on device|Disk quota exceeded)"),
    # torch.OutOfMemoryError; cuBLAS and NCCL say it in their own words
    _row(Kind.GPU_MEMORY, r"OutOfMemoryError: CUDA|CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"),
    # slurmstepd of SLURM 17 ("oom-kill event(s)") to 24 ("oom_kill event in StepId"); srun; dmesg
    _row(Kind.HOST_MEMORY, r"oom[-_]kill|: tasks? [\d,-]+: Out Of Memory|Out of memory: Killed process"),
    _row(Kind.HOST_MEMORY, r"Exceeded job memory limit|exceeded memory limit.*being killed"),
    # c10/core/impl/alloc_cpu.cpp; CPython; libstdc++
    _row(Kind.HOST_MEMORY, r"DefaultCPUAllocator: (?:can't|not enough)|^(?:\[rank\d+\]: )?MemoryError\b|std::bad_alloc"),
    # submitit/slurm/slurm.py:_requeue calls scontrol: submitit issue 1601
    _row(Kind.MISSING_COMMAND, r"No such file or directory: '(?:\S*/)?scontrol'", meaning=NO_REQUEUE),
    _row(Kind.MISSING_COMMAND, r"(?:slurm_script|sh)\b.*: (?:srun|apptainer|singularity|python\S*): (?:command )?not found"),
    _row(Kind.MISSING_COMMAND, r"slurmstepd\S*: error: execve\(\): .*: No such file|executable file not found in"),
    # CPython; the loader; c10/cuda: drivers of another age than torch
    _row(Kind.ENVIRONMENT, r"^(?:\[rank\d+\]: )?(?:ModuleNotFoundError|ImportError): |: No module named "),
    _row(Kind.ENVIRONMENT, r"cannot open shared object file|version `GLIBC\S*' not found|NVIDIA driver on your system is"),
    _row(Kind.ENVIRONMENT, r"no kernel image is available|Torch not compiled with CUDA|driver version is insufficient"),
    _row(Kind.ENVIRONMENT, r"could not find submitted jobs in path"),  # submitit/core/submission.py: the folder is not shared
    # onnxruntime; safetensors
    _row(
        Kind.BAD_INPUT, r"INVALID_PROTOBUF|SafetensorError: Error while deserial|(?:Invalid|Incomplete)Header", meaning=DAMAGED
    ),
    # our own refusals: run_dir.py, work.py, claims.py, hdf5.py, job.py, __main__.py
    _row(Kind.BAD_INPUT, r"first frames are missing|but the run was frozen as|not as in manifest\.jsonl|not a run folder"),
    _row(Kind.BAD_INPUT, r"of another run|no shard \d+; the run has|\d+ tasks, asked for \d+|^error: "),
    # c10/cuda/CUDAException.cpp; ncclGetErrorString(ncclUnhandledCudaError)
    _row(Kind.BAD_GPU, r"CUDA error: (?:device-side|unspecified launch|an illegal|misaligned|unknown|hardware|operation not)"),
    _row(Kind.BAD_GPU, r"CUDA unknown error|CUDA-capable device\(s\) is/are busy|No CUDA GPUs are available"),
    _row(Kind.BAD_GPU, r"(?i)unhandled cuda error|\bXid\b.*: \d+\b|\bNVRM: "),
    # nccl/src/{transport/net_ib,misc/socket,bootstrap}.cc, ncclGetErrorString(ncclSystemError); torch's TCPStore; gloo's start
    _row(Kind.NETWORK, r"unhandled system error|ncclSystemError|NCCL WARN .*(?:NET/|ibv_|socketStartConnect|[Nn]o socket int)"),
    _row(Kind.NETWORK, r"IBV_WC_|transport retry counter exceeded|No route to host|Network is unreachable|connectFullMesh"),
    _row(Kind.NETWORK, r"client socket has (?:timed out|failed to connect)"),
    _row(Kind.TIME_LIMIT, r"Job not requeued because: "),  # submitit/core/job_environment.py
)
# slurmstepd writes why it ends a life; "JOB" without a cause is scancel, "STEP" without one is --kill-on-bad-exit, too
ENDINGS = (
    _row(Kind.NODE_FAILURE, r"srun: error: Node failure on "),
    _row(Kind.NODE_FAILURE, r"CANCELLED AT \S+ DUE TO NODE FAIL"),
    _row(Kind.PREEMPTED, r"CANCELLED AT \S+ DUE TO PREEMPTION"),
    _row(Kind.TIME_LIMIT, r"CANCELLED AT \S+ DUE TO TIME LIMIT"),
    # submitit guesses by the clock which of the two it is: SLURM's word goes first
    _row(Kind.TIME_LIMIT, r"Caught signal \S+ on \S+: this job is timed-out"),
    _row(Kind.PREEMPTED, r"Caught signal \S+ on \S+: this job is preempted"),
    _row(Kind.REQUEUED, r"CANCELLED AT \S+ DUE TO JOB REQUEUE"),
    _row(Kind.CANCELLED, r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ \*\*\*"),
)
HANGS = (
    _row(Kind.HANG, r"^Timeout \(\d+:\d\d:\d\d(?:\.\d+)?\)!"),  # faulthandler.dump_traceback_later: ipt2v.watch
    _row(Kind.HANG, r"Timed out waiting \d+ms for (?:recv|send) operation"),  # gloo/transport/tcp/unbound_buffer.cc
    _row(Kind.HANG, r"Watchdog caught collective operation timeout|Watchdog got stuck"),  # ProcessGroupNCCL.cpp
)
SIGNALS = (
    _row(Kind.RANK_DIED, r"Fatal Python error: |Signal \d+ \(SIG(?:KILL|SEGV|BUS)\) received by PID"),  # faulthandler; torchrun
    _row(Kind.RANK_DIED, r"^srun: error: \S+: tasks? \S+: (?:Killed|Segmentation fault|Bus error|Illegal|Floating)"),
)
ABORTED = (_row(Kind.RANK_DIED, r"^srun: error: \S+: tasks? \S+: (?:Aborted|Terminated)|terminate called "),)
# what the others see of a rank that is gone
CONSEQUENCES = (
    _row(Kind.RANK_DIED, r"Connection closed by peer|Connection reset by peer"),  # gloo/transport/tcp/pair.cc
    _row(Kind.RANK_DIED, r"ncclRemoteError|remote process exit|NCCL communicator was aborted|DistNetworkError|Broken pipe"),
    _row(Kind.RANK_DIED, r"failed to recv, got 0 bytes|connection was likely closed"),  # torch's TCPStore
)
RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")  # torch puts it before what a rank of a group raises
EXCEPTION_LINE = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)(?::|$)")
FRAME = re.compile(r'File "[^"]*", line \d+, in ')
STAGE_FRAME = re.compile(r'File "[^"]*ipt2v/(?:stages/\w+|video_shard)\.py", line \d+, in (?!make_videos|_load_and_deliver)')
LOADING_FRAME = re.compile(r'File "[^"]*ipt2v/[^"]*", line \d+, in _?(?:load(?!_and)|open|from_pretrained)')
SRUN_TASK = re.compile(r"^srun: error: (?P<node>[\w.-]+): tasks? ")
NAMED_NODE = re.compile(r"Node failure on (?P<node>[\w.-]+)")
SOURCE_LINE = re.compile(r"(?:\[rank\d+\]: ?)?    ")  # of a traceback: what a program would have said
COLLECTIVE_FRAME = re.compile(r'File "[^"]*torch/distributed/')

# sacct and squeue: https://slurm.schedmd.com/squeue.html#SECTION_JOB-STATE-CODES
WAITING_STATES = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
HELD_STATES = {"REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
RUNNING_STATES = {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "SIGNALING", "STAGE_OUT", "STOPPED", "RESIZING"}
REQUEUING_STATES = {"NODE_FAIL", "PREEMPTED", "REQUEUED"}
ENDED_STATES = {
    "TIMEOUT": Kind.TIME_LIMIT,
    "DEADLINE": Kind.TIME_LIMIT,
    "NODE_FAIL": Kind.NODE_FAILURE,
    "BOOT_FAIL": Kind.NODE_FAILURE,
    "LAUNCH_FAILED": Kind.NODE_FAILURE,
    "PREEMPTED": Kind.PREEMPTED,
    "OUT_OF_MEMORY": Kind.HOST_MEMORY,
    "REQUEUED": Kind.REQUEUED,
    "CANCELLED": Kind.CANCELLED,
    "REVOKED": Kind.CANCELLED,
}
NEVER_SATISFIED = "DependencyNeverSatisfied"


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A kind, and what of the evidence says so."""

    kind: Kind
    quotes: tuple[Quote, ...] = ()
    nodes: tuple[str, ...] = ()
    is_hard: bool = False
    meaning: Meaning | None = None
    more: str = field(default="")  # a sentence after the meaning's


def classify(evidence: Evidence) -> Fault:
    """What has happened to an element. Never raises: states and words that nobody knows are Kind.UNKNOWN."""
    verdict = _in_queue(evidence) or _ended(evidence)
    meaning = verdict.meaning or MEANINGS[verdict.kind]
    return Fault(
        stage=evidence.stage,
        shard=evidence.shard,
        kind=verdict.kind,
        text=" ".join(filter(None, (meaning.text, verdict.more))),
        policy=meaning.policy,
        advice=meaning.advice,
        quotes=verdict.quotes,
        nodes=verdict.nodes,
        is_hard=verdict.is_hard,
    )


def _in_queue(evidence: Evidence) -> _Verdict | None:
    """What to say of an element that SLURM has yet to start or to end; None if there is none."""
    # sacct may say NODE_FAIL or PREEMPTED of the life before while squeue has the job again: squeue is right
    state = _word(evidence.state) or _word(evidence.accounted)
    if state in RUNNING_STATES:
        times = f"It is its start number {evidence.num_restarts + 1}." if evidence.num_restarts else ""
        return _Verdict(Kind.RUNNING, more=times)
    if state not in WAITING_STATES:
        return None
    if evidence.reason == NEVER_SATISFIED:
        return _Verdict(Kind.DEPENDENCY)
    if state in HELD_STATES or "held" in evidence.reason.lower():
        return _Verdict(Kind.WAITING, meaning=HELD, more=_because(evidence))
    if evidence.num_restarts or state != "PENDING" or _word(evidence.accounted) in REQUEUING_STATES:
        before = _first(ENDINGS, evidence.logs)
        cause = before.kind if before else ENDED_STATES.get(_word(evidence.accounted), Kind.REQUEUED)
        more = "" if cause == Kind.REQUEUED else f"Before that: {cause}."
        return _Verdict(Kind.REQUEUED, quotes=before.quotes if before else (), more=more)
    return _Verdict(Kind.WAITING, more=_because(evidence))


def _ended(evidence: Evidence) -> _Verdict:
    if evidence.finished:
        return _Verdict(Kind.DONE)
    if not evidence.submitted:
        return _Verdict(Kind.NOT_SUBMITTED)
    state = _word(evidence.state) or _word(evidence.accounted)
    if evidence.reason == NEVER_SATISFIED:
        return _Verdict(Kind.DEPENDENCY)
    logs = evidence.logs
    if state == "COMPLETED" or (not state and _all_ended_well(logs)):
        return _Verdict(Kind.UNKNOWN, meaning=SOME_MISSING)
    return (
        _first(CAUSES, logs)
        or _by_state(state, evidence)
        or _first(ENDINGS, logs)
        or _first_to_fall(logs)
        or _hang(logs)
        or _exception(logs)
        or _first(ABORTED, logs)
        or _loss(logs)
        or _by_exit_code(evidence)
        or _without_words(state, evidence)
    )


def _by_state(state: str, evidence: Evidence) -> _Verdict | None:
    kind = ENDED_STATES.get(state)
    if kind is None:
        return None
    if kind == Kind.CANCELLED and evidence.waits and not evidence.logs and not evidence.nodes:
        return _Verdict(Kind.DEPENDENCY, more="(SLURM has forgotten the reason; somebody may have cancelled it.)")
    said = _first(tuple(row for row in ENDINGS if row.kind == kind), evidence.logs)
    if said:
        return said
    return _Verdict(kind, nodes=evidence.nodes if kind == Kind.NODE_FAILURE else ())


def _first(rows: Iterable[Pattern], logs: tuple[RankLog, ...]) -> _Verdict | None:
    """The first row that matches in some log, with the first line of each log that it matches."""
    for row in rows:
        quotes = tuple(_quotes(row.regex, logs))
        if quotes:
            return _Verdict(row.kind, quotes[:MAX_QUOTES], _nodes_of(quotes, row.kind), row.is_hard, row.meaning)
    return None


def _quotes(regex: re.Pattern[str], logs: tuple[RankLog, ...]) -> Iterator[Quote]:
    for log in logs:
        line = next((line for line in log.lines if regex.search(line) and not SOURCE_LINE.match(line)), None)
        if line is not None:
            named = SRUN_TASK.search(line) or NAMED_NODE.search(line)
            yield Quote(rank=log.rank, node=log.node, line=line, about=named["node"] if named else "")


def _nodes_of(quotes: tuple[Quote, ...], kind: Kind) -> tuple[str, ...]:
    """Where the quoted ranks were. slurmstepd's own line of a node failure comes from a node that lives, so it names none."""
    if kind == Kind.NODE_FAILURE:
        quotes = tuple(quote for quote in quotes if NAMED_NODE.search(quote.line))
    return _distinct(quote.about or quote.node for quote in quotes)


def _first_to_fall(logs: tuple[RankLog, ...]) -> _Verdict | None:
    """A rank that a signal has ended: the first that srun names, as --kill-on-bad-exit has the later ones killed."""
    for log in logs:
        first = next((line for line in log.lines if SRUN_TASK.search(line)), "")
        fallen = _first(SIGNALS[1:], (RankLog(rank=log.rank, node=log.node, lines=(first,)),))
        if fallen:
            return fallen
    return _first(SIGNALS[:1], logs)


def _hang(logs: tuple[RankLog, ...]) -> _Verdict | None:
    """A hang; and where it can be told, the ranks that were not waiting for others: these hang, the others wait for them."""
    found = _first(HANGS, logs)
    if found is None:
        return None
    dumped = [log for log in logs if any(HANGS[0].regex.search(line) for line in log.lines)]
    alone = [log for log in dumped if not any(COLLECTIVE_FRAME.search(line) for line in log.lines)]
    if not alone or len(alone) == len(logs):
        return _Verdict(Kind.HANG, found.quotes)
    frames = [(log, next((line.strip() for line in log.lines if line.startswith('  File "')), "")) for log in alone]
    quotes = tuple(Quote(rank=log.rank, node=log.node, line=line) for log, line in frames if line)
    ranks = ", ".join(str(log.rank) for log in alone)
    more = f"Rank {ranks} did not wait for the others: it is the one that hung."
    return _Verdict(Kind.HANG, (*found.quotes[:1], *quotes)[:MAX_QUOTES], _distinct(log.node for log in alone), more=more)


def _exception(logs: tuple[RankLog, ...]) -> _Verdict | None:
    """The exception that ended a rank, unless it only says that another is gone."""
    for log in logs:
        line = _last_exception(log.lines)
        if not line or any(row.regex.search(line) for row in CONSEQUENCES):
            continue
        quotes = (Quote(rank=log.rank, node=log.node, line=line),)
        frames = [frame for frame in log.lines if FRAME.search(frame)]
        if any(STAGE_FRAME.search(frame) for frame in frames) and not any(LOADING_FRAME.search(frame) for frame in frames):
            in_first_frame = any("stages/first_frame.py" in frame for frame in frames)
            return _Verdict(Kind.BAD_ITEM, quotes, meaning=FIRST_FRAME_CRASH if in_first_frame else None)
        if line.partition(":")[0] == "ValueError":  # house rule: input that is not right
            return _Verdict(Kind.BAD_INPUT, quotes)
        return _Verdict(Kind.UNKNOWN, quotes, meaning=EXCEPTION)
    return None


def _last_exception(lines: tuple[str, ...]) -> str:
    """The line that names the exception of the last traceback; or, of one whose beginning is cut off, what looks like it."""
    found, inside = "", False
    for text in lines:
        line = RANK_PREFIX.sub("", text)
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and not line.startswith((" ", "\t")):
            inside, found = False, line
        elif not inside and EXCEPTION_LINE.search(line):
            found = line
    return found


def _loss(logs: tuple[RankLog, ...]) -> _Verdict | None:
    """Ranks that say that another is gone, and none that says why: the silent ones are suspect."""
    found = _first(CONSEQUENCES, logs)
    if found is None:
        return None
    silent = [log for log in logs if not any(row.regex.search(line) for row in CONSEQUENCES for line in log.lines)]
    ranks = ", ".join(str(log.rank) for log in silent)
    more = f"Rank {ranks} says nothing; the others say that it is gone." if silent else ""
    return _Verdict(Kind.RANK_DIED, found.quotes, _distinct(log.node for log in silent), more=more)


def _by_exit_code(evidence: Evidence) -> _Verdict | None:
    """By the number alone. SLURM gives 137 also where one rank raised and it killed the others: so words came first."""
    code, signal = evidence.exit_code or 0, evidence.signal or 0
    number = signal or (code - 128 if code > 128 else code)
    if number == 9:
        return _Verdict(Kind.HOST_MEMORY, meaning=KILLED)
    if number in {4, 7, 8, 11}:  # SIGILL, SIGBUS, SIGFPE, SIGSEGV
        return _Verdict(Kind.RANK_DIED, more=f"(signal {number})")
    return _Verdict(Kind.BAD_INPUT, more="(exit code 2)") if (code, signal) == (2, 0) else None


def _all_ended_well(logs: tuple[RankLog, ...]) -> bool:
    """By submitit's own word in the log of every rank."""
    return bool(logs) and all(any("Job completed successfully" in line for line in log.lines[-20:]) for log in logs)


def _without_words(state: str, evidence: Evidence) -> _Verdict:
    if evidence.blind:
        return _Verdict(Kind.UNKNOWN, meaning=BLIND)
    if not evidence.logs and not evidence.nodes:
        return _Verdict(Kind.DEPENDENCY if evidence.waits else Kind.UNKNOWN, meaning=None if evidence.waits else NEVER_STARTED)
    return _Verdict(Kind.UNKNOWN, more=f"SLURM calls it {printable(state.lower())}." if state else "")


# that may be a node's fault, and not the program's
NODE_KINDS = {Kind.NODE_FAILURE, Kind.BAD_GPU, Kind.NETWORK, Kind.RANK_DIED, Kind.HANG}
# as it should be, or on the way there
FINE_KINDS = {Kind.DONE, Kind.NOT_SUBMITTED, Kind.WAITING, Kind.RUNNING, Kind.REQUEUED}


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
        lines.append(f"  to do: {fault.advice.format(run=run, stage=fault.stage, shard=fault.shard)}")
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


def _because(evidence: Evidence) -> str:
    return f"SLURM's reason: {printable(evidence.reason)}." if evidence.reason not in {"", "None"} else ""


def _word(state: str) -> str:
    """CANCELLED for sacct's "CANCELLED by 1000"."""
    return (state.split() or [""])[0].rstrip("+").upper()


def _distinct(nodes: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node for node in nodes if node))
