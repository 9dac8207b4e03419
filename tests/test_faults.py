"""Claims about what words in logs and states of SLURM mean. Texts marked (seen) were written by the programs themselves."""

from __future__ import annotations

import pytest

from launch.fault_text import expand_nodes, explain, newest_life, node_lines, nodes_to_exclude, printable
from launch.fault_words import CAUSES, MEANINGS, Evidence, Fault, Kind, Policy, RankLog
from launch.faults import classify

# (seen): torch 2.13, gloo, two processes of which one was killed, slept, or raised
GLOO_CLOSED = (
    "[rank0]: Traceback (most recent call last):\n"
    '[rank0]:   File "/x/torch/distributed/distributed_c10d.py", line 3252, in all_reduce\n'
    "[rank0]:     work.wait()\n"
    "[rank0]: RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:32490. This is typically caused by a remote worker crashing. Check the logs of the remote worker before "
    "reporting an error. GLHF! \U0001f3d6\ufe0f"
)
GLOO_RESET = (
    "RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:9884: "
    "Connection reset by peer. This is typically caused by a remote worker hanging or bugs in the application."
)
GLOO_TIMEOUT = (
    "[rank0]: RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting "
    "4000ms for recv operation to complete"
)
STACKS_WAITING = (  # (seen) of ipt2v.watch
    "Timeout (0:00:02)!\nThread 0x00007f1ceb238b80 (most recent call first):\n"
    '  File "/x/torch/distributed/distributed_c10d.py", line 3252 in all_reduce\n  File "/x/g.py", line 26 in <module>'
)
STACKS_ALONE = 'Timeout (0:00:02)!\nThread 0x00007ff5 (most recent call first):\n  File "/x/models/vae.py", line 18 in decode'
# (seen): SLURM 22.05 with submitit 1.5.4; rank 1 of two killed, srun kills rank 0
SRUN_KILLED = (
    "srun: error: node2: task 1: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=23264514.0\n"
    "slurmstepd-node1: error: *** STEP 23264514.0 ON node1 CANCELLED AT 2026-11-23T04:27:50 ***\n"
    "submitit WARNING (2026-11-23 04:27:50,230) - Bypassing signal SIGTERM\nsrun: error: node1: task 0: Killed\n"
    "srun: Force Terminated StepId=23264514.0"
)
SRUN_EXITED = (
    "srun: error: node2: task 1: Exited with exit code 1\nsrun: launch/slurm: _step_signal: Terminating StepId=23264515.0\n"
    "slurmstepd-node1: error: *** STEP 23264515.0 ON node1 CANCELLED AT 2026-11-23T04:27:50 ***\n"
    "srun: error: node1: task 0: Killed\nsrun: Force Terminated StepId=23264515.0"
)
SRUN_SEGFAULT = "srun: error: node2: task 1: Segmentation fault (core dumped)\nsrun: error: node1: task 0: Killed"
SCANCEL = (
    "srun: got SIGCONT\nslurmstepd-node1: error: *** JOB 23264505 ON node1 CANCELLED AT 2026-11-23T04:28:34 ***\n"
    "srun: forcing job termination\nslurmstepd-node1: error: *** STEP 23264505.0 ON node1 CANCELLED AT 2026-11-23T04:28:34 ***"
)
REQUEUE = (
    "submitit WARNING (2026-11-23 04:28:44,018) - Caught signal SIGUSR2 on node1: this job is timed-out.\n"
    "slurmstepd-node1: error: *** STEP 23264518.0 ON node1 CANCELLED AT 2026-11-23T04:28:44 DUE TO JOB REQUEUE ***\n"
    "srun: error: node1: task 0: Terminated"
)
NO_MORE_REQUEUES = "submitit.core.utils.UncompletedJobError: Job not requeued because: timed-out too many times."
NO_SCONTROL = (  # subprocess.check_call in submitit/slurm/slurm.py, Python 3.11 (seen)
    "submitit INFO (2026-11-23 04:28:44,018) - Calling checkpoint method.\n"
    "FileNotFoundError: [Errno 2] No such file or directory: 'scontrol'"
)
DIGEST = "ValueError: /r/config.yaml: digest 7b7402a4d4e5, but the run was frozen as 00ccba0cad06; restore the file"
# as people report them: github.com/{hiyouga/LlamaFactory/issues/7396,snakemake/snakemake-executor-plugin-slurm/pull/371,
# NVIDIA/nccl/issues/975,chrisknewman/tusas/issues/149}
CUDA_OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
    "11.31 GiB is free. Process 1234 has 67.78 GiB memory in use."
)
NCCL_WATCHDOG = (
    "[rank0]:[E321 02:07:08.408271257 ProcessGroupNCCL.cpp:607] [Rank 0] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=1580, OpType=ALLREDUCE, NumelIn=4, NumelOut=4, Timeout(ms)=600000) ran for 600060 milliseconds before "
    "timing out."
)
NCCL_SYSTEM = (
    "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2251, unhandled system error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.21.5"
)
NCCL_CONNECT = (
    "n12:12251:12400 [5] misc/socket.cc:483 NCCL WARN socketStartConnect: Connect to 10.0.0.2<17943> failed : Software caused "
    "connection abort"
)
NCCL_IB = "n1:5:9 [0] transport/net_ib.cc:1295 NCCL WARN NET/IB : Got completion from peer 10.1.1.7<4> with error 12, opcode 0"
OOM_KILL = (
    "slurmstepd: error: Detected 2 oom_kill events in StepId=12.0. Some of the step tasks have been OOM Killed.\n"
    "srun: error: node2: task 1: Out Of Memory"
)
TIME_LIMIT = "slurmstepd: error: *** STEP 12.0 ON node1 CANCELLED AT 2026-01-02T03:04:05 DUE TO TIME LIMIT ***"
PREEMPTION = "slurmstepd: error: *** STEP 12.0 ON node1 CANCELLED AT 2026-01-02T03:04:05 DUE TO PREEMPTION ***"
NODE_FAILURE = (
    "slurmstepd: error: *** STEP 12.0 ON node1 CANCELLED AT 2026-01-02T03:04:05 DUE TO NODE FAILURE, "
    "SEE SLURMCTLD LOG FOR DETAILS ***"
)
XID_79 = "[1234.5] NVRM: Xid (PCI:0000:65:00): 79, pid=1234, name=python, GPU has fallen off the bus."
XID_48 = "kernel: NVRM: Xid (PCI:0000:65:00): 48, pid='<unknown>', name=<unknown>, An uncorrectable double bit error"
XID_31 = "NVRM: Xid (PCI:0000:65:00): 31, pid=1234, name=python, Ch 00000008, intr 00000000. MMU Fault"
ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported"
ASSERT = "RuntimeError: CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable"
DISK = "OSError: [Errno 28] /r/video/parts/a/b.h5: disk full; free space and submit again, finished items are kept"
IN_ITEM = (
    'Traceback (most recent call last):\n  File "/w/ipt2v/video_shard.py", line 190, in _animate\n    for made in x:\n'
    "  File \"/w/ipt2v/stages/video.py\", line 88, in make\n    y()\nRuntimeError: shape '[1, 16]' is invalid for input"
)
IN_LOADING = (
    'Traceback (most recent call last):\n  File "/w/ipt2v/stages/first_frame.py", line 53, in make\n    x()\n'
    '  File "/w/ipt2v/models/faces.py", line 73, in load_face_analysis\n    y()\nsome.library.Strange: [Fail] : 7 : no such'
)
BAD_ONNX = (  # (seen), of an empty file
    "onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf: [ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from "
    "/w/antelopev2/1k3d68.onnx failed:Protobuf parsing failed."
)
DEPENDENCY = {"state": "CANCELLED", "reason": "DependencyNeverSatisfied", "waits": True}


def evidence(*texts: str, **facts: object) -> Evidence:
    """Of an element whose rank i has written texts[i], on node i+1."""
    logs = [RankLog(rank=rank, node=f"node{rank + 1}", lines=tuple(text.split("\n"))) for rank, text in enumerate(texts)]
    given: dict[str, object] = {
        "stage": "video",
        "shard": 3,
        "state": "FAILED",
        "nodes": ("node1", "node2"),
        "logs": tuple(logs),
    }
    return Evidence(**(given | facts))  # type: ignore[arg-type]


def fault(*texts: str, **facts: object) -> Fault:
    return classify(evidence(*texts, **facts))


@pytest.mark.parametrize(
    ("texts", "facts", "kind"),
    [
        ((), {"finished": True, "state": ""}, Kind.DONE),
        ((), {"submitted": False, "state": ""}, Kind.NOT_SUBMITTED),
        ((), {"state": "PENDING", "reason": "Priority"}, Kind.WAITING),
        ((), {"state": "PENDING", "reason": "Dependency"}, Kind.WAITING),
        ((), {"state": "RUNNING", "reason": "None"}, Kind.RUNNING),
        ((), {"state": "COMPLETING"}, Kind.RUNNING),
        ((), {"state": "PENDING", "num_restarts": 1}, Kind.REQUEUED),
        ((), {"state": "PENDING", "accounted": "NODE_FAIL"}, Kind.REQUEUED),
        ((), {"state": "", "accounted": "REQUEUED"}, Kind.REQUEUED),
        ((), {"state": "RUNNING", "accounted": "NODE_FAIL", "num_restarts": 1}, Kind.RUNNING),
        ((), {"state": "REQUEUE_HOLD", "reason": "launch failed requeued held"}, Kind.WAITING),
        ((), {"state": "PENDING", "reason": "DependencyNeverSatisfied"}, Kind.DEPENDENCY),
        ((), DEPENDENCY, Kind.DEPENDENCY),
        ((), {"state": "CANCELLED", "waits": True, "nodes": ()}, Kind.DEPENDENCY),
        ((), {"state": "", "waits": True, "nodes": ()}, Kind.DEPENDENCY),
        ((), {"state": "", "nodes": ()}, Kind.UNKNOWN),
        ((), {"state": "CANCELLED by 1000"}, Kind.CANCELLED),
        ((SCANCEL,), {"state": ""}, Kind.CANCELLED),
        ((), {"state": "TIMEOUT"}, Kind.TIME_LIMIT),
        ((), {"state": "DEADLINE"}, Kind.TIME_LIMIT),
        ((TIME_LIMIT,), {}, Kind.TIME_LIMIT),
        ((NO_MORE_REQUEUES,), {}, Kind.TIME_LIMIT),
        ((PREEMPTION,), {"state": ""}, Kind.PREEMPTED),
        ((), {"state": "", "accounted": "PREEMPTED"}, Kind.PREEMPTED),
        ((NODE_FAILURE,), {"state": ""}, Kind.NODE_FAILURE),
        ((), {"state": "NODE_FAIL"}, Kind.NODE_FAILURE),
        ((), {"state": "BOOT_FAIL"}, Kind.NODE_FAILURE),
        ((), {"state": "OUT_OF_MEMORY"}, Kind.HOST_MEMORY),
        ((OOM_KILL,), {}, Kind.HOST_MEMORY),
        (("slurmstepd: error: Detected 1 oom-kill event(s) in step 3495064.0 cgroup.",), {}, Kind.HOST_MEMORY),
        (
            ("RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory",),
            {},
            "host",
        ),
        ((), {"exit_code": 137}, Kind.HOST_MEMORY),
        ((), {"exit_code": 0, "signal": 9}, Kind.HOST_MEMORY),
        ((CUDA_OOM,), {}, Kind.GPU_MEMORY),
        (("RuntimeError: CUDA error: out of memory",), {}, Kind.GPU_MEMORY),
        ((STACKS_WAITING, STACKS_ALONE), {}, Kind.HANG),
        ((GLOO_TIMEOUT, GLOO_CLOSED), {}, Kind.HANG),
        ((NCCL_WATCHDOG,), {}, Kind.HANG),
        ((NCCL_WATCHDOG + "\nsrun: error: node1: task 0: Aborted (core dumped)",), {}, Kind.HANG),
        ((SRUN_KILLED, ""), {"exit_code": 137}, Kind.RANK_DIED),
        ((GLOO_CLOSED, "hello"), {}, Kind.RANK_DIED),
        ((GLOO_RESET, "hello"), {}, Kind.RANK_DIED),
        ((SRUN_SEGFAULT, "Fatal Python error: Segmentation fault"), {}, Kind.RANK_DIED),
        ((), {"exit_code": 139}, Kind.RANK_DIED),
        ((XID_79,), {}, Kind.BAD_GPU),
        ((XID_48,), {}, Kind.BAD_GPU),
        ((XID_31,), {}, Kind.BAD_GPU),
        ((ECC,), {}, Kind.BAD_GPU),
        ((ASSERT,), {}, Kind.BAD_GPU),
        (("NCCL error in: x.cpp:1, unhandled cuda error, NCCL version 2.21.5",), {}, Kind.BAD_GPU),
        ((NCCL_SYSTEM,), {}, Kind.NETWORK),
        ((NCCL_CONNECT,), {}, Kind.NETWORK),
        ((NCCL_IB,), {}, Kind.NETWORK),
        ((DISK,), {}, Kind.DISK_FULL),
        (("OSError: [Errno 122] Disk quota exceeded: '/r/video/x'",), {}, Kind.DISK_FULL),
        ((DIGEST,), {}, Kind.BAD_INPUT),
        (("ValueError: video shard 0: 2 of 2 first frames are missing (id001/prompt1, ...); first run x",), {}, Kind.BAD_INPUT),
        (("ValueError: something that the table does not have",), {}, Kind.BAD_INPUT),
        ((), {"exit_code": 2}, Kind.BAD_INPUT),
        ((IN_ITEM,), {}, Kind.BAD_ITEM),
        ((IN_LOADING,), {}, Kind.UNKNOWN),
        ((BAD_ONNX,), {}, Kind.BAD_INPUT),
        ((NO_SCONTROL,), {}, Kind.MISSING_COMMAND),
        (("/var/spool/slurmd/job12/slurm_script: line 21: apptainer: command not found",), {}, Kind.MISSING_COMMAND),
        (("slurmstepd: error: execve(): /venv/bin/python: No such file or directory",), {}, Kind.MISSING_COMMAND),
        (("ModuleNotFoundError: No module named 'xfuser'",), {}, Kind.ENVIRONMENT),
        (("OSError: libcudart.so.12: cannot open shared object file: No such file or directory",), {}, Kind.ENVIRONMENT),
        (("KeyError: 'to_q.weight'",), {}, Kind.UNKNOWN),
        (("submitit INFO (x) - Job completed successfully", GLOO_RESET), {"state": "COMPLETED"}, Kind.UNKNOWN),
        (("submitit INFO (x) - Job completed successfully", CUDA_OOM), {"state": ""}, Kind.GPU_MEMORY),
        ((), {"state": "SOMETHING_NEW_IN_SLURM_30", "reason": "??", "exit_code": 77}, Kind.UNKNOWN),
    ],
)
def test_what_is_known_of_an_element_has_one_meaning(texts: tuple[str, ...], facts: dict[str, object], kind: str) -> None:
    expected = Kind.HOST_MEMORY if kind == "host" else kind
    assert fault(*texts, **facts).kind == expected


@pytest.mark.parametrize(
    ("texts", "kind", "rank"),
    [
        ((GLOO_CLOSED + "\n" + SRUN_EXITED, CUDA_OOM), Kind.GPU_MEMORY, 1),
        ((GLOO_CLOSED, OOM_KILL), Kind.HOST_MEMORY, 1),
        ((GLOO_CLOSED + "\n" + OOM_KILL + "\n" + SRUN_KILLED, ""), Kind.HOST_MEMORY, 0),
        ((GLOO_CLOSED + "\n" + SRUN_KILLED, ""), Kind.RANK_DIED, 0),
        ((GLOO_TIMEOUT, XID_79), Kind.BAD_GPU, 1),
        ((NCCL_WATCHDOG, NCCL_IB), Kind.NETWORK, 1),
        ((GLOO_CLOSED + "\n" + SRUN_EXITED, DISK), Kind.DISK_FULL, 1),
        ((SRUN_EXITED, IN_ITEM), Kind.BAD_ITEM, 1),
        ((GLOO_CLOSED, IN_ITEM), Kind.BAD_ITEM, 1),
        ((SRUN_EXITED, "ModuleNotFoundError: No module named 'av'"), Kind.ENVIRONMENT, 1),
        ((TIME_LIMIT + "\nsrun: error: node1: task 0: Killed", GLOO_CLOSED), Kind.TIME_LIMIT, 0),
        ((PREEMPTION + "\nsrun: error: node1: task 0: Killed", GLOO_RESET), Kind.PREEMPTED, 0),
    ],
)
def test_the_cause_wins_over_what_others_see_of_it(texts: tuple[str, ...], kind: Kind, rank: int) -> None:
    found = fault(*texts)
    assert found.kind == kind
    assert found.quotes[0].rank == rank


def test_137_is_not_memory_where_a_rank_has_said_what_it_was() -> None:
    assert fault(SRUN_EXITED, IN_ITEM, exit_code=137).kind == Kind.BAD_ITEM  # (seen): srun killed the others


def test_the_time_limit_that_submitit_has_answered_is_a_requeue() -> None:
    found = fault(REQUEUE, state="PENDING", num_restarts=1)
    assert (found.kind, found.policy) == (Kind.REQUEUED, Policy.RETRY_FREE)
    assert "time limit" in found.text


def test_an_exception_is_quoted_whatever_its_name() -> None:
    found = fault(IN_LOADING)
    assert found.quotes[0].line == "some.library.Strange: [Fail] : 7 : no such"


def test_a_lost_save_of_steps_is_no_full_disk() -> None:
    warning = (
        "2026 video a/b: step 10 not saved: [Errno 28] /r/x: disk full; free space and submit again, finished items are kept"
    )
    assert fault(warning).kind == Kind.UNKNOWN


def test_of_a_hang_the_rank_that_did_not_wait_is_named() -> None:
    found = fault(STACKS_WAITING, STACKS_ALONE)
    assert found.nodes == ("node2",)
    assert "Rank 1 did not wait" in found.text
    assert any("models/vae.py" in quote.line for quote in found.quotes)


def test_of_ranks_that_miss_another_the_silent_one_is_suspect() -> None:
    found = fault(GLOO_CLOSED, "hello")
    assert found.nodes == ("node2",) and "Rank 1 says nothing" in found.text


def test_srun_names_the_node_of_the_rank_that_fell_first() -> None:
    assert fault(SRUN_KILLED, "").nodes == ("node2",)


def test_the_node_that_reports_a_node_failure_is_not_the_one_that_failed() -> None:
    assert fault(NODE_FAILURE).nodes == ()
    assert fault(NODE_FAILURE + "\nsrun: error: Node failure on node7").nodes == ("node7",)


def test_without_a_scheduler_nothing_is_said_to_have_ended() -> None:
    assert "may wait, run or have ended" in fault("hello", state="", blind=True).text
    assert fault(CUDA_OOM, state="", blind=True).kind == Kind.GPU_MEMORY


def test_a_node_without_scontrol_costs_no_credit() -> None:
    assert fault(NO_SCONTROL).policy == Policy.RETRY_FREE


def test_what_an_interruption_takes_is_never_counted() -> None:
    free = {Kind.PREEMPTED, Kind.REQUEUED, Kind.TIME_LIMIT, Kind.NODE_FAILURE}
    assert {kind for kind in free if MEANINGS[kind].policy != Policy.RETRY_FREE} == set()


def test_every_kind_has_a_meaning_and_every_pattern_matches_at_most_a_line() -> None:
    assert set(MEANINGS) == set(Kind)
    assert [row for row in CAUSES if row.regex.search("")] == []


@pytest.mark.parametrize("state", ["", "None", "FAILED+", "cancelled by 0", "\x1b[31m", "💥", "PENDING\n", "A" * 10_000])
@pytest.mark.parametrize(
    "lines", [(), ("",), ("\x00\xff",), (": : : : Xid" * 400,), ("NVRM: " * 600,), ("srun: error: " * 300,)]
)
def test_nothing_unknown_makes_it_raise(state: str, lines: tuple[str, ...]) -> None:
    odd = Evidence(stage="video", shard=0, state=state, accounted=state, reason=state, logs=(RankLog(rank=0, lines=lines),))
    for line in explain(classify(odd), "RUN"):
        assert line.isprintable()


# --- lives ----------------------------------------------------------------------------------------------------------------

START = (
    "submitit INFO ({}) - Starting with JobEnvironment(job_id=7_3, hostname={}, local_rank=0(1), node=0(2), global_rank=0(2))"
)


def test_only_the_newest_life_counts() -> None:
    output = [START.format("2026-11-23 04:27:48,177", "node1"), "old", START.format("2026-11-23 04:28:54,320", "node3"), "new"]
    errors = [*REQUEUE.split("\n"), "srun: Force Terminated StepId=23264518.0", "ValueError: new"]
    log, starts = newest_life(0, output, errors)
    assert (log.node, starts) == ("node3", 2)
    assert log.lines == (output[2], "new", "ValueError: new")


def test_how_the_newest_life_ended_is_kept() -> None:
    output = [START.format("2026-11-23 04:20:00,000", "node1"), START.format("2026-11-23 04:28:00,000", "node1")]
    log, _ = newest_life(0, output, REQUEUE.split("\n"))
    assert set(REQUEUE.split("\n")) <= set(log.lines)


def test_logs_without_a_start_are_taken_whole() -> None:
    assert newest_life(1, ["a"], ["b"]) == (RankLog(rank=1, lines=("a", "b")), 0)


# --- nodes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ([], ()),
        ([fault(XID_79)], ("node1",)),
        ([fault("", ECC)], ("node2",)),
        ([fault(ASSERT)], ()),
        ([fault(ASSERT), fault(XID_31)], ("node1",)),
        ([fault(state="NODE_FAIL", nodes=("node4",))], ()),
        ([fault(state="NODE_FAIL", nodes=("node4",))] * 2, ("node4",)),
        ([fault(state="NODE_FAIL", nodes=("node4", "node5"))] * 9, ()),  # either may be the bad one
        ([fault(NCCL_IB)] * 9, ()),
        ([fault(CUDA_OOM), fault(DISK), fault(SRUN_KILLED, "")] * 9, ()),
    ],
)
def test_a_node_is_excluded_for_hardware_at_once_and_for_the_rest_the_second_time(
    faults: list[Fault], expected: tuple[str, ...]
) -> None:
    assert nodes_to_exclude(faults) == expected
    assert (f"  exclude: {','.join(expected)}" in node_lines(tuple(faults))) == bool(expected)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("node1", ("node1",)),
        ("node[1-2]", ("node1", "node2")),
        ("gpu[01-02,07],big3", ("gpu01", "gpu02", "gpu07", "big3")),
        ("r[1-2]n[1-2]", ("r1n1", "r1n2", "r2n1", "r2n2")),
        ("node[1-2].site", ("node1.site", "node2.site")),
        ("", ()),
        ("(null)", ()),
        ("None assigned", ()),
        ("node[2-x]", ()),
    ],
)
def test_node_lists_are_written_out(text: str, nodes: tuple[str, ...]) -> None:
    assert expand_nodes(text) == nodes


def test_a_node_list_of_millions_is_cut() -> None:
    assert len(expand_nodes("a[1-999999999]b[1-999999999]")) == 4096


# --- the terminal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("  3%|\r 50%|\r100%|", "100%|"),
        ("a\tb", "a    b"),
        ("a\x08\x00b\x7f\x9bc", "a\\x08\\x00b\\x7f\\x9bc"),
        ("abc\u202edef", "abc\\x202edef"),
        ("x" * 300, "x" * 237 + "..."),
        ("\x1b", ""),
    ],
)
def test_a_line_of_a_log_cannot_write_to_the_terminal(line: str, shown: str) -> None:
    assert printable(line) == shown


def test_a_hostile_line_is_quoted_without_its_control_characters() -> None:
    found = fault("ValueError: \x1b[2J\x1b[1;1H all is \x07 well \u202e")
    assert all(line.isprintable() for line in explain(found, "RUN"))


def test_a_line_of_source_in_a_traceback_says_nothing() -> None:
    source = '    raise OSError(errno.ENOSPC, "disk full; free space and submit again")'
    assert fault(f"Traceback (most recent call last):\n{source}\nKeyError: 7").quotes[0].line == "KeyError: 7"


def test_whose_log_it_is_and_what_it_is_about_are_kept_apart() -> None:
    lines = explain(fault(SRUN_KILLED, ""), "RUN")
    assert lines[2:4] == ["  rank 0 on node1: srun: error: node2: task 1: Killed", "  node: node2"]


def test_a_line_that_all_ranks_have_written_is_quoted_once() -> None:
    assert f"  rank 0 on node1, rank 1 on node2: {DIGEST}" in explain(fault(DIGEST, DIGEST), "RUN")


def test_an_explanation_has_the_kind_the_line_and_the_command() -> None:
    assert explain(fault("", CUDA_OOM), "runs/a") == [
        "video 3: out of GPU memory",
        "  A GPU had too little memory.",
        f"  rank 1 on node2: {printable(CUDA_OOM)}",
        f"  to do: {MEANINGS[Kind.GPU_MEMORY].advice}",
    ]
    assert "  to do: `ipt2v nodes runs/a` has the line for the cluster file; then submit" in explain(fault(XID_79), "runs/a")
