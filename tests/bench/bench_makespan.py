"""How long a run's videos take on many slots, against work shared out perfectly: with elements that help others, and without.

    OMP_NUM_THREADS=1 python tests/bench/bench_makespan.py [--videos 200] [--slots 16] [--seconds 1] [--spread 10]

Each slot is a process that runs an element's own code, files and leases included, in a rehearsal: a video is a sleep of between
`seconds` and `spread` times as much, depending on its key. Every slot has a shard, and all begin together when they are loaded.
The ideal is the sum of all videos' seconds by the number of slots.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from helpers import frozen_run, write_tree  # noqa: E402

from ipt2v.run_dir import RunDir  # noqa: E402

FORMS = {"helping": "elements that are done take what others have not begun", "alone": "each element makes its shard alone"}


def element(root: str, shard: int, form: str) -> None:
    """One slot: load, wait for the others, make videos."""
    from ipt2v import claims
    from ipt2v.run import run_shard
    from ipt2v.stages import rehearsal  # noqa: F401 - loaded before the clock starts

    if form == "alone":
        claims.Claims._left_by_others = lambda *_: ()  # type: ignore[method-assign]
    Path(root, f"ready{shard}").touch()
    while not Path(root, "go").exists():
        time.sleep(0.01)
    run_shard(root, "video", shard)


def measure(form: str, chosen: argparse.Namespace) -> tuple[float, float]:
    """(seconds from the start to the last seal, ideal seconds) of a run of its own."""
    from ipt2v.run import run_shard
    from ipt2v.stages.rehearsal import seconds_of

    with tempfile.TemporaryDirectory() as folder:
        write_tree(Path(folder) / "testset", tuple(f"id{number:03d}" for number in range(chosen.videos)), num_prompts=1)
        words = ("enabled=true", f"seconds={chosen.seconds}", f"spread={chosen.spread}")
        run = frozen_run(Path(folder), *(f"rehearsal.{word}" for word in words), num_shards=chosen.slots)
        for shard in range(chosen.slots):
            run_shard(run.root, "first_frame", shard)
        command = [sys.executable, __file__, "--form", form, "--run", str(run.root), "--shard"]
        slots = [subprocess.Popen([*command, str(shard)], env=os.environ.copy()) for shard in range(chosen.slots)]
        while len(list(run.root.glob("ready*"))) < chosen.slots:
            time.sleep(0.1)
        start = time.monotonic()
        (run.root / "go").touch()
        assert [slot.wait() for slot in slots] == [0] * chosen.slots
        seconds = time.monotonic() - start
        config, keys = run.config(), [item.key for item in run.manifest()]
        check(run, keys)
        return seconds, sum(seconds_of(key, config) for key in keys) / chosen.slots


def check(run: RunDir, keys: list[str]) -> None:
    """Every video once, every shard sealed."""
    for shard in range(run.environment().num_shards):
        assert run.done("video", shard, run.shard_keys(shard)) == set(run.shard_keys(shard))
        assert run.sealed_path("video", shard).exists()
    assert len(list(run.root.glob("video/*/*.mp4"))) == len(keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.0, help="of the shortest video")
    parser.add_argument("--spread", type=float, default=10.0, help="longest by shortest")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # a slot of the benchmark
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.form is not None:
        element(chosen.run, chosen.shard, chosen.form)
        return
    print(f"{chosen.videos} videos of {chosen.seconds} to {chosen.seconds * chosen.spread} s on {chosen.slots} slots")
    print("| form | makespan s | ideal s | makespan / ideal |\n| --- | --- | --- | --- |")
    for form, text in FORMS.items():
        seconds, ideal = measure(form, chosen)
        print(f"| {text} | {seconds:.1f} | {ideal:.1f} | {seconds / ideal:.2f} |", flush=True)


if __name__ == "__main__":
    main()
