"""Seconds and memory of packing 1,000 videos: all checks, by ours and by one process; the archive, streamed and read whole.

    python tests/bench/bench_package.py [--videos 1000] [--megabytes 5]

The videos are 25 frames of 128x128, each with its records. "ours" is `ipt2v package`: every MP4 decoded, every record read, the
archive and its checksums. "one process" is the same without side by side. "naive" decodes one video after the other by PyAV as
it comes, reads each whole, and deflates. Then the archive alone, of as many files of so many megabytes: streamed, read whole
and stored, read whole and deflated. Memory is the largest sum of resident sizes of the process and its children, which counts
shared pages once for each of them; in brackets what it was at the start. Seconds are of one call.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
FRAMES, SIZE = 25, 128


def tree_mb(root: int) -> float:
    """Resident megabytes of a process and all below it."""
    parents: dict[int, list[int]] = {}
    pages: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            pid, fields = int(folder.name), (folder / "stat").read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(pid)
            pages[pid] = int(fields[21])
        except (OSError, ValueError):
            continue
    todo, total = [root], 0.0
    while todo:
        pid = todo.pop()
        total += pages.get(pid, 0) * PAGE_MB
        todo += parents.get(pid, [])
    return total


def measured(act: Callable[[], object]) -> tuple[float, float, float]:
    """(seconds, MB before, MB at most) of one call in a process of its own."""
    answers, theirs = multiprocessing.get_context("fork").Pipe(False)

    def call() -> None:
        before, peak, over = tree_mb(os.getpid()), [0.0], threading.Event()

        def watch() -> None:
            while not over.wait(0.1):
                peak[0] = max(peak[0], tree_mb(os.getpid()))

        watcher = threading.Thread(target=watch)
        start = time.perf_counter()
        watcher.start()
        act()
        seconds = time.perf_counter() - start
        over.set()
        watcher.join()
        theirs.send((seconds, before, peak[0]))

    child = multiprocessing.get_context("fork").Process(target=call)
    child.start()
    child.join()
    assert child.exitcode == 0
    return answers.recv()  # type: ignore[no-any-return]


def finished_run(folder: Path, num_videos: int) -> Path:
    """A run folder with all its videos and records, in a process that takes torch with it when it ends."""

    def make() -> None:
        from helpers import first_frame, frozen_run, provenance, video_latents, write_tree

        from ipt2v import hdf5
        from ipt2v.mp4 import write_mp4
        from ipt2v.records import item_seed

        write_tree(folder / "testset", tuple(f"id{number:03d}" for number in range(1, -(-num_videos // 5) + 1)), num_prompts=5)
        settings = (f"video.width={SIZE}", f"video.height={SIZE}", f"video.num_frames={FRAMES}")
        run = frozen_run(folder, *settings)
        environment, config = run.environment(), run.config()
        ramp = np.add.outer(np.arange(SIZE), np.arange(SIZE + 2 * FRAMES) * 2)
        picture = np.stack([ramp % 200, ramp // 2 % 180, ramp // 3 % 220], axis=-1).astype(np.uint8)
        write_mp4(folder / "one.mp4", np.stack([picture[:, 2 * t : 2 * t + SIZE] for t in range(FRAMES)]), fps=16, crf=18)
        data = (folder / "one.mp4").read_bytes()
        made = replace(provenance(environment.run_digest), weights=environment.weights)
        for shard in range(environment.num_shards):
            keys = run.shard_keys(shard)
            for key in keys:
                mine = replace(made, seed=item_seed(config.seed, key, "video"))
                hdf5.save_first_frame(run.part_path("first_frame", key), first_frame(key), mine)
                hdf5.save_video_latents(run.part_path("video", key), video_latents(key), mine)
                run.mp4_path(key).parent.mkdir(parents=True, exist_ok=True)
                run.mp4_path(key).write_bytes(data)
            for stage in ("first_frame", "video"):
                hdf5.seal(run.sealed_path(stage, shard), [(key, run.part_path(stage, key)) for key in keys])

    child = multiprocessing.get_context("fork").Process(target=make)
    child.start()
    child.join()
    return next((folder / "runs").iterdir())


def checks(root: Path, num_videos: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """The whole command, in three ways."""
    import ipt2v.package  # so that every form starts with the same imports
    from ipt2v.mp4 import inspect_mp4, read_mp4
    from ipt2v.run_dir import RunDir

    run = RunDir(root)

    def ours() -> None:
        assert ipt2v.package.write_package(run).num_videos == num_videos

    def alone() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        ours()

    def naive() -> None:
        videos = [(item.key, run.mp4_path(item.key)) for item in run.manifest()]
        for _, path in videos:
            inspect_mp4(path)
            frames_THWC = read_mp4(path).astype(np.float32)
            assert frames_THWC.mean() > 1 and np.abs(np.diff(frames_THWC, axis=0)).mean() > 0
        data = {key: path.read_bytes() for key, path in videos}
        with zipfile.ZipFile(root / "naive.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for key, content in data.items():
                archive.writestr(f"submission/{key}.mp4", content)

    yield "ours: checks and archive", ours
    yield "the same on one core", alone
    yield "naive: one after the other by PyAV, no records, deflated", naive


def archives(folder: Path, num_files: int, megabytes: float) -> Iterator[tuple[str, Callable[[], object]]]:
    """The archive alone."""
    from ipt2v.package_zip import Member, sha256_of, write_zip

    source = folder / "large"
    source.write_bytes(np.random.default_rng(0).bytes(int(megabytes * 1e6)))
    size, sha256 = source.stat().st_size, sha256_of(source)
    members = [Member(name=f"submission/{n}.mp4", path=source, sha256=sha256, num_bytes=size) for n in range(1, num_files + 1)]

    def whole(how: int) -> None:
        data = {member.name: member.path.read_bytes() for member in members}
        with zipfile.ZipFile(folder / "whole.zip", "w", how) as archive:
            for name, content in data.items():
                archive.writestr(name, content)
        sha256_of(folder / "whole.zip")

    yield "streamed, stored, its bytes checked again", lambda: write_zip(folder / "streamed.zip", members)
    yield "read whole, stored", lambda: whole(zipfile.ZIP_STORED)
    yield "read whole, deflated", lambda: whole(zipfile.ZIP_DEFLATED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1000)
    parser.add_argument("--megabytes", type=float, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = finished_run(folder, chosen.videos)
        print(f"{chosen.videos} videos of {FRAMES} frames, {SIZE}x{SIZE}, on {len(os.sched_getaffinity(0))} cores")
        print("| form | seconds | MB at most (at the start) |\n| --- | --- | --- |")
        for words, act in checks(root, chosen.videos):
            seconds, before, peak = measured(act)
            print(f"| {words} | {seconds:.1f} | {peak:.0f} ({before:.0f}) |", flush=True)
        print(f"\n{chosen.videos} files of {chosen.megabytes:g} MB, the archive alone")
        print("| form | seconds | MB at most (at the start) |\n| --- | --- | --- |")
        for words, act in archives(folder, chosen.videos, chosen.megabytes):
            seconds, before, peak = measured(act)
            print(f"| {words} | {seconds:.1f} | {peak:.0f} ({before:.0f}) |", flush=True)


if __name__ == "__main__":
    main()
