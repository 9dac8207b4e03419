"""Claims about submission to SLURM, on commands that answer as SLURM does on bad days: nothing is lost, nothing runs twice."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from helpers import ROOT, frozen_run, write_tree

from ipt2v.leases import Leases
from ipt2v.records import Failure
from ipt2v.run_dir import RunDir, owner_of
from launch import controller
from launch.cluster import Cluster, Resources
from launch.controller import NoAnswer, parse_max_array_size
from launch.lock import Locked, run_lock
from launch.plan import Submission, plan_submissions
from launch.progress import count_all
from launch.queue import Submitted, cancel, intents, live_elements, living, settle, submissions
from launch.submit import Submitter

IPT2V = Path(sys.executable).parent / "ipt2v"
FIVE = tuple(f"id{number:03d}" for number in range(1, 6))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Five shards, nothing made."""
    write_tree(tmp_path / "testset", FIVE, num_prompts=1)
    return frozen_run(tmp_path, num_shards=5)


def submit(run: RunDir, cluster: Cluster | None = None) -> list[Submitted]:
    """As the command does it, without its pauses."""
    done: list[Submitted] = []
    with run_lock(run, "submit --on slurm"):
        settle(run, final=True)
        plan = plan_submissions(count_all(run), living(run, for_slurm=True))
        Submitter(run=run, cluster=cluster or Cluster(), pauses=(0, 0, 0)).submit(plan, done.append)
    return done


def submit_command(run: RunDir, *words: str) -> subprocess.CompletedProcess[str]:
    testset, weights = (str(run.root.parent.parent / name) for name in ("testset", "weights"))
    command = [IPT2V, "submit", ROOT / "configs" / "demo.yaml", f"testset.path={testset}", "--on", "slurm", *words]
    command += ["--weights", weights, "--runs", run.root.parent]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def queued(slurm: FakeSlurm) -> list[tuple[str, str, str]]:
    """(stage, array, dependency) of each array in the queue."""
    return [(job["job-name"].split(".")[-3], job["array"].partition("%")[0], job["dependency"]) for job in slurm.queue]


BOTH = [("first_frame", "0-4", ""), ("video", "0-4", "aftercorr:1001")]


def test_a_run_is_two_arrays_the_second_after_the_first(run: RunDir, slurm: FakeSlurm) -> None:
    first, second = submit(run)
    assert queued(slurm) == BOTH
    assert (first.job_id, second.after) == ("1001", "1001")
    assert first.shards == second.shards == (0, 1, 2, 3, 4)


def test_all_is_written_before_sbatch_is_called(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run)
    for call in slurm.calls:
        assert set(call["beside"]) == {f"{call['job-name']}.{kind}" for kind in ("pkl", "sh", "submitting")}


def test_an_array_has_one_small_pickle_however_long_it_is(run: RunDir, slurm: FakeSlurm) -> None:
    plan = [Submission(stage="first_frame", shards=tuple(range(1000)), after=False)]
    Submitter(run=run, cluster=Cluster()).submit(plan, lambda _: None)
    (path,) = run.root.rglob("*.pkl")
    assert path.stat().st_size < 10_000
    call = pickle.loads(path.read_bytes())
    assert (len(call.function.shards), call.function.job.stage) == (1000, "first_frame")


def test_a_job_is_named_after_run_stage_attempt_and_window(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run)
    slurm.forget("1001", "1002")
    submit(run)
    name = run.root.name
    assert [job["job-name"] for job in slurm.calls] == [
        *(f"{name}.{stage}.1.0" for stage in ("first_frame", "video")),
        *(f"{name}.{stage}.2.0" for stage in ("first_frame", "video")),
    ]


def test_a_script_says_for_itself_what_a_site_may_have_otherwise(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run)
    first, second = (call["text"].splitlines() for call in slurm.calls)
    for script in (first, second):
        assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(script)
        (srun,) = [line for line in script if line.startswith("srun ")]
        assert "--kill-on-bad-exit=1" in srun
    assert "#SBATCH --kill-on-invalid-dep=yes" in second


# --- windows ------------------------------------------------------------------------------------------------------------


def test_an_array_that_is_too_long_is_cut_and_each_part_waits_for_its_own_partner(run: RunDir, slurm: FakeSlurm) -> None:
    slurm.write("max_array_size", 2)
    done = submit(run, Cluster(video=Resources(array_parallelism=4)))
    assert queued(slurm) == [
        ("first_frame", "0-1", ""),
        ("video", "0-1", "aftercorr:1001"),
        ("first_frame", "0-1", ""),
        ("video", "0-1", "aftercorr:1003"),
        ("first_frame", "0", ""),
        ("video", "0", "aftercorr:1005"),
    ]
    assert [one.shards for one in done if one.stage == "video"] == [(0, 1), (2, 3), (4,)]
    assert [call["array"].partition("%")[2] for call in slurm.calls if ".video." in call["job-name"]] == ["2", "1", "1"]
    assert {name.split(".")[-1] for name in (call["job-name"] for call in slurm.calls)} == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ("MaxArraySize            = 501", 501),
        ("MaxArraySize = 10001\nSchedulerParameters = bf_max_job_test=5,max_array_tasks=400,x", 400),
        ("slurm_load_ctl_conf error: Unable to contact slurm controller", 1001),
        ("MaxArraySize = 0", 1),
    ],
)
def test_the_longest_array_is_what_the_site_says(config: str, size: int) -> None:
    assert parse_max_array_size(config) == size


# --- sbatch without an answer -------------------------------------------------------------------------------------------


def test_an_array_that_slurm_took_without_saying_so_is_found_by_name(run: RunDir, slurm: FakeSlurm) -> None:
    slurm.will("accept_and_time_out")
    first, second = submit(run)
    assert (first.job_id, second.after) == ("1001", "1001")
    assert queued(slurm) == BOTH


@pytest.mark.parametrize("answer", ["time_out", "busy"])
def test_an_array_that_slurm_did_not_take_is_submitted_again_by_another_name(
    run: RunDir, slurm: FakeSlurm, answer: str
) -> None:
    slurm.will(answer, answer)
    first, second = submit(run)
    assert (first.name, second.after) == (f"{run.root.name}.first_frame.3.0", "1003")
    dropped = [path.stem for path in run.root.rglob("*.dropped")]
    assert sorted(dropped) == [f"{run.root.name}.first_frame.{attempt}.0" for attempt in (1, 2)]
    assert intents(run) == []


def test_a_refusal_is_one_clear_error_at_once(run: RunDir, slurm: FakeSlurm) -> None:
    slurm.will("refuse")
    with pytest.raises(ValueError, match="sbatch refused the first_frame array: error: invalid partition specified: nope"):
        submit(run)
    assert len(slurm.calls) == 1
    assert intents(run) == [] and submissions(run) == []


def test_without_an_answer_for_long_the_next_submit_looks_first(run: RunDir, slurm: FakeSlurm) -> None:
    slurm.will("accept_and_time_out")
    slurm.squeue_answers(False)
    with pytest.raises(OSError, match=r"whether SLURM has demo-\w+\.first_frame\.1\.0 is not known; submit again"):
        submit(run)
    with pytest.raises(NoAnswer):
        submit(run)
    assert len(slurm.calls) == 1
    slurm.squeue_answers(True)
    submit(run)
    assert queued(slurm) == BOTH


def test_a_queue_that_does_not_answer_is_no_empty_queue(run: RunDir, slurm: FakeSlurm) -> None:
    submit(run)
    slurm.squeue_answers(False)
    with pytest.raises(NoAnswer):
        submit(run)
    assert len(slurm.calls) == 2
    assert live_elements(run) == {}  # to status it is


@pytest.mark.parametrize(("answers", "left"), [(False, {0, 1}), (True, {1})])
def test_leases_are_freed_only_of_elements_that_squeue_says_are_gone(
    run: RunDir, slurm: FakeSlurm, answers: bool, left: set[int]
) -> None:
    submit(run)
    slurm.end("1001", "FAILED", 0)
    slurm.end("1002", "CANCELLED", 0)
    for shard in (0, 1):
        assert Leases(folder=run.leases_path, owner=owner_of(shard)).take(f"id00{shard + 1}/prompt1")
    slurm.squeue_answers(answers)
    ended = submit_command(run)
    assert (ended.returncode, "Unable to contact slurm controller" in ended.stderr) == (int(not answers), not answers)
    assert {path.read_text() for path in run.leases_path.rglob("*.lease")} == {owner_of(shard) for shard in left}


def test_an_array_of_the_same_name_in_another_folder_is_not_ours(run: RunDir, slurm: FakeSlurm) -> None:
    name = f"{run.root.name}.first_frame.1.0"
    slurm.write("queue", [{"id": "7", "job-name": name, "array": "0", "dependency": "", "script": "/elsewhere/x.sh"}])
    slurm.will("time_out")
    first, _ = submit(run)
    assert first.job_id == "1002"


def test_an_array_that_has_left_the_queue_is_found_in_the_accounting(run: RunDir, slurm: FakeSlurm) -> None:
    slurm.will("accept_and_time_out")
    slurm.squeue_answers(False)
    with pytest.raises(OSError, match="is not known; submit again"):
        submit(run)
    slurm.squeue_answers(True)
    slurm.forget("1001")
    slurm.write("ended", {f"{run.root.name}.first_frame.1.0": ["1001_0", "1001_[1-4]"]})
    submit(run)
    assert [(one.stage, one.job_id) for one in submissions(run)] == [
        ("first_frame", "1001"),
        ("first_frame", "1002"),  # its records are not there, and it does not live
        ("video", "1003"),
    ]


def test_what_a_shell_sets_for_other_jobs_is_kept_from_ours(
    run: RunDir, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_JOB_NAME", "mine")
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    submit(run)
    assert all(call["environment"] == ["SBATCH_ACCOUNT"] for call in slurm.calls)


# --- a driver that dies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answers",
    [["kill"], ["accept_and_kill"], ["accept", "kill"], ["accept", "accept_and_kill"]],
    ids=["before the first", "after the first", "before the second", "after the second"],
)
def test_a_driver_killed_at_sbatch_costs_nothing(run: RunDir, slurm: FakeSlurm, answers: list[str]) -> None:
    slurm.will(*answers)
    assert submit_command(run).returncode == -signal.SIGKILL
    again = submit_command(run)
    assert again.returncode == 0, again.stderr
    assert [(stage, array) for stage, array, _ in queued(slurm)] == [("first_frame", "0-4"), ("video", "0-4")]
    assert queued(slurm)[1][2] == f"aftercorr:{slurm.queue[0]['id']}"
    assert intents(run) == []


def test_status_and_cancel_know_what_a_killed_driver_has_submitted(run: RunDir, slurm: FakeSlurm) -> None:
    slurm.will("accept", "accept_and_kill")
    submit_command(run)
    assert live_elements(run).keys() == {(stage, shard) for stage in ("first_frame", "video") for shard in range(5)}
    assert cancel(run) == ["1001", "1002"]
    assert slurm.queue == []


def test_videos_join_the_elements_of_a_living_array_by_its_indices(run: RunDir, slurm: FakeSlurm) -> None:
    slurm.will("accept", "refuse")
    with pytest.raises(ValueError, match="refused the video array"):
        submit(run)
    slurm.end("1001", "FAILED", 0, 2)
    slurm.end("1001", "RUNNING", 1)
    joined, first, second = submit(run)
    assert queued(slurm)[1:] == [
        ("video", "1,3-4", "aftercorr:1001"),
        ("first_frame", "0-1", ""),
        ("video", "0-1", f"aftercorr:{first.job_id}"),
    ]
    assert (joined.shards, joined.tasks) == ((1, 3, 4), (1, 3, 4))
    assert first.shards == second.shards == (0, 2)
    assert submit(run) == []
    slurm.end(joined.job_id, "CANCELLED", 3)
    (once_more,) = submit(run)
    assert (once_more.shards, once_more.tasks, once_more.after) == ((3,), (3,), "1001")


def test_an_array_that_slurm_has_forgotten_is_not_waited_for(run: RunDir, slurm: FakeSlurm) -> None:
    plan = plan_submissions(count_all(run))
    submitter = Submitter(run=run, cluster=Cluster(), pauses=())
    with pytest.raises(OSError, match=r"array 1001: SLURM does not know it any more.*shards 0-4"):
        submitter.submit(plan, lambda one: slurm.forget(one.job_id))
    for item in run.manifest():
        run.save_failure(Failure(key=item.key, stage="first_frame", reason="no face"))  # nothing is left to wait for
    done: list[Submitted] = []

    def tell(one: Submitted) -> None:
        done.append(one)
        slurm.forget(one.job_id)

    submitter.submit(plan, tell)
    assert [(one.stage, one.after) for one in done] == [("first_frame", None), ("video", None)]


# --- two at once --------------------------------------------------------------------------------------------------------


def test_a_second_submitter_is_told_who_is_at_work(run: RunDir, slurm: FakeSlurm) -> None:
    with run_lock(run, "submit --on slurm"):
        with pytest.raises(Locked, match=rf"`ipt2v submit --on slurm` \(host .*, process {os.getpid()}, since 20"):
            submit(run)
        second = submit_command(run)
        cancelling = subprocess.run([IPT2V, "cancel", run.root], capture_output=True, text=True, check=False, timeout=60)
    for ended in (second, cancelling):
        assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
        assert f"process {os.getpid()}" in ended.stderr
    assert slurm.calls == []
    assert len(submit(run)) == 2


def test_a_lock_goes_with_its_holder(run: RunDir) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ipt2v.run_dir import RunDir; from launch.lock import run_lock\n"
        "with run_lock(RunDir(Path(sys.argv[1])), 'submit'): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, run.root], stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(Locked, match=f"process {holder.pid}"), run_lock(run, "submit"):
            pass
        holder.kill()
    with run_lock(run, "submit"):
        assert json.loads((run.root / "jobs" / ".submit.lock").read_text())["pid"] == os.getpid()


def test_a_thousand_elements_are_no_more_files_than_one(run: RunDir, slurm: FakeSlurm) -> None:
    shards = tuple(range(1000))
    plan = [
        Submission(stage="first_frame", shards=shards, after=False),
        Submission(stage="video", shards=shards, after=True),
    ]
    Submitter(run=run, cluster=Cluster()).submit(plan, lambda _: None)
    suffixes = sorted(path.suffix for path in run.root.glob("jobs/*/*"))
    assert suffixes == [".json", ".json", ".pkl", ".pkl", ".sh", ".sh"]


def test_a_command_that_is_not_there_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoAnswer, match="squeue"):
        controller.is_known("1")
    assert controller.max_array_size() == 1001
