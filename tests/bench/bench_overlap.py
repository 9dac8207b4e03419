"""How much of array 2's time is spent denoising: decoding shared by the ranks and MP4s written beside, against rank 0 alone.

    OMP_NUM_THREADS=1 python tests/bench/bench_overlap.py [--videos 50] [--ranks 4] [--speedup 20]

The ranks are processes over gloo and run the stage's own loop, files included; denoising, decoding and writing an MP4 are
sleeps, with the proportions of 81 frames at 480p on 8 H100 (assumed, not measured). The share is the time of rank 0 inside the
denoiser by the time from the first video's start to the last MP4, when the shard can be sealed; start-up is not counted.
Latents and frames are as much smaller as the sleeps are shorter; what else a video costs is not, so a busy machine shows.
"Alone" is the older loop: rank 0 saves, decodes and writes each video while the others wait for it in the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from delivery_writers import write_slowly  # noqa: E402
from helpers import first_frame, frozen_run, provenance, write_tree  # noqa: E402

from ipt2v import hdf5  # noqa: E402
from ipt2v.delivery import background_encoder  # noqa: E402
from ipt2v.records import FirstFrame, Made, Video, VideoLatents  # noqa: E402
from ipt2v.run_dir import RunDir  # noqa: E402
from ipt2v.stages.rehearsal import position_after  # noqa: E402

if TYPE_CHECKING:
    from ipt2v.parallel import Group

DENOISE_SECONDS, DECODE_SECONDS, MP4_SECONDS = 45, 7, 15
NUM_STEPS = 5
FORMS = {"alone": "rank 0 decodes and writes, the others wait", "shared": "decoding shared, MP4s in the background"}


@dataclass
class StandIn:
    """The video stage as sleeps; the ranks are in step as in a denoiser's collectives."""

    group: Group
    speedup: float
    denoising: float = 0

    def make(self, starts: Iterable[tuple[FirstFrame, None]], progress: Any) -> Iterator[Made[VideoLatents]]:
        for one, _ in starts:
            self.group.meet()
            start = time.monotonic()
            for step in range(NUM_STEPS):
                time.sleep(DENOISE_SECONDS / self.speedup / NUM_STEPS)
                progress(position_after(step + 1, NUM_STEPS))
            seconds = time.monotonic() - start
            self.denoising += seconds
            latents_CTHW = np.zeros((16, 21, 60, round(104 / self.speedup)), dtype=np.float32)
            yield Made(record=VideoLatents(key=one.key, latents_CTHW=latents_CTHW), seed=1, seconds=seconds)

    def decode(self, latents: VideoLatents) -> Video:
        time.sleep(DECODE_SECONDS / self.speedup)
        return Video(key=latents.key, frames_THWC=np.zeros((81, 480, round(832 / self.speedup), 3), dtype=np.uint8), fps=16)


def alone(work: Any, group: Group, stage: StandIn, todo: tuple[str, ...], write: Any) -> None:
    """The older loop."""
    paths, digest = work.run.record_paths("first_frame", work.shard, todo), work.environment.run_digest
    for made in stage.make(((hdf5.load_first_frame(paths[key], key, run_digest=digest), None) for key in todo), lambda _: None):
        if group.is_first:
            key = made.record.key
            hdf5.save_video_latents(work.run.part_path("video", key), made.record, work.provenance(made, group))
            video = stage.decode(made.record)
            write(work.run.mp4_path(key), video.frames_THWC, fps=video.fps)
    group.meet()


def rank(form: str, root: str, speedup: float) -> None:
    """One rank; the first prints its seconds of denoising and of all."""
    from ipt2v import video_shard
    from ipt2v.claims import Claims, agreed, videos_to_make
    from ipt2v.first_frames import FirstFrames
    from ipt2v.leases import leases
    from ipt2v.parallel import group_from_environment
    from ipt2v.work import open_work

    with group_from_environment() as group, background_encoder(write_slowly, seconds=MP4_SECONDS / speedup) as encoder:
        work, stage = open_work(RunDir(Path(root)), "video", 0), StandIn(group, speedup)
        time.sleep(1)  # the encoder is up
        group.meet()
        start = time.monotonic()
        if form == "alone":
            alone(work, group, stage, videos_to_make(work), partial(write_slowly, seconds=MP4_SECONDS / speedup))
        else:
            with leases(work.run.leases_path, f"rank {group.rank}") as mine, ThreadPoolExecutor(1) as files:
                claims = Claims(work=work, leases=mine) if group.is_first else None
                delivery = video_shard.Delivery(
                    work=work,
                    group=group,
                    stage=stage,
                    encoder=encoder,
                    files=files,
                    first_frames=FirstFrames(work=work) if claims is None else claims.first_frames,
                )
                video_shard.deliver(delivery, (), agreed(None if claims is None else claims.videos(), group), claims)
        wall = time.monotonic() - start
        if group.is_first:
            assert work.run.done("video", 0, work.keys) == set(work.keys)
            print(json.dumps([stage.denoising, wall]))


def measure(form: str, num_videos: int, num_ranks: int, speedup: float) -> tuple[float, float]:
    """(seconds in the denoiser, seconds) of a run of its own."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        write_tree(Path(folder) / "testset", tuple(f"id{number:03d}" for number in range(num_videos)), num_prompts=1)
        run = frozen_run(Path(folder), num_shards=1)
        digest = run.environment().run_digest
        for key in run.shard_keys(0):
            hdf5.save_first_frame(run.part_path("first_frame", key), first_frame(key), provenance(digest))
        port = str(free.getsockname()[1])
        free.close()
        common = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, "--form", form, "--run", str(run.root), "--speedup", str(speedup)]
        ranks = [
            subprocess.Popen(
                command, env=os.environ | common | {"RANK": str(one), "LOCAL_RANK": str(one)}, stdout=subprocess.PIPE, text=True
            )
            for one in range(num_ranks)
        ]
        outputs = [one.communicate()[0] for one in ranks]
        assert [one.returncode for one in ranks] == [0] * num_ranks
    denoising, wall = json.loads(outputs[0].splitlines()[-1])
    return denoising, wall


def ideal_share(form: str, num_videos: int, num_ranks: int) -> float:
    """The share if nothing but the sleeps took time."""
    denoising, num_turns = DENOISE_SECONDS * num_videos, -(-num_videos // num_ranks)
    if form == "alone":
        return DENOISE_SECONDS / (DENOISE_SECONDS + DECODE_SECONDS + MP4_SECONDS)
    return denoising / (denoising + DECODE_SECONDS * num_turns + MP4_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--speedup", type=float, default=20, help="how many times faster than life the sleeps are")
    parser.add_argument("--only", choices=FORMS)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # a rank of the benchmark
    parser.add_argument("--run", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.form is not None:
        rank(chosen.form, chosen.run, chosen.speedup)
        return
    print(
        f"{chosen.videos} videos on {chosen.ranks} ranks: {DENOISE_SECONDS} s, decode {DECODE_SECONDS} s, MP4 {MP4_SECONDS} s"
    )
    print("| form | denoising s | all s | share | share by the durations alone |")
    print("| --- | --- | --- | --- | --- |")
    for form, words in FORMS.items():
        if chosen.only in (None, form):
            denoising, wall = (one * chosen.speedup for one in measure(form, chosen.videos, chosen.ranks, chosen.speedup))
            ideal = ideal_share(form, chosen.videos, chosen.ranks)
            print(f"| {words} | {denoising:.0f} | {wall:.0f} | {denoising / wall:.3f} | {ideal:.3f} |", flush=True)


if __name__ == "__main__":
    main()
