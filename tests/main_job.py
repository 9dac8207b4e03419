"""The main job as a user runs it, and what it made, as values to compare: for tests that run it in different places."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from helpers import ROOT
from numpy.typing import NDArray
from PIL import Image

from ipt2v import hdf5
from ipt2v.records import FirstFrame, Provenance
from ipt2v.run_dir import RunDir

BIN = Path(sys.executable).parent
TESTSET_2025 = ROOT.parent / "shared" / "data" / "testset2025"
# small enough for 50 videos on two cores, not so small that something is 1
SMALL = (
    "decouple.max_new_tokens=16",
    "first_frame.width=64",
    "first_frame.height=48",
    "first_frame.num_inference_steps=2",
    "video.width=48",
    "video.height=32",
    "video.num_frames=9",
    "video.num_inference_steps=2",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeItem:
    """All that was made of one item, and how."""

    spatial_prompt: str
    temporal_prompt: str
    image_HWC: NDArray[np.uint8]
    latents_CTHW: NDArray[np.float32]
    mp4_sha256: str
    first_frame_provenance: Provenance
    video_provenance: Provenance


def real_testset(folder: Path) -> Path:
    """10 identities x 5 prompts: the real ones where they lie beside the project, else pictures of noise in the same layout."""
    if TESTSET_2025.is_dir():
        return TESTSET_2025
    for number in range(1, 11):
        identity = folder / f"id{number:03d}"
        identity.mkdir(parents=True)
        noise = np.random.default_rng(number).integers(0, 256, (80, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(identity / "image.png")
        for prompt in range(1, 6):
            (identity / f"prompt{prompt}.txt").write_text(f"Person {number} does thing {prompt}.", encoding="utf-8")
    return folder


def call(*words: str | Path, environment: dict[str, str] | None = None, expect: int = 0) -> str:
    """Output of a command, both streams; fails unless it exits with `expect`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    done = subprocess.run(
        [str(word) for word in words],
        env=clean | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == expect, f"exit code {done.returncode}, expected {expect}:\n{done.stdout}"
    return done.stdout


def ipt2v(*words: str | Path, environment: dict[str, str] | None = None, expect: int = 0) -> str:
    return call(BIN / "ipt2v", *words, environment=environment, expect=expect)


def run_folder(output: str) -> RunDir:
    """The run folder that submit or freeze has printed."""
    line = next(line for line in output.splitlines() if line.startswith(("run", "/")))
    return RunDir(Path(line.split()[-1]))


def first_frames(run: RunDir) -> dict[str, tuple[FirstFrame, Provenance]]:
    """Every first frame that a run has made, by key."""
    digest, made = run.environment().run_digest, {}
    for shard in range(run.environment().num_shards):
        for key, path in run.record_paths("first_frame", shard, run.shard_keys(shard)).items():
            provenance = hdf5.load_provenance(path, key, run_digest=digest)
            made[key] = (hdf5.load_first_frame(path, key, run_digest=digest), provenance)
    return made


def collect(run: RunDir) -> dict[str, MadeItem]:
    """Everything that a run has made, by key."""
    digest, made = run.environment().run_digest, {}
    for shard in range(run.environment().num_shards):
        for item in run.shard(shard):
            if not run.mp4_path(item.key).exists():
                continue
            first_frame_path, video_path = (run.record_path(stage, shard, item.key) for stage in ("first_frame", "video"))
            first_frame = hdf5.load_first_frame(first_frame_path, item.key, run_digest=digest)
            made[item.key] = MadeItem(
                spatial_prompt=first_frame.spatial_prompt,
                temporal_prompt=first_frame.temporal_prompt,
                image_HWC=first_frame.image_HWC,
                latents_CTHW=hdf5.load_video_latents(video_path, item.key, run_digest=digest).latents_CTHW,
                mp4_sha256=hashlib.sha256(run.mp4_path(item.key).read_bytes()).hexdigest(),
                first_frame_provenance=hdf5.load_provenance(first_frame_path, item.key, run_digest=digest),
                video_provenance=hdf5.load_provenance(video_path, item.key, run_digest=digest),
            )
    return made


def assert_same_videos(ours: dict[str, MadeItem], theirs: dict[str, MadeItem], *, latents_within: float) -> None:
    """Prompts and first frames bit for bit, latents within a bound; equal latents make equal MP4s."""
    common = ours.keys() & theirs.keys()
    assert common
    for key in common:
        one, other = ours[key], theirs[key]
        assert (one.spatial_prompt, one.temporal_prompt) == (other.spatial_prompt, other.temporal_prompt), key
        assert np.array_equal(one.image_HWC, other.image_HWC), key
        difference = float(np.abs(one.latents_CTHW - other.latents_CTHW).max())
        assert difference <= latents_within, f"{key}: latents differ by {difference}"
        if difference == 0:
            assert one.mp4_sha256 == other.mp4_sha256, key


def pid_of_rank(run: RunDir, shard: int, rank: int, stage: str = "video") -> int:
    """The process that is a rank of an element on the test cluster. Raises AssertionError if there is none."""
    wanted = {f"SLURM_ARRAY_TASK_ID={shard}".encode(), f"SLURM_PROCID={rank}".encode()}
    arguments = {b"launch.element", str(run.jobs_path(stage)).encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found, variables = ((process / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if Path(found[0].decode()).name.startswith("python") and arguments <= set(found) and wanted <= set(variables):
            return int(process.name)
    raise AssertionError(f"no process of {stage} shard {shard} rank {rank}")
