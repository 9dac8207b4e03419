"""Weights on a node's own disk: only what a stage loads, copied once, whole or not there, and never at the price of the run."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, frozen_run, write_tree
from main_job import BIN, SMALL, assert_same_videos, call, collect, first_frames, ipt2v, run_folder

from ipt2v.models.catalogue import stage_files
from ipt2v.run_dir import VERIFY_SPLIT, WEIGHTS_DIR_VARIABLE, RunDir
from launch.cluster import Cluster
from launch.local import run_here, run_local
from launch.plan import Submission
from launch.queue import log_files
from launch.staging import LOCK, order_on, own_folder, weights_on_node

VACE = "Wan2.1-VACE-14B-diffusers"
VIDEO_FILES = [
    *(f"{VACE}/{name}" for name in ("scheduler/scheduler_config.json", "transformer/config.json")),
    *(f"{VACE}/{name}" for name in ("transformer/diffusion_pytorch_model.safetensors", "vae/config.json")),
    f"{VACE}/vae/diffusion_pytorch_model.safetensors",
]
COPIER = """
import logging, sys
from pathlib import Path
from ipt2v.run_dir import RunDir
from launch import staging

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
{before}
print("ready", flush=True)
print(staging.weights_on_node(RunDir(Path(sys.argv[1])), "video", sys.argv[2], element=sys.argv[3], speaks=False))
"""
# stops in the middle of the first file
STUCK = """
def copyfile(source, target):
    Path(target).write_bytes(Path(source).read_bytes()[:10])
    print("half", flush=True)
    import time
    time.sleep(60)

staging.shutil.copyfile = copyfile
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return frozen_run(tmp_path)


@pytest.fixture
def weights(run: RunDir) -> Path:
    return Path(run.environment().weights_dir)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Stands for a node's own disk."""
    return tmp_path / "local" / "disk"


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are copied."""
    names: list[str] = []
    copyfile = shutil.copyfile

    def counting(source: Path, target: Path) -> None:
        names.append(Path(source).name)
        copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", counting)
    return names


def on_node(run: RunDir, disk: Path | str, stage: str = "video", *, element: str = "7_0.0", speaks: bool = True) -> Path:
    return weights_on_node(run, stage, str(disk), element=element, speaks=speaks)


def files_in(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def started(run: RunDir, disk: Path, element: str, *, before: str = "") -> subprocess.Popen[str]:
    """A process that is about to call weights_on_node."""
    words = (sys.executable, "-c", COPIER.format(before=before), str(run.root), str(disk), element)
    copier = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert line_of(copier) == "ready"
    return copier


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# --- what is copied -----------------------------------------------------------------------------------------------------


def test_only_what_the_stage_loads_is_copied_bit_for_bit(run: RunDir, weights: Path, disk: Path) -> None:
    folder = on_node(run, disk)
    assert files_in(folder) == {name: (weights / name).read_bytes() for name in VIDEO_FILES}


def test_the_first_frame_stage_has_the_video_models_text_encoder_and_not_its_transformer(
    run: RunDir, weights: Path, disk: Path
) -> None:
    found = files_in(on_node(run, disk, "first_frame"))
    assert not set(found) & set(VIDEO_FILES)
    assert {f"{VACE}/text_encoder/model.safetensors", f"{VACE}/tokenizer/tokenizer_config.json"} <= set(found)
    assert {"antelopev2", "Qwen3-8B", "RealVisXL_V4.0", "HRNetV2-W48", "HyperLoRA"} < {name.split("/")[0] for name in found}
    assert found == {name: (weights / name).read_bytes() for name in found}


def test_the_two_stages_together_load_every_file_that_the_run_was_frozen_with(run: RunDir, weights: Path) -> None:
    both = {name for stage in ("first_frame", "video") for name in stage_files(stage, weights, run.config())}
    assert both | {f"{folder}/ipt2v_files.json" for folder in run.environment().weights} == set(files_in(weights))
    assert stage_files(VERIFY_SPLIT, weights, run.config()) == stage_files("video", weights, run.config())


def test_settings_and_tokenizers_beside_are_copied_and_other_forms_of_the_tensors_are_not(run: RunDir, weights: Path) -> None:
    before = set(stage_files("first_frame", weights, run.config()))
    processor = "HyperLoRA/hyper_lora/clip_processor/clip_vit_large_14_processor/processor_config.json"
    beside = {"Qwen3-8B/tokenizer.json", "Qwen3-8B/chat_template.jinja", f"{VACE}/tokenizer/spiece.model", processor}
    for name in (*beside, "Qwen3-8B/model.fp16.safetensors", "Qwen3-8B/pytorch_model.bin", "antelopev2/1k3d68.onnx"):
        (weights / name).write_text("new")
    assert set(stage_files("first_frame", weights, run.config())) - before == beside


def test_a_run_that_asks_no_painter_copies_none(tmp_path: Path, disk: Path) -> None:
    run = frozen_run(tmp_path, "video.condition=reference", "decouple.prompts=raw", "cutout.enabled=false")
    assert {name.split("/")[0] for name in files_in(on_node(run, disk, "first_frame"))} == {"antelopev2", VACE}


@pytest.mark.parametrize("name", ["/elsewhere/vace", "../elsewhere/vace"])
def test_weights_that_are_not_below_the_folder_are_read_where_they_are(
    name: str, tmp_path: Path, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = str(tmp_path / "elsewhere/vace") if name.startswith("/") else name
    shutil.copytree(Path(frozen_run(tmp_path).environment().weights_dir) / VACE, tmp_path / "elsewhere/vace")
    run = frozen_run(tmp_path, f"video.model={elsewhere}")
    assert str(on_node(run, disk)) == run.environment().weights_dir
    assert "elsewhere" in warnings(caplog)[0]
    assert not disk.exists()


def test_each_node_has_an_order_of_its_own_which_holds_every_file_once() -> None:
    names = [f"model-{index:05}.safetensors" for index in range(20)]
    orders = [order_on(host, names) for host in ("node1", "node2", "node3")]
    assert len({order[0] for order in orders}) > 1
    assert all(sorted(order) == names for order in orders)
    assert order_on("node1", reversed(names)) == orders[0]


# --- copied once --------------------------------------------------------------------------------------------------------


def test_a_second_call_copies_nothing_and_says_nothing(
    run: RunDir, disk: Path, copied: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = on_node(run, disk)
    assert (len(copied), len(caplog.messages)) == (len(VIDEO_FILES), 1)
    assert caplog.messages[0].startswith("5 files of weights, ") and " GB/s to " in caplog.messages[0]
    assert on_node(run, disk, element="7_1.0") == first
    assert (len(copied), len(caplog.messages)) == (len(VIDEO_FILES), 1)


@pytest.mark.parametrize("change", ["content", "size", "cut off here"])
def test_a_file_that_is_not_as_in_the_source_is_copied_again(
    change: str, run: RunDir, weights: Path, disk: Path, copied: list[str]
) -> None:
    folder, name = on_node(run, disk), f"{VACE}/vae/config.json"
    copied.clear()
    if change == "cut off here":
        (folder / name).write_bytes((folder / name).read_bytes()[:5])
    else:
        text = (weights / name).read_text()
        (weights / name).write_text(text.swapcase() if change == "content" else text + " ")
    assert on_node(run, disk) == folder
    assert copied == ["config.json"]
    assert (folder / name).read_bytes() == (weights / name).read_bytes()


def test_what_the_source_has_no_more_goes_and_what_another_stage_has_copied_stays(
    run: RunDir, weights: Path, disk: Path
) -> None:
    folder, added = on_node(run, disk, "first_frame"), "Qwen3-8B/tokenizer.json"
    before = set(files_in(folder))
    (weights / added).write_text("{}")
    on_node(run, disk, "first_frame")
    assert set(files_in(folder)) == before | {added}
    (weights / added).unlink()  # left here, the LLM's loader would take it
    on_node(run, disk, "video")
    assert set(files_in(folder)) == before | set(VIDEO_FILES)


def test_two_sources_do_not_mix_and_a_link_that_moves_on_is_another_source(tmp_path: Path, disk: Path) -> None:
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
    link = tmp_path / "current"
    link.symlink_to("v1")
    first = own_folder(str(disk), link)
    link.unlink()
    link.symlink_to("v2")
    assert first == own_folder(str(disk), tmp_path / "v1") != own_folder(str(disk), link)
    assert first.stat().st_mode & 0o777 == 0o700


def test_two_processes_at_once_copy_once(run: RunDir, weights: Path, disk: Path) -> None:
    folder = own_folder(str(disk), weights)
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # so that both stand before it
        copiers = [started(run, disk, f"{number}_0.0") for number in (1, 2)]
        time.sleep(0.3)
        assert files_in(folder) == {}
    outputs = [copier.communicate(timeout=60)[0] for copier in copiers]
    assert sum(output.count("files of weights") for output in outputs) == 1
    assert [output.splitlines()[-1] for output in outputs] == [str(folder)] * 2
    assert set(files_in(folder)) == set(VIDEO_FILES)


def test_a_killed_copier_leaves_nothing_that_looks_whole_and_the_next_one_finishes(
    run: RunDir, weights: Path, disk: Path
) -> None:
    copier = started(run, disk, "1_0.0", before=STUCK)
    assert line_of(copier) == "half"
    os.kill(copier.pid, signal.SIGKILL)
    copier.communicate()
    (left,) = files_in(own_folder(str(disk), weights))
    assert Path(left).name.startswith(".") and left.endswith(".part")
    folder = on_node(run, disk)
    assert files_in(folder) == {name: (weights / name).read_bytes() for name in VIDEO_FILES}


# --- what is no reason to lose a run ------------------------------------------------------------------------------------


def test_too_little_room_names_the_folder_and_both_sizes(
    run: RunDir, weights: Path, disk: Path, copied: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (weights / VIDEO_FILES[2]).open("r+b") as file:
        file.truncate(36_200_000_000)  # sparse
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 10_100_000_000))
    assert on_node(run, disk) == weights
    folder = own_folder(str(disk), weights)
    told = f"local_weights_dir: {folder} has 10.1 GB free, 36.2 GB are needed; weights are read from {weights}"
    assert (warnings(caplog), copied) == ([told], [])


def test_what_is_there_already_needs_no_room(run: RunDir, weights: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = on_node(run, disk)
    (weights / VIDEO_FILES[0]).write_text("12345")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 5))
    assert on_node(run, disk) == folder


def test_a_disk_that_is_full_meanwhile_is_tried_once_by_the_ranks_of_a_node(
    run: RunDir, weights: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def full(source: Path, target: Path) -> None:
        tries.append(source)
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        assert [on_node(run, disk, speaks=rank == 0) for rank in range(4)] == [weights] * 4
    (told,) = warnings(caplog)
    assert "No space left on device" in told and told.endswith(f"; weights are read from {weights}")
    assert len(tries) == 1
    assert files_in(own_folder(str(disk), weights)) == {}
    assert on_node(run, disk) == weights, "the element's decision holds, though there is room again"
    assert on_node(run, disk, element="7_0.1") != weights, "once it is requeued it may try again"


def test_a_source_that_changes_while_it_is_copied_is_not_taken_for_whole(
    run: RunDir, weights: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "copyfile", lambda source, target: Path(target).write_bytes(b"another length"))
    assert on_node(run, disk) == weights
    assert "differs in size or time" in warnings(caplog)[0]
    assert files_in(own_folder(str(disk), weights)) == {}


def test_a_variable_that_is_not_set_is_named_once_for_each_node(
    run: RunDir, weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NO_SUCH_SCRATCH", raising=False)
    assert [on_node(run, "$NO_SUCH_SCRATCH/me", speaks=rank == 0) for rank in range(2)] == [weights] * 2
    (told,) = warnings(caplog)
    assert told.startswith("local_weights_dir: $NO_SUCH_SCRATCH/me is ") and "is the variable set?" in told
    monkeypatch.setenv("NO_SUCH_SCRATCH", "")
    assert on_node(run, "$NO_SUCH_SCRATCH") == weights


def test_variables_are_those_of_the_node(run: RunDir, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", str(disk))
    assert on_node(run, "${NODE_DISK}/deep").parent == disk / "deep"


def test_a_folder_that_cannot_be_made_is_no_reason_to_stop(
    run: RunDir, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    assert on_node(run, tmp_path / "a file" / "below") == weights
    assert str(tmp_path / "a file") in warnings(caplog)[0]


def test_a_folder_of_another_user_is_not_used(
    run: RunDir, weights: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert on_node(run, disk) == weights
    assert f"uid {os.stat(disk.parent).st_uid}, expected" in warnings(caplog)[0]
    assert "uid 54321" in warnings(caplog)[0]


@pytest.mark.parametrize("planted", ["folder", "link above", "the folder itself is a link"])
def test_what_another_user_has_planted_is_not_followed(
    planted: str, run: RunDir, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give files away")
    place, loot = tmp_path / "shared_tmp" / "me", tmp_path / "loot"
    place.parent.mkdir()
    loot.mkdir()
    if planted == "folder":
        place.mkdir()
        os.chown(place, 54321, -1)
    elif planted == "link above":
        place.symlink_to(loot)
        os.chown(place, 54321, -1, follow_symlinks=False)
    else:
        own = own_folder(str(place), weights)
        own.rmdir()
        own.symlink_to(loot)
    assert on_node(run, place / "deep" if planted == "link above" else place) == weights
    assert "expected" in warnings(caplog)[0]
    assert files_in(loot) == {}


def test_a_link_inside_the_copy_is_replaced_not_followed(run: RunDir, weights: Path, disk: Path, tmp_path: Path) -> None:
    folder, outside = own_folder(str(disk), weights), tmp_path / "outside"
    outside.mkdir()
    (folder / VACE).mkdir()
    (folder / VACE / "vae").symlink_to(outside)
    on_node(run, disk)
    assert files_in(outside) == {}
    assert set(files_in(folder)) == set(VIDEO_FILES)


@pytest.mark.parametrize("folder", ["scratch/me", "", "~/scratch"])
def test_a_folder_without_a_place_on_the_node_is_refused_when_the_cluster_file_is_read(folder: str) -> None:
    with pytest.raises(ValueError, match="expected an absolute path, or one that starts with a"):
        Cluster(local_weights_dir=folder)


# --- who reads there ----------------------------------------------------------------------------------------------------


def freeze_toy(place: Path, weights: Path, *overrides: str) -> RunDir:
    testset = write_tree(place / "testset", identities=("id001",), num_prompts=1)
    words: tuple[str | Path, ...] = (f"testset.path={testset}", *SMALL, *overrides, "--weights", weights)
    return run_folder(ipt2v("freeze", ROOT / "configs" / "demo.yaml", *words, "--runs", place / "runs"))


@pytest.mark.slow
def test_a_stage_runs_from_its_copy_alone_and_makes_the_same(toy_weights: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(toy_weights, tmp_path / "weights")
    run = freeze_toy(tmp_path, weights)
    copies = {stage: on_node(run, tmp_path / stage, stage) for stage in ("first_frame", "video")}
    weights.rename(tmp_path / "renamed")
    for stage, copy in copies.items():  # each has its own, so that neither finds what only the other loads
        output = call(BIN / "python", "-m", "ipt2v", run.root, stage, "0", environment={WEIGHTS_DIR_VARIABLE: str(copy)})
        assert f"weights are read from {copy} ({WEIGHTS_DIR_VARIABLE}), not {weights}" in output
    (made,) = collect(run).values()
    assert made.video_provenance.weights == run.environment().weights
    (tmp_path / "renamed").rename(weights)
    for path in (run.sealed_path("first_frame", 0), run.sealed_path("video", 0)):
        path.unlink()
    for stage in copies:
        assert WEIGHTS_DIR_VARIABLE not in call(BIN / "python", "-m", "ipt2v", run.root, stage, "0")
    assert_same_videos(collect(run), dict.fromkeys(collect(run), made), latents_within=0)


@pytest.mark.slow
def test_a_job_reads_its_nodes_copy_whatever_the_submitting_shell_says(
    toy_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = freeze_toy(tmp_path, toy_weights, "video.condition=reference", "decouple.prompts=raw")
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, "/somebody/elses/weights")
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    plan = (Submission(stage="first_frame", shards=(0,), after=False),)
    cluster = Cluster(local_weights_dir="$NODE_DISK", first_frame={"tasks_per_node": 2})
    assert run_local(run, cluster, plan, tick=lambda: None) == []
    assert len(first_frames(run)) == 1
    by_rank = ["".join(file.read_text() for file in log_files(run, "first_frame", 0, rank)) for rank in (0, 1)]
    copy = own_folder(str(tmp_path / "disk"), toy_weights)
    assert f"weights are read from {copy} ({WEIGHTS_DIR_VARIABLE}), not {toy_weights}" in by_rank[0]
    assert "".join(by_rank).count("files of weights, ") == 1
    assert os.environ[WEIGHTS_DIR_VARIABLE] == "/somebody/elses/weights"


@pytest.mark.slow
def test_here_no_variable_of_the_shell_is_followed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, "/somebody/elses/weights")
    seen = []

    def plan() -> Iterator[Submission]:
        seen.append(os.environ.get(WEIGHTS_DIR_VARIABLE))
        yield from ()

    run_here(run, plan(), tick=lambda: None)
    assert seen == [None]
    assert os.environ[WEIGHTS_DIR_VARIABLE] == "/somebody/elses/weights"
