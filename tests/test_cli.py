"""Claims about the command line: quick, helpful, exit codes that mean something, and a plan that leaves no trace."""

from __future__ import annotations

import errno
import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Answer, Call
from helpers import NUM_HEADS, ROOT, frozen_run, run_command, run_python, write_fake_weights, write_tree
from typer.main import get_command
from typer.testing import CliRunner

from ipt2v.records import Failure
from launch import cli

IPT2V = str(Path(sys.executable).parent / "ipt2v")
CONFIG = str(ROOT / "configs" / "demo.yaml")
COMMANDS = [
    "plan",
    "freeze",
    "submit",
    "status",
    "logs",
    "why",
    "nodes",
    "retry",
    "cancel",
    "package",
    "report",
    "verify",
    "diff",
    "table",
    "export",
    "verify-split",
    "preflight",
    "weights",
    "weights list",
    "weights fetch",
    "weights check",
    "weights toy",
    "demo",
]
SITE = """
num_shards: 2
setup: [module load cuda, 'export NCCL_DEBUG=WARN']
container: [apptainer, exec, --nv, /images/ipt2v.sif]
first_frame: {partition: small, gpus_per_node: 1, timeout_minutes: 30}
video:
  partition: large
  account: vision
  qos: high
  constraint: h100
  exclude: node[01-02]
  nodes: 2
  gpus_per_node: 2
  cpus_per_task: 8
  mem_gb: 400.5
  array_parallelism: 5
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a test set of two identities, weights that nothing loads, and a cluster file."""
    write_tree(tmp_path / "testset")
    write_fake_weights(tmp_path / "weights")
    (tmp_path / "site.yaml").write_text(SITE)
    return tmp_path


def plan_words(place: Path, *more: str) -> list[str]:
    options = ["--weights", str(place / "weights"), "--runs", str(place / "runs"), "--cluster", str(place / "site.yaml")]
    return ["plan", CONFIG, f"testset.path={place / 'testset'}", *more, *options]


def seconds_of(*command: str) -> float:
    """Seconds that a command takes: on a busy machine those of its CPU."""
    start, children = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = ended.ru_utime + ended.ru_stime - children.ru_utime - children.ru_stime
    return min(time.perf_counter() - start, cpu_seconds)


# --- help ---------------------------------------------------------------------------------------------------------------


def test_help_answers_within_half_a_second() -> None:
    assert min(seconds_of(IPT2V, "--help") for _ in range(3)) < 0.5


def test_help_needs_no_heavy_package() -> None:
    heavy = run_python("import launch.cli, sys; print({'torch', 'submitit', 'h5py', 'numpy', 'pydantic'} & sys.modules.keys())")
    assert heavy.strip() == "set()"


def test_every_command_is_in_the_list_of_this_test() -> None:
    top = get_command(cli.app)
    assert sorted(top.commands) == sorted({command.split()[0] for command in COMMANDS})  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    answer = CliRunner().invoke(cli.app, [*command.split(), "--help"])
    assert answer.exit_code == 0
    assert answer.output.strip().startswith("Usage:") and len(answer.output.splitlines()) > 5


@pytest.mark.parametrize("words", [["unknown"], ["plan"], ["plan", CONFIG, "--on", "moon"], ["plan", CONFIG, "--shards", "0"]])
def test_a_wrong_call_exits_with_2(ipt2v: Call, words: list[str]) -> None:
    assert ipt2v(*words).code == 2


def refusal(answer: Answer) -> str:
    """The one line that a refused command prints."""
    assert (answer.code, answer.err[:7], answer.err.count("\n")) == (2, "error: ", 1)
    return answer.err[7:-1]


# --- wrong input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("video.fsp=24", "video.fsp: unknown key; nearest known key is video.fps"),
        ("video.num_frames=80", "video.num_frames: 80 is not 4n+1; nearest are 77 and 81"),
        ("video.width=830", "video.width: 830 is not a multiple of 16; nearest are 816 and 832"),
        ("testset.path=/nowhere/set", "/nowhere/set: no such file or folder"),
        ("video.model=MyVACE", "MyVACE/scheduler/scheduler_config.json is missing"),
        ("decouple.spatial_template=mine", "template 'mine': no such file"),
        ("video.fps", "override 'video.fps': expected key.sub=value"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(ipt2v: Call, place: Path, override: str, problem: str) -> None:
    line = refusal(ipt2v(*plan_words(place, override)))
    assert problem in line
    assert not (place / "runs").exists()


def test_a_missing_weights_file_is_named_with_its_source(ipt2v: Call, place: Path) -> None:
    missing = place / "weights" / "Wan2.1-VACE-14B-diffusers" / "vae" / "config.json"
    missing.unlink()
    line = refusal(ipt2v(*plan_words(place)))
    assert line.startswith(f"video.model: weights file {missing} is missing; it comes from huggingface.co/Wan-AI/")


@pytest.mark.parametrize("on", ["slurm", "local"])
def test_ranks_that_cannot_share_a_video_are_refused(ipt2v: Call, place: Path, on: str) -> None:
    (place / "site.yaml").write_text("video: {nodes: 4, tasks_per_node: 3}")
    line = refusal(ipt2v(*plan_words(place), "--on", on))
    assert line.startswith(f"video: 12 ranks on 4 nodes cannot share a model of {NUM_HEADS} heads (")
    assert line.endswith("to 4 nodes with one of 4, 8, 16, 24, 32 ranks in all")


@pytest.mark.parametrize("words", [["status"], ["logs", "RUN", "video", "0"], ["cancel"], ["package"]])
def test_a_folder_that_is_no_run_is_refused(ipt2v: Call, tmp_path: Path, words: list[str]) -> None:
    command, *rest = words
    line = refusal(ipt2v(command, str(tmp_path / "nowhere"), *rest[1:]))
    assert line.startswith(f"{tmp_path / 'nowhere'}")


def test_a_folder_in_place_of_a_settings_file_is_wrong_input(ipt2v: Call, place: Path) -> None:
    words = plan_words(place)
    for wrong in (["plan", str(place), *words[2:]], [*words, "--cluster", str(place)]):
        assert refusal(ipt2v(*wrong)) == f"{place}: cannot be read (Is a directory); name a YAML file that you may read"


def test_a_test_set_whose_name_is_too_long_is_wrong_input(ipt2v: Call, place: Path) -> None:
    assert "cannot be read (File name too long)" in refusal(ipt2v(*plan_words(place, f"testset.path={'x' * 300}")))


@pytest.mark.parametrize("command", ["plan", "freeze", "submit"])
@pytest.mark.parametrize("below", ["", "deeper/runs"])
def test_a_file_in_place_of_the_runs_is_wrong_input_and_named(ipt2v: Call, place: Path, command: str, below: str) -> None:
    file = place / "site.yaml"
    words = [command, *plan_words(place)[1:], "--runs", str(file / below)]
    line = refusal(ipt2v(*words))
    assert line == f"{file / below}: expected a folder, but {file} is a file; name another, or move the file away"
    assert file.read_text() == SITE


def test_runs_whose_name_is_too_long_are_wrong_input(ipt2v: Call, place: Path) -> None:
    line = refusal(ipt2v(*plan_words(place), "--runs", str(place / ("x" * 300))))
    assert line.endswith("cannot be a folder (File name too long); name another")


def test_a_full_disk_is_no_wrong_input(ipt2v: Call, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("launch.freeze.write_text", full)
    assert ipt2v("freeze", *plan_words(place)[1:]).code == 1


def test_rejecting_without_rules_is_refused_before_anything_is_written(ipt2v: Call, place: Path) -> None:
    line = refusal(ipt2v("submit", *plan_words(place)[1:], "--on", "here", "--rejected"))
    assert line == "--rejected: no rules to reject by; set score.accept.at_least or at_most in the settings"
    assert not (place / "runs").exists()


def test_the_demo_outside_of_the_repository_writes_nothing(
    ipt2v: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(ipt2v("demo"))
    assert line.startswith("configs/demo.yaml: no such settings file; demo reads configs/, so call it in the repository's root")
    assert "configs/cluster/local.yaml: no such settings file; demo reads" in refusal(ipt2v("demo", "--config", CONFIG))
    assert list(tmp_path.iterdir()) == []


def test_the_log_of_a_misspelt_stage_is_refused_with_the_known_ones(ipt2v: Call, tmp_path: Path) -> None:
    run = frozen_run(tmp_path)
    line = refusal(ipt2v("logs", run.root, "vido", "0"))
    assert line == "logs: stage 'vido' unknown; known: first_frame, video, score, verify_split"
    assert "no log of verify_split shard 0 rank 0 yet" in refusal(ipt2v("logs", run.root, "verify_split", "0"))


def test_the_installed_command_ends_as_main_does(place: Path) -> None:
    ended = run_command(IPT2V, *plan_words(place, "video.num_frames=80"), expect=2)
    assert ended.stdout == ""
    assert ended.stderr == f"error: {CONFIG}: video.num_frames: 80 is not 4n+1; nearest are 77 and 81\n"


# --- plan ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(ipt2v: Call, place: Path) -> list[str]:
    """What `plan` prints for a new run, in three parts: the run, the first array, the second."""
    return ipt2v(*plan_words(place), "--on", "slurm").out.split("\narray ")


def lines(text: str) -> list[str]:
    """The lines of a script, without quotes: sbatch reads past them as a shell does."""
    return [" ".join(shlex.split(line)) for line in text.splitlines()]


def test_a_plan_says_what_is_to_be_made(planned: list[str], place: Path) -> None:
    head, first, second = planned
    assert f"run    {place / 'runs' / 'demo-'}" in head and "(new)" in head
    assert "first_frame 0/4  video 0/4 in 2 shards" in head
    assert first.startswith("1: first_frame, shards 0-1, 1 ranks per element\n")
    assert second.startswith("2: video, shards 0-1, 4 ranks per element (cfg 2 x ulysses 2 x ring 1; at least ")
    assert second.splitlines()[0].endswith(" activations) on each), element i after element i of array 1")


def test_a_plan_shows_both_scripts_with_the_sites_words(planned: list[str]) -> None:
    _, first, second = map(lines, planned)
    for script, partition in ((first, "small"), (second, "large")):
        assert f"#SBATCH --partition={partition}" in script
        assert [line for line in script if line.startswith("#SBATCH --array=0-1")] != []
        assert script.index("module load cuda") < script.index("export NCCL_DEBUG=WARN")
        [srun] = [line for line in script if line.startswith("srun ")]
        assert "--kill-on-bad-exit=1" in srun
        assert "apptainer exec --nv /images/ipt2v.sif python -u -m launch.element" in srun
    asked = {
        "account=vision",
        "qos=high",
        "constraint=h100",
        "exclude=node[01-02]",
        "nodes=2",
        "gpus-per-node=2",
        "mem=410112M",
    }
    asked |= {"ntasks-per-node=2", "cpus-per-task=8", "array=0-1%2", "kill-on-invalid-dep=yes", "time=60"}
    assert {word for word in asked if f"#SBATCH --{word}" not in second} == set()


def test_only_the_second_array_waits(planned: list[str]) -> None:
    _, first, second = planned
    assert "#SBATCH --dependency=aftercorr:<job id of array 1>" in lines(second)
    assert "--dependency" not in first and "--kill-on-invalid-dep" not in first


def test_a_plan_writes_nothing_and_loads_no_torch(place: Path) -> None:
    before = sorted(place.rglob("*"))
    ended = run_command(sys.executable, "-X", "importtime", IPT2V, *plan_words(place))
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if line.startswith("import time:")}
    assert "launch.submit" in imported
    assert {"torch", "diffusers", "transformers", "xfuser"} & imported == set()
    assert sorted(place.rglob("*")) == before


def test_a_plan_for_one_identity_is_an_array_of_one(ipt2v: Call, place: Path) -> None:
    assert "#SBATCH --array=0%1\n" in ipt2v(*plan_words(place), "--shards", "1").out


def test_a_plan_of_a_run_that_has_failed_or_made_all_submits_nothing(ipt2v: Call, place: Path) -> None:
    run = frozen_run(place, num_shards=2)
    for item in run.manifest():
        run.save_failure(Failure(key=item.key, stage="first_frame", reason="no face"))
    text = ipt2v(*plan_words(place)).out
    assert "(goes on)" in text and "first_frame 0/4 (4 failed)" in text and "nothing to submit" in text


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_sizes_of_a_video_model_that_are_no_json_are_named(ipt2v: Call, place: Path, text: str) -> None:
    damaged = place / "weights" / "Wan2.1-VACE-14B-diffusers" / "transformer" / "config.json"
    damaged.write_text(text)
    assert refusal(ipt2v(*plan_words(place))).startswith(f"video.model: weights file {damaged} is ")


# --- status -------------------------------------------------------------------------------------------------------------


def test_status_counts_from_files_and_exits_with_1_for_failures(ipt2v: Call, tmp_path: Path) -> None:
    run = frozen_run(tmp_path, num_shards=2)
    answer = ipt2v("status", str(run.root), "--json")
    rows = [(row["stage"], row["shard"], row["missing"]) for row in json.loads(answer.out)]
    assert rows == [("first_frame", 0, 2), ("first_frame", 1, 2), ("video", 0, 2), ("video", 1, 2)]
    assert answer.code == 0
    run.save_failure(Failure(key="id001/prompt1", stage="first_frame", reason="no face"))
    answer = ipt2v("status", str(run.root))
    assert "failed: id001/prompt1 (first_frame): no face" in answer.out
    assert answer.code == 1
