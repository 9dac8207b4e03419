"""Killed inside a video: whoever makes it next goes on from the last saved step, on as many ranks as it likes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, demo_config, write_tree
from main_job import BIN, SMALL, call, collect

from ipt2v.position_file import load_position
from ipt2v.run_dir import RunDir
from launch.freeze import freeze, prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NUM_STEPS, EVERY = 12, 3
TORCHRUN = (BIN / "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ipt2v")
ONE_RANK = (BIN / "python", "-m", "ipt2v")


def frozen(tmp_path: Path, toy_weights: Path, name: str) -> RunDir:
    testset = tmp_path / "testset"
    if not testset.exists():
        write_tree(testset, ("id001",), num_prompts=1)
    slow = (f"video.num_inference_steps={NUM_STEPS}", f"video.save_every_steps={EVERY}", "video.width=192", "video.height=128")
    config = demo_config(testset, *SMALL, *slow, "video.num_frames=33")
    return freeze(prepare(config, weights_dir=toy_weights, runs_dir=tmp_path / name))


def kill_after_step(run: RunDir, key: str, words: tuple[str | Path, ...], num_done: int) -> int:
    """SIGKILL all ranks as soon as so many steps are saved; how many were."""
    digest = run.environment().run_digest
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = subprocess.Popen([*map(str, words)], cwd=ROOT, env=environment, start_new_session=True)
    deadline = time.monotonic() + 200
    while True:
        assert time.monotonic() < deadline and ranks.poll() is None, "ended before it was killed"
        found = load_position(run.position_path(key), key=key, run_digest=digest)
        if found is not None and found[0].num_done >= num_done:
            break
        time.sleep(0.005)
    for process in Path("/proc").glob("[0-9]*/cmdline"):  # torchrun's ranks have sessions of their own
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            if str(run.root).encode() in process.read_bytes():
                os.kill(int(process.parent.name), signal.SIGKILL)
    ranks.wait()
    time.sleep(0.2)
    found = load_position(run.position_path(key), key=key, run_digest=digest)
    assert found is not None
    return found[0].num_done


def test_a_video_that_was_killed_goes_on_at_the_last_saved_step_on_another_number_of_ranks(
    toy_weights: Path, tmp_path: Path
) -> None:
    whole = frozen(tmp_path, toy_weights, "whole")
    (key,) = whole.shard_keys(0)
    call(*ONE_RANK, whole.root, "first_frame", "0")
    call(*ONE_RANK, whole.root, "video", "0")
    expected = collect(whole)[key]
    for killed_by, resumed_by in ((TORCHRUN, ONE_RANK), (ONE_RANK, TORCHRUN)):
        run = frozen(tmp_path, toy_weights, f"resumed{len(resumed_by)}")
        call(*ONE_RANK, run.root, "first_frame", "0")
        saved = kill_after_step(run, key, (*killed_by, run.root, "video", "0"), 6)
        assert saved in (6, 9) and not run.mp4_path(key).exists()
        output = call(*resumed_by, run.root, "video", "0")
        assert re.search(rf"video {key} goes on after step {saved} of {NUM_STEPS}", output), output
        found = collect(run)[key]
        assert np.abs(found.latents_CTHW - expected.latents_CTHW).max() <= 1e-5
        assert found.video_provenance.num_ranks == (1 if resumed_by is ONE_RANK else 2)
        assert not run.position_path(key).exists() and not list(run.leases_path.rglob("*.lease"))
        assert run.sealed_path("video", 0).exists()
