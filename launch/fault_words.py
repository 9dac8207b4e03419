"""What faults are called, what is to be done about them, and the words of logs that tell them. Pure tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


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
        "It never started: the element of the stage before, which it waits for, did not succeed.",
        Policy.RETRY_FREE,
        "`ipt2v why {run} {before} {shard}` tells why; then " + SUBMIT,
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

# that may be a node's fault, and not the program's
NODE_KINDS = {Kind.NODE_FAILURE, Kind.BAD_GPU, Kind.NETWORK, Kind.RANK_DIED, Kind.HANG}
# as it should be, or on the way there
FINE_KINDS = {Kind.DONE, Kind.NOT_SUBMITTED, Kind.WAITING, Kind.RUNNING, Kind.REQUEUED}
