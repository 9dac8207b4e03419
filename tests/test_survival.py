"""What can befall a run, each for real on the test cluster: after at most one more `submit` every video is there, once.

Rehearsals: videos are sleeps, everything around the models is the product's own. Two video elements of two nodes each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest
import yaml
from helpers import ROOT, write_tree
from main_job import BIN, call, ipt2v, pid_of_rank, run_folder

from ipt2v import hdf5
from ipt2v.run_dir import RunDir
from slurm.devcluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]
CONFIG = ROOT / "configs" / "demo.yaml"
NUM_PEOPLE, NUM_SHARDS, NUM_FRAMES = 4, 2, 17
STALL_SECONDS = 30  # longer than an element takes to load on a busy machine


class Survivor:
    """A run on the test cluster to which something happens."""

    def __init__(
        self,
        folder: Path,
        cluster: Cluster,
        *,
        seconds: float = 1.0,
        num_people: int = NUM_PEOPLE,
        save_every: int = 2,
        **site: object,
    ) -> None:
        self.folder, self.cluster, self.num_submits = folder, cluster, 0
        self.testset = folder / "testset"
        write_tree(self.testset, tuple(f"id{number:03d}" for number in range(num_people)), num_prompts=2)
        resources = {"nodes": 2, "gpus_per_node": 1, "timeout_minutes": 20, "mem_gb": 2}
        settings: dict[str, object] = {
            "runs_dir": str(folder / "runs"),
            "num_shards": NUM_SHARDS,
            "signal_delay_seconds": 20,
            "stall_minutes": STALL_SECONDS / 60,
            "first_frame": {"gpus_per_node": 1, "timeout_minutes": 20, "mem_gb": 2},
        }
        video = resources | dict(site.pop("video", {}))  # type: ignore[call-overload]
        self.site = folder / "cluster.yaml"
        self.site.write_text(yaml.safe_dump(settings | site | {"video": video}), encoding="utf-8")
        self.words = (
            *(
                "submit",
                CONFIG,
                f"testset.path={self.testset}",
                f"rehearsal.seconds={seconds}",
                f"video.save_every_steps={save_every}",
            ),
            *("video.num_inference_steps=10", f"video.num_frames={NUM_FRAMES}", "--rehearse", "--on", "slurm"),
            *("--cluster", self.site),
        )
        self.run = RunDir(folder)

    def submit(self, *words: str, expect: int = 0) -> str:
        self.num_submits += 1
        output = ipt2v(*self.words, *words, environment=self.cluster.environment, expect=expect)
        self.run = run_folder(output)
        return output

    def command(self, *words: str) -> str:
        return call(*words, environment=self.cluster.environment)

    @property
    def keys(self) -> list[str]:
        return [item.key for item in self.run.manifest()]

    def delivered(self) -> set[str]:
        return {
            path.relative_to(self.run.root / "video").with_suffix("").as_posix() for path in self.run.root.glob("video/*/*.mp4")
        }

    def wait_for(self, what: Callable[[], object], seconds: float = 200) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.command("squeue") + self.logs()
            time.sleep(0.1)

    def wait_for_videos(self, number: int = 1) -> None:
        self.wait_for(lambda: len(self.delivered()) >= number)

    def wait_until_idle(self) -> None:
        self.wait_for(lambda: not self.command("squeue", "-h"), 400)

    def element(self, shard: int) -> str:
        """Its job id, as scancel wants it."""
        rows = self.command("squeue", "-h", "-r", "-o", "%i|%j").splitlines()
        return next(row.split("|")[0] for row in rows if ".video." in row and row.split("|")[0].endswith(f"_{shard}"))

    def kill(self, shard: int, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(pid_of_rank(self.run, shard, rank), number)

    def logs(self) -> str:
        files = sorted(self.run.root.glob("jobs/*/*_log.*"))
        return "\n".join(f"==> {file} <==\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def finish(self, *, bad: tuple[str, ...] = ()) -> None:
        """Wait for the queue, submit once more if something is missing, and look at every file."""
        self.wait_until_idle()
        if self.delivered() | set(bad) != set(self.keys):
            try:
                self.submit("--wait", expect=1 if bad else 0)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{self.logs()}") from None
        assert self.num_submits <= 2
        assert_whole(self.run, bad=bad)


def assert_whole(run: RunDir, *, bad: tuple[str, ...] = ()) -> None:
    """Every good item delivered, decodable from end to end, recorded once; nothing half done is left."""
    digest, sealed = run.environment().run_digest, []
    for shard in range(run.environment().num_shards):
        keys = hdf5.sealed_keys(run.sealed_path("video", shard))
        sealed += keys
        for key in keys:
            assert hdf5.load_video_latents(run.sealed_path("video", shard), key, run_digest=digest).latents_CTHW.size
            assert hdf5.load_first_frame(run.sealed_path("first_frame", shard), key, run_digest=digest).key == key
    good = [item.key for item in run.manifest() if item.key not in bad]
    assert sorted(sealed) == sorted(good)
    for key in good:
        with av.open(str(run.mp4_path(key))) as container:
            assert sum(1 for _ in container.decode(video=0)) == NUM_FRAMES, key
    assert {failure.key for failure in run.failures()} == set(bad)
    left = [path for folder in ("parts", "leases", "positions") for path in (run.root / "video" / folder).rglob("*.*")]
    assert [path for path in left if not path.name.startswith(".")] == []


@pytest.fixture
def survivor(cluster: Cluster, tmp_path: Path) -> Iterator[Survivor]:
    yield from surviving(Survivor(tmp_path, cluster))


def surviving(survivor: Survivor) -> Iterator[Survivor]:
    start = time.monotonic()
    yield survivor
    print(f"{survivor.num_submits} submits, {time.monotonic() - start:.0f} s")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(survivor: Survivor, rank: int) -> None:
    survivor.submit()
    survivor.wait_for_videos()
    survivor.kill(0, rank)
    survivor.finish()


def test_a_power_cut_of_one_of_two_nodes(survivor: Survivor) -> None:
    survivor.submit()
    survivor.wait_for_videos()
    nodes = survivor.command("squeue", "-h", "-j", survivor.element(0), "-o", "%N").strip()
    name = survivor.command("scontrol", "show", "hostnames", nodes).split()[-1]
    index = survivor.cluster.node_names.index(name)
    survivor.cluster.power_cut(index)
    survivor.command("scontrol", "update", f"nodename={name}", "state=down", "reason=test")  # SLURM would find out by itself
    survivor.cluster.start_slurmd(index)
    survivor.finish()
    assert survivor.num_submits == 1  # SLURM has requeued the element


def test_preemption(cluster: Cluster, tmp_path: Path) -> None:
    survivor = Survivor(tmp_path, cluster, seconds=4, save_every=9)
    survivor.submit()
    survivor.wait_for_videos()
    time.sleep(1.5)  # into the next videos
    survivor.command("srun", "-p", "high", "-N4", "--exclusive", "sleep", "3")
    survivor.finish()
    assert survivor.num_submits == 1
    assert re.search(r"goes on after step [1-8] of 10", survivor.logs())  # saved on SLURM's warning


def test_a_time_limit_of_a_minute(cluster: Cluster, tmp_path: Path) -> None:
    survivor = Survivor(tmp_path, cluster, seconds=12, video={"timeout_minutes": 1})
    survivor.submit()
    survivor.finish()
    assert survivor.num_submits == 1


def test_a_requeue_from_outside(survivor: Survivor) -> None:
    survivor.submit()
    survivor.wait_for_videos()
    survivor.command("scontrol", "requeue", survivor.element(1))
    survivor.finish()
    assert survivor.num_submits == 1


def test_a_controller_that_dies_and_comes_back(survivor: Survivor) -> None:
    survivor.submit()
    survivor.wait_for_videos()
    survivor.cluster.restart_controller()
    survivor.finish()


def test_scancel_of_an_element(survivor: Survivor) -> None:
    survivor.submit()
    survivor.wait_for_videos()
    survivor.command("scancel", survivor.element(0))
    survivor.finish()


KILLER = """#!/bin/sh
# stands before the real sbatch: the second call ends the driver that made it
echo call >> {calls}
if [ "$(wc -l < {calls})" = 2 ]; then kill -9 $PPID; exit 1; fi
exec {real} "$@"
"""


def test_a_driver_killed_between_its_two_arrays(survivor: Survivor, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    real = call("sh", "-c", "command -v sbatch").strip()
    (folder / "sbatch").write_text(KILLER.format(calls=tmp_path / "calls", real=real), encoding="utf-8")
    (folder / "sbatch").chmod(0o755)
    environment = survivor.cluster.environment | {"PATH": f"{folder}:{os.environ['PATH']}"}
    survivor.num_submits = 1
    output = ipt2v(*survivor.words, environment=environment, expect=-signal.SIGKILL)
    survivor.run = run_folder(output)
    again = survivor.submit()  # while array 1 waits or runs
    assert "video" in again
    survivor.finish()


def test_two_submits_at_once(survivor: Survivor) -> None:
    environment = os.environ | survivor.cluster.environment
    words = [str(word) for word in (BIN / "ipt2v", *survivor.words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(words, env=environment, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    outputs = [one.communicate(timeout=120)[0] for one in both]
    codes = sorted(one.returncode for one in both)
    assert codes in ([0, 0], [0, 2]), outputs
    names = survivor.command("squeue", "-h", "-r", "-o", "%j").splitlines()
    assert len(names) <= 2 * NUM_SHARDS, names
    survivor.num_submits, survivor.run = 1, run_folder(next(one for one in outputs if one.startswith("run")))
    survivor.finish()
    assert survivor.num_submits == 1


def test_a_rank_that_hangs_ends_its_element_and_every_rank_says_where_it_was(survivor: Survivor) -> None:
    survivor.submit()
    survivor.wait_for_videos()
    survivor.kill(0, 1, signal.SIGSTOP)
    survivor.finish()
    assert "Timeout (0:00:30)!" in survivor.logs() and "in meet" in survivor.logs()


RAISER = """
import os, sys, time
real = time.sleep
def sleep(seconds):
    if os.environ.get("SLURM_PROCID") == "1" and sys._getframe(1).f_code.co_filename.endswith("stages/rehearsal.py"):
        try:
            open({mark!r}, "x").close()
        except FileExistsError:
            pass
        else:
            raise RuntimeError("planted")
    real(seconds)
time.sleep = sleep
"""


def test_a_rank_that_raises(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(RAISER.format(mark=str(tmp_path / "raised")), encoding="utf-8")
    survivor = Survivor(tmp_path, cluster, setup=[f"export PYTHONPATH={folder}"])
    survivor.submit()
    survivor.finish()
    (note,) = survivor.run.root.glob("video/crashes/*/*/*.txt")
    assert note.read_text(encoding="utf-8").startswith("RuntimeError: planted (rank 1 on ")
    assert survivor.num_submits == 2


def test_a_record_that_was_cut_short(cluster: Cluster, tmp_path: Path) -> None:
    survivor = Survivor(tmp_path, cluster, seconds=3)
    survivor.submit()
    survivor.wait_for_videos(2)
    survivor.command("scancel", survivor.element(0), survivor.element(1))
    survivor.wait_until_idle()
    part = next(path for path in survivor.run.root.glob("video/parts/*/*.h5"))
    part.write_bytes(part.read_bytes()[:-200])
    survivor.finish()


def test_a_photo_without_pixels(survivor: Survivor) -> None:
    photo = survivor.testset / "id001" / "image.png"
    photo.write_bytes(photo.read_bytes()[:33])
    survivor.submit()
    survivor.finish(bad=("id001/prompt1", "id001/prompt2"))
    assert survivor.num_submits <= 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for a few videos; mounted before the cluster starts, whose nodes would not see it else."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a tmpfs here: needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, cluster_without_accounting: Cluster, tmp_path: Path) -> None:
    survivor = Survivor(tmp_path, cluster_without_accounting, runs_dir=str(small_disk / "runs"))
    survivor.submit()
    ballast = small_disk / "ballast"
    survivor.wait_for_videos()
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(bytes(4096))
    survivor.wait_until_idle()
    assert survivor.delivered() != set(survivor.keys)
    ballast.unlink()
    survivor.finish()


def test_a_hundred_random_kills(cluster: Cluster, tmp_path: Path) -> None:
    """Ranks die all the time while 50 videos are made; whoever is left goes on, and `submit` brings back the rest."""
    luck, killed, finished = random.Random(1), 0, dict[str, str]()
    survivor = Survivor(tmp_path, cluster, seconds=0.5, num_people=25, num_shards=10, video={"nodes": 1, "gpus_per_node": 2})
    survivor.submit()
    deadline = time.monotonic() + 500
    while killed < 100 and time.monotonic() < deadline and survivor.delivered() != set(survivor.keys):
        pids = ranks_of(survivor.run)
        if pids:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(luck.choice(pids), signal.SIGKILL)
                killed += 1
        elif not survivor.command("squeue", "-h"):
            survivor.submit()
        time.sleep(luck.uniform(0.1, 1.0))
        now = provenances(survivor.run)
        assert finished.items() <= now.items()  # nothing finished is lost or made again
        finished = now
    survivor.wait_until_idle()
    survivor.submit("--wait")
    assert finished.items() <= provenances(survivor.run).items()
    assert_whole(survivor.run)
    print(f"{killed} kills, {survivor.num_submits} submits")


def ranks_of(run: RunDir) -> list[int]:
    """Processes of the run's jobs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            b"launch.element" in arguments
            and any(str(run.root).encode() in one for one in arguments)
            and b"srun" not in arguments[0]
        ):
            found.append(int(process.name))
    return found


def provenances(run: RunDir) -> dict[str, str]:
    """key -> how the video of each delivered item came to be."""
    digest, made = run.environment().run_digest, {}
    for shard in range(run.environment().num_shards):
        keys = run.shard_keys(shard)
        for key, path in run.record_paths("video", shard, keys).items():
            try:
                made[key] = json.dumps(hdf5.load_provenance(path, key, run_digest=digest).created)
            except FileNotFoundError:  # sealed meanwhile
                made[key] = json.dumps(hdf5.load_provenance(run.sealed_path("video", shard), key, run_digest=digest).created)
    return made
