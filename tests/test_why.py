"""Claims about `why`, `nodes`, `retry` and `logs`, on run folders without a scheduler and with a pretended one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import Call
from helpers import first_frame, frozen_run, provenance, video_latents
from safetensors.torch import save_file

from ipt2v import hdf5
from ipt2v.records import Failure
from ipt2v.run_dir import RunDir
from launch.cluster import Cluster, Resources
from launch.evidence import ago, bad_nodes, collect, gather, tail
from launch.logs import follow
from launch.queue import Submitted, remember
from launch.retry import rename_lines, submit_command

CUDA_OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB."
GLOO_CLOSED = "[rank0]: RuntimeError: [/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:32490."
START = "submitit INFO (2026-11-23 04:27:48,177) - Starting with JobEnvironment(job_id=70_0, hostname={}, local_rank=0(1))"
XID = "NVRM: Xid (PCI:0000:65:00): 79, pid=1234, name=python, GPU has fallen off the bus."


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of four items in two shards, on a machine without SLURM's commands."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return frozen_run(tmp_path, num_shards=2)


@dataclass(frozen=True)
class Scheduler:
    """squeue and sacct as commands on PATH that print what they were told to."""

    folder: Path

    def command(self, name: str, text: str, code: int = 0, errors: str = "") -> None:
        script = self.folder / name
        stream = f"printf '%s\\n' {shlex.quote(errors)} >&2\n" if errors else ""
        output = f"printf '%s' {shlex.quote(text)}\n" if text else ""
        script.write_text(f"#!/bin/sh\n{output}{stream}exit {code}\n", encoding="utf-8")
        script.chmod(0o755)

    def squeue(self, *rows: tuple[str, str, int, int, str, str]) -> None:
        """Rows of (element, state, status of wait(2), restarts, reason, nodes), for both forms of asking."""
        wide = "".join(f"{a:<32}{b:<20}{c:<12}{d:<8}{e:<64}{f:<400}\n" for a, b, c, d, e, f in rows)
        short = "".join(f"{a}|{b}\n" for a, b, *_ in rows)
        script = self.folder / "squeue"
        script.write_text(
            '#!/bin/sh\ncase "$*" in\n'
            f"*' -O '*) printf '%s' {shlex.quote(wide)};;\n*) printf '%s' {shlex.quote(short)};;\nesac\n",
            encoding="utf-8",
        )
        script.chmod(0o755)


@pytest.fixture
def scheduler(tmp_path: Path, run: RunDir) -> Scheduler:
    return Scheduler(tmp_path / "bin")


def submitted(run: RunDir, *, job_id: str = "70", stage: str = "video", place: str = "slurm", after: str | None = None) -> None:
    shards = (0,) if place == "local" else (0, 1)
    remember(run, Submitted(place=place, stage=stage, job_id=job_id, shards=shards, after=after, name=f"{stage}.{job_id}"))


def write_log(run: RunDir, name: str, text: str, stage: str = "video") -> Path:
    path = run.jobs_path(stage) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_first_frame(run: RunDir, key: str) -> None:
    digest = run.environment().run_digest
    hdf5.save_first_frame(run.part_path("first_frame", key), first_frame(key), provenance(digest))


def write_video(run: RunDir, key: str) -> None:
    digest = run.environment().run_digest
    hdf5.save_video_latents(run.part_path("video", key), video_latents(key), provenance(digest))
    run.mp4_path(key).parent.mkdir(parents=True, exist_ok=True)
    run.mp4_path(key).write_bytes(b"mp4")


def write_position(run: RunDir, key: str, step: int) -> None:
    path = run.position_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = json.dumps({"num_done": step, "num_steps": 50, "numbers": {}, "seconds": 1.0})
    save_file({"latents": torch.zeros(2)}, path, metadata={"facts": facts})


@pytest.fixture
def crashed(run: RunDir) -> RunDir:
    """Shard 0's element ran out of GPU memory on rank 1; rank 0 saw that it was gone."""
    submitted(run)
    write_log(run, "70_0_0_log.out", START.format("node1") + "\nvideo id001/prompt1 9.1 s\n")
    write_log(run, "70_0_0_log.err", GLOO_CLOSED + "\nsrun: error: node2: task 1: Exited with exit code 1\n")
    write_log(run, "70_0_1_log.out", START.format("node2") + "\n")
    write_log(run, "70_0_1_log.err", f"Traceback (most recent call last):\n\x1b[31m{CUDA_OOM}\x1b[0m\n")
    return run


# --- why ------------------------------------------------------------------------------------------------------------------


def test_an_item_is_explained_stage_by_stage(ipt2v: Call, crashed: RunDir) -> None:
    key = "id001/prompt1"
    write_first_frame(crashed, key)
    crashed.note_crash(key, "abc", "RuntimeError: bad shape (rank 1 on node2)")
    write_position(crashed, key, 30)
    lease = crashed.leases_path / f"{key}.lease"
    lease.parent.mkdir(parents=True)
    lease.write_text("video element 0", encoding="utf-8")
    lines = ipt2v("why", crashed.root, key).out.splitlines()
    assert lines[:6] == [
        f"{key}  (shard 0)",
        "  first_frame  made: first_frame/parts/id001/prompt1.h5",
        "  video        not made yet",
        "               crashed (1 of 1): RuntimeError: bad shape (rank 1 on node2)",
        "               saved: goes on after step 30 of 50",
        "               at work on it: video element 0, last sign of life 0 s ago",
    ]
    assert lines[7:10] == [
        "video 0: out of GPU memory  (0 made, 0 failed, 2 missing)",
        "  A GPU had too little memory.",
        f"  rank 1 on node2: {CUDA_OOM}",
    ]


def test_a_stale_lease_and_a_broken_position_say_so(ipt2v: Call, crashed: RunDir) -> None:
    key = "id001/prompt1"
    write_first_frame(crashed, key)
    write_position(crashed, key, 30)
    crashed.position_path(key).write_bytes(b"half")
    lease = crashed.leases_path / f"{key}.lease"
    lease.parent.mkdir(parents=True)
    lease.write_text("video element 0", encoding="utf-8")
    os.utime(lease, (time.time() - 7200, time.time() - 7200))
    text = ipt2v("why", crashed.root, key).out
    assert "starts again at step 0" in text
    assert "last sign of life 2 h ago; that is too long" in text


def test_a_failed_item_has_its_reason_and_the_way_back(ipt2v: Call, run: RunDir) -> None:
    run.save_failure(Failure(key="id002/prompt1", stage="first_frame", reason="no face \x1b[2J larger than 64 px"))
    text = ipt2v("why", run.root, "id002/prompt1").out
    assert "first_frame  failed: no face  larger than 64 px\n" in text
    assert f"to do: `ipt2v retry {run.root} id002/prompt1`, then submit, tries it again;" in text
    assert "with the same photo it fails again, with another one it is another run, RUN2" in text
    assert f"`ipt2v package RUN2 --fill {run.root}`" in text
    ipt2v("retry", run.root, "--failed")
    write_first_frame(run, "id002/prompt1")
    run.save_failure(Failure(key="id002/prompt1", stage="video", reason="3 elements crashed in it"))
    text = ipt2v("why", run.root, "id002/prompt1").out
    assert f"to do: `ipt2v retry {run.root} id002/prompt1`, then submit, makes it again\n" in text and "photo" not in text


def test_of_a_delivered_item_nothing_is_left_to_do(ipt2v: Call, run: RunDir) -> None:
    write_first_frame(run, "id001/prompt1")
    write_video(run, "id001/prompt1")
    answer = ipt2v("why", run.root, "id001/prompt1")
    assert answer.out.splitlines()[-1] == "  video        made: video/id001/prompt1.mp4"
    assert answer.code == 0


def test_an_element_is_explained_without_any_scheduler(ipt2v: Call, crashed: RunDir) -> None:
    lines = ipt2v("why", crashed.root, "video", "0").out.splitlines()
    assert lines[0] == "video 0: out of GPU memory  (0 made, 0 failed, 2 missing)"
    assert lines[-2:] == [
        "  not known: no squeue here: whether an element waits or runs is not known",
        "  not known: no sacct here: what SLURM forgets after minutes (end states, former lives) is not known",
    ]


def test_an_element_that_nobody_submitted_is_no_fault(ipt2v: Call, run: RunDir) -> None:
    assert ipt2v("why", run.root, "video", "1").out.startswith("video 1: not submitted  (")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["id001/promt1"], "near: id001/prompt1"),
        (["video"], "video: no item of"),
        (["video", "x"], "expected an item (id001/prompt1), or"),
        (["film", "3"], "expected an item (id001/prompt1), or"),
        (["video", "9"], "no shard 9; the run has 2: 0..1"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(ipt2v: Call, run: RunDir, words: list[str], problem: str) -> None:
    answer = ipt2v("why", run.root, *words)
    assert (answer.code, answer.err.count("\n"), answer.out) == (2, 1, "")
    assert problem in answer.err


@pytest.mark.parametrize("command", ["why", "nodes", "retry", "logs"])
def test_a_folder_that_is_no_run_is_refused(ipt2v: Call, tmp_path: Path, command: str) -> None:
    answer = ipt2v(command, tmp_path / "nowhere", *(["video", "0"] if command == "why" else []))
    assert answer.code == 2 and "not a run folder" in answer.err


@pytest.mark.parametrize(
    ("row", "sacct", "said"),
    [
        (
            ("70_0", "PENDING", 0, 0, "Priority", ""),
            "",
            "video 0: waiting  (0 made, 0 failed, 2 missing)\n  It waits in the queue. SLURM's reason: Priority.",
        ),
        (
            ("70_0", "RUNNING", 0, 2, "None", "node[1-2]"),
            "",
            "video 0: running  (0 made, 0 failed, 2 missing)\n  It runs. It is its start number 3.",
        ),
        (("70_0", "PENDING", 0, 1, "BeginTime", ""), "70_0|NODE_FAIL|0:0|node[1-2]\n", "video 0: requeued  ("),
        (("70_0", "RUNNING", 0, 1, "None", "node3"), "70_0|NODE_FAIL|0:0|node[1-2]\n", "video 0: running  ("),
        (("70_0", "FAILED", 35072, 0, "NonZeroExitCode", "node[1-2]"), "", "video 0: out of GPU memory  ("),
        (("70_1", "RUNNING", 0, 0, "None", "node3"), "70_0|FAILED|9:0|node[1-2]\n", "video 0: out of GPU memory  ("),
        (("70_0", "PENDING", 0, 0, "DependencyNeverSatisfied", ""), "", "video 0: dependency never satisfied  ("),
        (("70_0", "CANCELLED", 0, 0, "DependencyNeverSatisfied", ""), "", "video 0: dependency never satisfied  ("),
    ],
)
def test_squeue_is_believed_before_sacct(
    ipt2v: Call, crashed: RunDir, scheduler: Scheduler, row: tuple[str, str, int, int, str, str], sacct: str, said: str
) -> None:
    scheduler.squeue(row)
    scheduler.command("sacct", sacct)
    text = ipt2v("why", crashed.root, "video", "0").out
    assert text.startswith(said)
    assert "not known" not in text


def test_a_scheduler_that_is_down_costs_what_it_knows_and_no_more(ipt2v: Call, crashed: RunDir, scheduler: Scheduler) -> None:
    scheduler.command("squeue", "", 1, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    scheduler.command("sacct", "", 1, "Slurm accounting storage is disabled")
    text = ipt2v("why", crashed.root, "video", "0").out
    assert text.startswith("video 0: out of GPU memory  (")
    assert (
        "not known: squeue says: slurm_load_jobs error: Unable to contact slurm controller (connect failure): whether" in text
    )
    assert "not known: sacct says: Slurm accounting storage is disabled: what SLURM forgets" in text


def test_what_a_shell_sets_for_reading_squeue_hides_nothing(
    crashed: RunDir, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("squeue", "sacct"):
        monkeypatch.setenv(f"{name.upper()}_FORMAT", "%i")
        scheduler.command(name, "")
        (scheduler.folder / name).write_text(f'#!/bin/sh\n[ -z "${name.upper()}_FORMAT" ]\n', encoding="utf-8")
    assert gather(crashed).lost == ()


def test_jobs_that_squeue_has_forgotten_are_over(crashed: RunDir, scheduler: Scheduler) -> None:
    scheduler.command("squeue", "", 1, "slurm_load_jobs error: Invalid job id specified")
    scheduler.command("sacct", "70_1|RUNNING|0:0|node3\n")  # it has not heard of the end yet
    known = gather(crashed)
    assert (known.lost, known.blind) == ((), False)
    assert collect(known, "video", 1).accounted == ""


def test_numbers_of_the_scheduler_are_read(crashed: RunDir, scheduler: Scheduler) -> None:
    scheduler.squeue(("70_0", "FAILED", 35072, 1, "NonZeroExitCode", "node[1-2]"))
    scheduler.command("sacct", "70_0|NODE_FAIL|0:0|node7\n70_0|FAILED|9:0|node[1-2]\n70_[1-3]|PENDING|0:0|None assigned\n")
    found = collect(gather(crashed), "video", 0)
    assert (found.state, found.exit_code, found.signal, found.num_restarts) == ("FAILED", 137, 0, 1)
    assert found.nodes == ("node1", "node2") and [log.node for log in found.logs] == ["node1", "node2"]


def test_an_unknown_state_and_a_strange_table_are_taken_as_they_are(ipt2v: Call, run: RunDir, scheduler: Scheduler) -> None:
    submitted(run)
    scheduler.squeue(("70_0", "\x1b[31mNEW", 0, 0, "??", "node[1-"))
    scheduler.command("sacct", "nonsense\n||||\n70_0|ODD\n")
    answer = ipt2v("why", run.root, "video", "0")
    assert answer.code == 0 and answer.out.startswith("video 0: unknown  (") and "\x1b" not in answer.out


# --- nodes ----------------------------------------------------------------------------------------------------------------


def test_nodes_with_broken_hardware_come_with_the_line_for_the_cluster_file(ipt2v: Call, run: RunDir) -> None:
    submitted(run)
    write_log(run, "70_0_0_log.out", START.format("node3") + "\n")
    write_log(run, "70_0_0_log.err", XID + "\n")
    write_log(run, "70_1_0_log.out", START.format("node5") + "\n")
    write_log(run, "70_1_0_log.err", "RuntimeError: CUDA error: device-side assert triggered\n")
    lines = ipt2v("nodes", run.root).out.splitlines()
    assert lines[:2] == [f"{'node3':<20} bad GPU (hardware) x 1", f"{'node5':<20} bad GPU x 1"]
    assert "  exclude: node3" in lines


def test_the_next_submission_is_not_given_a_broken_node(ipt2v: Call, run: RunDir) -> None:
    submitted(run)
    assert bad_nodes(run) == ()
    write_log(run, "70_0_0_log.out", START.format("node3") + "\n")
    write_log(run, "70_0_0_log.err", XID + "\n")
    assert bad_nodes(run) == ("node3",)
    site = Cluster(video=Resources(exclude="node1")).without(bad_nodes(run))
    assert (site.video.exclude, site.first_frame.exclude) == ("node1,node3", "node3")
    assert Cluster().without(()) == Cluster()


def test_where_every_node_seems_broken_none_is_left_out(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted(run)
    write_log(run, "70_0_0_log.out", START.format("node3") + "\n")
    write_log(run, "70_0_0_log.err", XID + "\n")
    monkeypatch.setattr("launch.evidence.MAX_EXCLUDED", 0)
    assert bad_nodes(run) == ()


def test_two_node_failures_in_former_lives_count(ipt2v: Call, run: RunDir, scheduler: Scheduler) -> None:
    submitted(run)
    scheduler.squeue(("70_0", "RUNNING", 0, 2, "None", "node1"))
    scheduler.command("sacct", "70_0|NODE_FAIL|0:0|node7\n70_0|NODE_FAIL|0:0|node7\n70_0|RUNNING|0:0|node1\n")
    text = ipt2v("nodes", run.root).out
    assert f"{'node7':<20} node failure x 2" in text and "  exclude: node7" in text


def test_without_faults_of_nodes_nothing_is_excluded(ipt2v: Call, crashed: RunDir) -> None:
    assert ipt2v("nodes", crashed.root).out.startswith("no element has failed in a way that points to a node\n")


# --- retry ----------------------------------------------------------------------------------------------------------------


def test_a_retried_item_counts_as_missing_again_and_its_record_is_kept(ipt2v: Call, run: RunDir) -> None:
    key = "id001/prompt1"
    write_first_frame(run, key)
    for attempt in range(2):
        run.save_failure(Failure(key=key, stage="video", reason=f"3 elements crashed in it, {attempt}"))
        run.note_crash(key, f"life{attempt}", "RuntimeError: bad")
        text = ipt2v("retry", run.root, "--failed").out
        assert f"{key}: failed in video, 1 crash notes; put aside\n1 items are made again by: ipt2v submit " in text
        assert run.failures() == [] and run.crashes(key) == []
        assert run.count("video", 0, [key]).missing == 1
    aside = sorted(str(path.relative_to(run.root / "failure" / "retried")) for path in run.root.rglob("retried/**/*.*"))
    assert aside == [f"crashes/{key}/life0.txt", f"crashes/{key}/life1.txt", f"video/{key}.1.json", f"video/{key}.json"]


def test_only_the_named_stage_and_items_are_retried(ipt2v: Call, run: RunDir) -> None:
    for key, stage in (("id001/prompt1", "first_frame"), ("id001/prompt2", "video"), ("id002/prompt1", "video")):
        run.save_failure(Failure(key=key, stage=stage, reason="x"))
    ipt2v("retry", run.root, "--failed", "--stage", "first_frame")
    assert [failure.key for failure in run.failures()] == ["id001/prompt2", "id002/prompt1"]
    ipt2v("retry", run.root, "id002/prompt1")
    assert [failure.key for failure in run.failures()] == ["id001/prompt2"]
    assert ipt2v("retry", run.root, "id001/prompt1").out.startswith("nothing to retry")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "name items, or --failed for all 1 that have failed"),
        (["--failed", "id001/prompt1"], "name items, or --failed"),
        (["id001/prompt1", "id009/prompt1"], "id009/prompt1: no item of"),
        (["--failed", "--stage", "film"], "known: first_frame, video"),
    ],
)
def test_a_wrong_retry_moves_nothing(ipt2v: Call, run: RunDir, words: list[str], problem: str) -> None:
    run.save_failure(Failure(key="id001/prompt1", stage="video", reason="x"))
    answer = ipt2v("retry", run.root, *words)
    assert answer.code == 2 and problem in answer.err
    assert len(run.failures()) == 1


def test_a_retry_of_a_run_with_changed_settings_moves_nothing(ipt2v: Call, run: RunDir) -> None:
    run.save_failure(Failure(key="id001/prompt1", stage="video", reason="x"))
    run.config_path.write_text(run.config_path.read_text().replace("fps: 16", "fps: 24"))
    answer = ipt2v("retry", run.root, "--failed")
    assert answer.code == 2 and "config.yaml: digest" in answer.err
    assert len(run.failures()) == 1


def test_the_command_that_retry_prints_goes_on_with_the_same_run(ipt2v: Call, run: RunDir) -> None:
    words = shlex.split(submit_command(run).removesuffix(" --cluster FILE"))
    text = ipt2v("plan", *words[2:], "--on", "local").out
    assert text.startswith(f"run    {run.root} (goes on)\n")


def test_that_command_can_be_read_from_any_folder(ipt2v: Call, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.root.parent)
    words = shlex.split(submit_command(RunDir(Path(run.root.name))).removesuffix(" --cluster FILE"))
    monkeypatch.chdir("/")
    assert ipt2v("plan", *words[2:], "--on", "local").out.startswith(f"run    {run.root} (goes on)\n")


@pytest.mark.parametrize("command", ["retry", "verify"])
def test_a_renamed_run_is_to_be_renamed_back_first(ipt2v: Call, run: RunDir, command: str) -> None:
    """Else the command would make a new run from nothing."""
    run.save_failure(Failure(key="id001/prompt1", stage="video", reason="x"))
    renamed = RunDir(run.root.with_name("final run"))
    run.root.rename(renamed.root)
    text = ipt2v(command, renamed.root, *(["--failed"] if command == "retry" else [])).out
    rename = shlex.join(["mv", str(renamed.root), str(run.root)])
    assert f"first rename it back, by: {rename}\n" in text
    assert text.index(rename) < text.index(f"ipt2v submit {run.config_path} ")
    assert f"ipt2v submit {renamed.root}" not in text
    subprocess.run(["/bin/mv", *shlex.split(rename)[1:]], check=True)
    words = shlex.split(submit_command(run).removesuffix(" --cluster FILE"))
    assert ipt2v("plan", *words[2:], "--on", "local").out.startswith(f"run    {run.root} (goes on)\n")


def test_a_renamed_run_is_not_moved_into_another(run: RunDir) -> None:
    renamed = RunDir(run.root.with_name("final"))
    shutil.copytree(run.root, renamed.root)
    (line,) = rename_lines(renamed)
    assert f"{run.root} is what it would go on with; move that away" in line
    assert rename_lines(run) == []


def test_a_run_behind_a_link_has_its_name(run: RunDir) -> None:
    link = RunDir(run.root.with_name("latest"))
    link.root.symlink_to(run.root.name)
    assert rename_lines(link) == [] and submit_command(link) == submit_command(run)


# --- logs -----------------------------------------------------------------------------------------------------------------


def test_logs_are_listed_with_those_of_failed_elements_first(ipt2v: Call, crashed: RunDir, scheduler: Scheduler) -> None:
    scheduler.squeue(("70_0", "FAILED", 256, 0, "", "node1"), ("70_1", "RUNNING", 0, 0, "None", "node3"))
    write_log(crashed, "70_1_0_log.out", START.format("node3") + "\nvideo id002/prompt1 8.0 s\n")
    head, *lines = ipt2v("logs", crashed.root).out.splitlines()
    assert head.split() == ["element", "state", "size", "age", "last", "line"]
    assert len(lines) == 5
    assert {line[:26].strip() for line in lines[:4]} == {
        f"video 0 rank {rank} {kind}" for rank in (0, 1) for kind in ("out", "err")
    }
    assert all("out of GPU memory" in line for line in lines[:4])
    assert lines[4].split() == [*["video", "1", "rank", "0", "out", "running"], *lines[4].split()[6:9], *lines[4].split()[9:]]
    assert lines[4].endswith("video id002/prompt1 8.0 s")


def test_logs_show_no_control_characters(ipt2v: Call, crashed: RunDir) -> None:
    text = ipt2v("logs", crashed.root, "video", "0", "--rank", "1").out
    assert CUDA_OOM in text and "\x1b" not in text
    assert "\x1b" not in ipt2v("logs", crashed.root).out


def test_logs_of_a_run_that_has_none_say_so(ipt2v: Call, run: RunDir) -> None:
    assert "no log yet" in ipt2v("logs", run.root).out
    assert ipt2v("logs", run.root, "video").code == 2
    assert ipt2v("logs", run.root, "video", "0", "-f").code == 2


def test_following_shows_what_comes_until_the_element_is_over(
    crashed: RunDir, scheduler: Scheduler, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.logs.QUEUE_POLL_SECONDS", 0.0)
    scheduler.squeue(("70_0", "RUNNING", 0, 0, "None", "node1"))
    out, seen = crashed.jobs_path("video") / "70_0_0_log.out", threading.Event()

    def sleep(seconds: float) -> None:
        if not seen.is_set():
            with out.open("a", encoding="utf-8") as file:
                file.write("video id001/prompt2 7.0 s\nhalf a li")
            seen.set()
        else:
            with out.open("a", encoding="utf-8") as file:
                file.write("ne\x1b[2J\n")
            scheduler.squeue(("70_0", "COMPLETED", 0, 0, "None", "node1"))

    end = follow(crashed, "video", 0, 0, sleep)
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("==>")).endswith("70_0_0_log.out <==")
    assert lines[-1] == "half a line" and lines.count("video id001/prompt2 7.0 s") == 1
    assert lines.count("video id001/prompt1 9.1 s") == 1
    assert "is not in the queue any more" in end


# --- small things ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (59, "59 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (2e5, "2 d")]
)
def test_ages_are_short(seconds: float, text: str) -> None:
    assert ago(seconds) == text


def test_the_tail_of_a_long_log_begins_with_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"line %05d\n" % number for number in range(10_000)) + b"\xff\xfe")
    lines = tail(path, 1000)
    assert lines[0].startswith("line ") and len(lines[0]) == 10 and lines[-1] == "\ufffd\ufffd"
    assert tail(tmp_path / "none") == []
