"""Who decodes which video, and the process that writes MP4s: with stand-ins for the video model, no torch models."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from delivery_writers import find_the_disk_full, refuse_the_second, write_bytes, write_modules, write_when_told
from helpers import ROOT, first_frame, frozen_run, noise_frames, provenance, write_tree
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ipt2v import hdf5, video_shard
from ipt2v.claims import Claims, agreed
from ipt2v.delivery import MAX_WAITING, Encoder, background_encoder, turns
from ipt2v.first_frames import FirstFrames
from ipt2v.leases import Leases
from ipt2v.mp4 import write_mp4
from ipt2v.parallel import Group
from ipt2v.records import Failure, FirstFrame, Made, Video, VideoLatents
from ipt2v.run_dir import RunDir
from ipt2v.stages.rehearsal import position_after
from ipt2v.video_shard import Delivery
from ipt2v.work import open_work

FPS = 16


# --- who decodes what, and when -----------------------------------------------------------------------------------------


@given(num_items=st.integers(0, 60), num_ranks=st.integers(1, 17))
def test_every_video_is_decoded_once_after_it_is_finished_and_by_a_rank_that_exists(num_items: int, num_ranks: int) -> None:
    keys = [f"id{number}/prompt1" for number in range(num_items)]
    plan = turns(keys, num_ranks)
    assert [key for batch in plan.values() for key in batch] == keys
    for last, batch in plan.items():
        assert len(batch) <= num_ranks
        assert all(keys.index(key) <= keys.index(last) for key in batch)


@given(num_items=st.integers(1, 60), num_ranks=st.integers(1, 17))
def test_no_rank_is_idle_in_a_turn_but_in_the_last(num_items: int, num_ranks: int) -> None:
    plan = turns([f"id{number}/prompt1" for number in range(num_items)], num_ranks)
    assert all(len(batch) == num_ranks for batch in list(plan.values())[:-1])


# --- the process --------------------------------------------------------------------------------------------------------


def video(number: int, num_frames: int = 5) -> Video:
    return Video(key=f"id001/prompt{number}", frames_THWC=noise_frames(num_frames, seed=number), fps=FPS)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def held_frames(pid: int | str) -> list[str]:
    """What a process holds of frames: open descriptors and mappings."""
    names = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    return [name for name in (*names, *maps) if "ipt2v-frames" in name]


def test_the_process_writes_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write_mp4(tmp_path / f"here{number}.mp4", video(number).frames_THWC, fps=FPS, crf=18)
    with background_encoder(write_mp4, crf=18) as encoder:
        for number in (3, 1, 2):
            encoder.hand_over(video(number), tmp_path / f"there{number}.mp4")
    for number in (1, 2, 3):
        assert (tmp_path / f"there{number}.mp4").read_bytes() == (tmp_path / f"here{number}.mp4").read_bytes()


def test_frames_that_lie_otherwise_in_memory_arrive_as_they_are(tmp_path: Path) -> None:
    frames_THWC = video(1).frames_THWC[::-1, :, ::2]
    with background_encoder(write_bytes) as encoder:
        encoder.hand_over(Video(key="id001/prompt1", frames_THWC=frames_THWC, fps=FPS), tmp_path / "1")
    assert (tmp_path / "1").read_bytes() == bytes([FPS]) + frames_THWC.tobytes()


def test_the_process_imports_no_torch(tmp_path: Path) -> None:
    with background_encoder(write_modules) as encoder:
        encoder.hand_over(video(1), tmp_path / "1.mp4")
    imported = set((tmp_path / "1.modules").read_text().split())
    assert "ipt2v.mp4" in imported
    assert not {"torch", "diffusers", "transformers", "xfuser", "pydantic", "h5py"} & imported


def test_a_video_that_cannot_be_written_is_named_at_the_next_hand_over(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError) as caught, background_encoder(refuse_the_second) as encoder:
        for number in (1, 2):
            encoder.hand_over(video(number), tmp_path / f"{number}")
        wait_for((tmp_path / "1").exists)
        for _ in range(MAX_WAITING + 1):
            encoder.hand_over(video(3), tmp_path / "3")
    assert str(caught.value) == "id001/prompt2: no MP4 written: ValueError: width is odd; its latents are kept"
    assert not (tmp_path / "2").exists()


def test_a_video_that_cannot_be_written_is_named_at_the_end(tmp_path: Path) -> None:
    with (
        pytest.raises(ChildProcessError, match="id001/prompt2: no MP4 written"),
        background_encoder(refuse_the_second) as encoder,
    ):
        encoder.hand_over(video(2), tmp_path / "2")


def test_a_full_disk_is_the_same_error_as_in_the_rank_itself(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, background_encoder(find_the_disk_full) as encoder:
        encoder.hand_over(video(1), tmp_path / "1.mp4")
    assert caught.value.errno == errno.ENOSPC
    text = f"{tmp_path / '1.mp4'}: disk full; free space and submit again, finished items are kept"
    assert caught.value.strerror == f"id001/prompt1: {text}"


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileExistsError, match=f"id001/prompt1: File exists: {tmp_path}/file"),
        background_encoder(write_mp4, crf=18) as encoder,
    ):
        encoder.hand_over(video(1), tmp_path / "file" / "1.mp4")


def test_a_process_killed_at_work_is_noticed_at_the_next_hand_over(tmp_path: Path) -> None:
    with (
        pytest.raises(ChildProcessError, match="id001/prompt1: the process that writes its MP4 was killed by SIG"),
        background_encoder(write_when_told) as encoder,
    ):
        encoder.hand_over(video(1), tmp_path / "1.mp4")
        wait_for((tmp_path / "1.begun").exists)
        os.kill(encoder.process.pid, signal.SIGKILL)
        encoder.process.wait()
        encoder.hand_over(video(2), tmp_path / "2.mp4")


def test_a_process_killed_at_work_is_noticed_at_the_end(tmp_path: Path) -> None:
    with (
        pytest.raises(ChildProcessError, match=r"id001/prompt1: the process .* SIGKILL"),
        background_encoder(write_when_told) as encoder,
    ):
        for number in (1, 2):
            encoder.hand_over(video(number), tmp_path / f"{number}.mp4")
        wait_for((tmp_path / "1.begun").exists)
        os.kill(encoder.process.pid, signal.SIGKILL)


def test_a_process_killed_without_work_is_noticed_when_there_is_some(tmp_path: Path) -> None:
    with (
        pytest.raises(ChildProcessError, match=r"id001/prompt1: the process .* SIGKILL"),
        background_encoder(write_bytes) as encoder,
    ):
        os.kill(encoder.process.pid, signal.SIGKILL)
        encoder.process.wait()
        encoder.hand_over(video(1), tmp_path / "1")


def test_signals_to_the_whole_process_group_do_not_end_the_process(tmp_path: Path) -> None:
    with background_encoder(write_bytes) as encoder:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(encoder.process.pid, number)  # the first ones before the interpreter is up
        encoder.hand_over(video(1), tmp_path / "1")
        encoder.drain()
        os.kill(encoder.process.pid, signal.SIGUSR2)
        encoder.hand_over(video(2), tmp_path / "2")
    assert (tmp_path / "1").exists() and (tmp_path / "2").exists()
    assert signal.SIGUSR2 not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "the rank itself hears them as before"


def test_who_hands_over_waits_while_enough_videos_wait(tmp_path: Path) -> None:
    handed: list[int] = []

    def produce(encoder: Encoder) -> None:
        for number in range(1, MAX_WAITING + 4):
            encoder.hand_over(video(number), tmp_path / f"{number}.mp4")
            handed.append(number)

    with background_encoder(write_when_told) as encoder:
        producer = threading.Thread(target=produce, args=(encoder,))
        producer.start()
        wait_for(lambda: len(handed) == MAX_WAITING + 1)
        time.sleep(0.3)
        assert len(handed) == MAX_WAITING + 1, "one in work, MAX_WAITING wait, the next is not taken"
        (tmp_path / "go").touch()
        producer.join(timeout=30)
    assert handed == list(range(1, MAX_WAITING + 4))
    assert len(list(tmp_path.glob("*.mp4"))) == MAX_WAITING + 3


def test_the_frames_are_given_back(tmp_path: Path) -> None:
    named_before = set(os.listdir("/dev/shm"))
    with background_encoder(write_when_told) as encoder:
        for number in (1, 2, 3):
            encoder.hand_over(video(number), tmp_path / f"{number}.mp4")
        assert held_frames("self") == [], "the rank keeps nothing of what it has handed over"
        wait_for((tmp_path / "1.begun").exists)
        assert held_frames(encoder.process.pid)
        (tmp_path / "go").touch()
        encoder.drain()
        assert held_frames(encoder.process.pid) == []
        assert named(named_before) == set()


def test_a_killed_process_leaves_no_frames_behind(tmp_path: Path) -> None:
    named_before = set(os.listdir("/dev/shm"))
    with pytest.raises(ChildProcessError), background_encoder(write_when_told) as encoder:
        for number in (1, 2, 3):
            encoder.hand_over(video(number), tmp_path / f"{number}.mp4")
        encoder.process.kill()
        encoder.drain()
    assert held_frames("self") == []
    assert named(named_before) == set()


def named(before: set[str]) -> set[str]:
    """New names of shared memory, as Python or we would give them; others use the folder too."""
    return {name for name in set(os.listdir("/dev/shm")) - before if name.startswith(("psm_", "torch_", "ipt2v"))}


def test_a_run_that_breaks_off_finishes_the_video_in_work_and_drops_those_that_wait(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), background_encoder(write_when_told) as encoder:
        for number in (1, 2):
            encoder.hand_over(video(number), tmp_path / f"{number}.mp4")
        wait_for((tmp_path / "1.begun").exists)
        threading.Timer(0.3, (tmp_path / "go").touch).start()
        raise RuntimeError("out of memory")
    assert (tmp_path / "1.mp4").exists() and not (tmp_path / "2.mp4").exists()
    assert encoder.process.returncode == 0


HAND_OVER_AND_SLEEP = """
import sys; sys.path.insert(0, "tests")
import time
from pathlib import Path
from test_delivery import background_encoder, video, write_when_told
with background_encoder(write_when_told) as encoder:
    for number in (1, 2):
        encoder.hand_over(video(number), Path(sys.argv[1]) / f"{number}.mp4")
    print(encoder.process.pid, flush=True)
    time.sleep(60)
"""


def test_the_process_does_not_outlive_a_killed_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HAND_OVER_AND_SLEEP, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        pid = int(rank.stdout.readline())
        wait_for((tmp_path / "1.begun").exists)
        rank.kill()
    (tmp_path / "go").touch()
    wait_for(partial(is_over, pid))
    assert (tmp_path / "1.mp4").exists() and not (tmp_path / "2.mp4").exists()


def test_the_process_ends_without_a_word_when_its_rank_is_killed_with_an_answer_unread(tmp_path: Path) -> None:
    """Its traceback would be the last word in the dead rank's log, and `why` would take it for the cause."""
    command = [sys.executable, "-c", HAND_OVER_AND_SLEEP, str(tmp_path)]
    (tmp_path / "go").touch()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None and rank.stderr is not None
        rank.stdout.readline()
        wait_for((tmp_path / "2.mp4").exists)
        time.sleep(0.2)  # its answer is on its way
        rank.kill()
        assert rank.stderr.read() == ""  # until the process, which shares it, has ended


def is_over(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # reaped, before or while we looked
        return True


# --- a shard of videos, with a stand-in for the model ---------------------------------------------------------------------


@dataclass
class StandIn:
    """A stage that animates and decodes at once; the frames tell the key. Notes what this rank has decoded."""

    decoded: list[str] = field(default_factory=list)
    animated: list[str] = field(default_factory=list)

    def make(self, starts: Iterable[tuple[FirstFrame, Any]], progress: Any) -> Iterator[Made[VideoLatents]]:
        for one, _ in starts:
            self.animated.append(one.key)
            yield Made(record=VideoLatents(key=one.key, latents_CTHW=latents_of(one.key)), seed=1, seconds=0.1)

    def decode(self, latents: VideoLatents) -> Video:
        self.decoded.append(latents.key)
        assert np.array_equal(latents.latents_CTHW, latents_of(latents.key))
        return Video(key=latents.key, frames_THWC=frames_of(latents.key), fps=FPS)


@dataclass
class Watching(StandIn):
    """Tells whether the first video's record is there when the second begins, and after a step of it."""

    run: RunDir = field(kw_only=True)
    written: list[bool] = field(default_factory=list)

    def make(self, starts: Iterable[tuple[FirstFrame, Any]], progress: Any) -> Iterator[Made[VideoLatents]]:
        for made in super().make(starts, progress):
            if len(self.animated) == 2:
                record = self.run.part_path("video", self.animated[0])
                time.sleep(0.2)
                self.written.append(record.exists())
                progress(position_after(1, 2))
                wait_for(record.exists)
                self.written.append(record.exists())
            yield made


@dataclass
class Ending(StandIn):
    """Raises as the second video begins."""

    error: BaseException = field(kw_only=True)

    def make(self, starts: Iterable[tuple[FirstFrame, Any]], progress: Any) -> Iterator[Made[VideoLatents]]:
        for made in super().make(starts, progress):
            if len(self.animated) == 2:
                raise self.error
            yield made


def latents_of(key: str) -> NDArray[np.float32]:
    return np.full((16, 1, 2, 2), sum(key.encode()), dtype=np.float32)


def frames_of(key: str) -> NDArray[np.uint8]:
    return noise_frames(5, 64, 64, seed=int.from_bytes(key.encode()))


@dataclass
class Inline:
    """An encoder that writes at once; a full disk on one of the ranks, if `full`."""

    full: bool = False
    drained: bool = False

    def hand_over(self, video: Video, path: Path) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, f"{path}: disk full")
        assert not path.exists(), "written twice"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, video.frames_THWC, fps=video.fps)

    def drain(self) -> None:
        self.drained = True


@dataclass
class Slow(Inline):
    """An encoder that takes its time; notes how many videos of its rank are decoded and not yet written."""

    stage: StandIn = field(default_factory=StandIn)
    waiting: list[int] = field(default_factory=list)

    def hand_over(self, video: Video, path: Path) -> None:
        time.sleep(0.05)
        self.waiting.append(len(self.stage.decoded) - len(self.waiting))
        super().hand_over(video, path)


@dataclass
class Thread:
    """A rank that is a thread: as parallel.Group, with a barrier for the collectives."""

    rank: int
    world_size: int
    barrier: threading.Barrier
    box: list[Any]
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        self.box[self.rank] = value
        self.barrier.wait()
        values = list(self.box)
        self.barrier.wait()
        return values

    agree = Group.agree

    def anywhere(self, here: bool) -> bool:
        return any(self.gather(here))

    def from_first(self, value: Any) -> Any:
        return self.gather(value)[0]

    def meet(self) -> None:
        self.barrier.wait()


def shard_of(tmp_path: Path, num_items: int) -> RunDir:
    """A run of one shard whose first frames are made."""
    write_tree(tmp_path / "testset", tuple(f"id{number:03d}" for number in range(num_items)), num_prompts=1)
    run = frozen_run(tmp_path, num_shards=1)
    digest = run.environment().run_digest
    for key in run.shard_keys(0):
        hdf5.save_first_frame(run.part_path("first_frame", key), first_frame(key), provenance(digest))
    return run


def deliver(
    run: RunDir, encoders: list[Any], stages: list[StandIn] | None = None
) -> tuple[list[StandIn], list[BaseException | None]]:
    """Make what is missing on one thread for each encoder; what each has done, and what it raised."""
    num_ranks = len(encoders)
    barrier, box, work = threading.Barrier(num_ranks, timeout=30), [None] * num_ranks, open_work(run, "video", 0)
    stages, raised = stages or [StandIn() for _ in encoders], [None] * num_ranks

    def live(rank: int) -> None:
        group = Thread(rank, num_ranks, barrier, box)
        claims = Claims(work=work, leases=Leases(folder=run.leases_path, owner="test")) if rank == 0 else None
        try:
            with ThreadPoolExecutor(1) as files:
                undecoded = group.from_first(() if claims is None else claims.undecoded())
                claimed = agreed(None if claims is None else claims.videos(), group)
                delivery = Delivery(
                    work=work,
                    group=group,
                    stage=stages[rank],
                    encoder=encoders[rank],
                    files=files,
                    first_frames=FirstFrames(work=work),
                )
                video_shard.deliver(delivery, undecoded, claimed, claims)
        except BaseException as error:
            raised[rank] = error
            if not isinstance(error, OSError):
                barrier.abort()

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stages, raised


SIZES = [(1, 1), (1, 3), (2, 1), (2, 5), (3, 3), (4, 2), (4, 10)]


@pytest.mark.parametrize(("num_ranks", "num_items"), SIZES)
def test_each_video_is_decoded_by_one_rank_and_all_ranks_take_turns(tmp_path: Path, num_ranks: int, num_items: int) -> None:
    run = shard_of(tmp_path, num_items)
    encoders = [Inline() for _ in range(num_ranks)]
    stages, raised = deliver(run, encoders)
    keys = run.shard_keys(0)
    assert raised == [None] * num_ranks
    assert all(stage.animated == list(keys) for stage in stages)
    assert sorted(key for stage in stages for key in stage.decoded) == sorted(keys)
    assert max(len(stage.decoded) for stage in stages) - min(len(stage.decoded) for stage in stages) <= 1
    assert all(encoder.drained for encoder in encoders)
    assert run.done("video", 0, keys) == set(keys)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_lost_mp4s_are_shared_among_the_ranks_and_not_denoised_again(tmp_path: Path, num_ranks: int) -> None:
    run = shard_of(tmp_path, 6)
    deliver(run, [Inline()])
    lost = run.shard_keys(0)[1:]
    for key in lost:
        run.mp4_path(key).unlink()
    stages, raised = deliver(run, [Inline() for _ in range(num_ranks)])
    assert raised == [None] * num_ranks
    assert [stage.animated for stage in stages] == [[]] * num_ranks
    assert [stage.decoded for stage in stages] == [list(lost[rank::num_ranks]) for rank in range(num_ranks)]


def test_an_mp4_that_is_made_anew_has_not_failed_to_be_measured(tmp_path: Path) -> None:
    run = shard_of(tmp_path, 2)
    keys = run.shard_keys(0)
    for key in keys:
        run.save_failure(Failure(key=key, stage="score", reason="does not decode"))
    deliver(run, [Inline()])
    assert run.failures() == []


def test_lost_mp4s_are_not_decoded_faster_than_they_are_written(tmp_path: Path) -> None:
    """All frames of each that waits are in memory."""
    run, slow, stage = shard_of(tmp_path, 6), Slow(), StandIn()
    deliver(run, [Inline()])
    for key in run.shard_keys(0):
        run.mp4_path(key).unlink()
    slow.stage = stage
    deliver(run, [slow], [stage])
    assert slow.waiting == [1] * 6


def test_no_record_is_written_between_two_videos(tmp_path: Path) -> None:
    """All ranks wait there: it is begun when the next video is under way."""
    run = shard_of(tmp_path, 2)
    stage = Watching(run=run)
    _, raised = deliver(run, [Inline(), Inline()], [stage, StandIn()])
    assert raised == [None, None]
    assert stage.written == [False, True]


@pytest.mark.parametrize("error", [RuntimeError("a bad item"), SystemExit(1)])
def test_a_finished_video_outlives_the_end_of_the_next_before_its_first_step(tmp_path: Path, error: BaseException) -> None:
    run = shard_of(tmp_path, 2)
    _, raised = deliver(run, [Inline(), Inline()], [Ending(error=error), StandIn()])
    assert raised[0] is error  # rank 1 waits for it in vain
    assert run.recorded("video", 0, run.shard_keys(0)) == {run.shard_keys(0)[0]}


def test_a_full_disk_on_one_rank_ends_all_of_them_with_its_reason(tmp_path: Path) -> None:
    run = shard_of(tmp_path, 7)
    _, raised = deliver(run, [Inline(), Inline(), Inline(full=True)])
    expected = str(OSError(errno.ENOSPC, f"{run.mp4_path(run.shard_keys(0)[2])}: disk full"))
    assert [str(error) for error in raised] == [expected] * 3


def test_the_same_mp4s_come_from_any_number_of_ranks(tmp_path: Path) -> None:
    made = []
    for num_ranks in (1, 3):
        run = shard_of(tmp_path / str(num_ranks), 5)
        with background_encoders(num_ranks) as encoders:
            _, raised = deliver(run, encoders)
        assert raised == [None] * num_ranks
        made.append({key: run.mp4_path(key).read_bytes() for key in run.shard_keys(0)})
    assert made[0] == made[1]
    assert len(set(made[0].values())) == 5


class background_encoders:
    """One for each rank."""

    def __init__(self, num_ranks: int) -> None:
        self.contexts = [background_encoder(write_mp4, crf=18) for _ in range(num_ranks)]

    def __enter__(self) -> list[Encoder]:
        return [context.__enter__() for context in self.contexts]

    def __exit__(self, *error: object) -> None:
        for context in self.contexts:
            context.__exit__(None, None, None)


RUN_A_SHARD = """
import sys; sys.path.insert(0, "tests")
from test_delivery import run_video_shard
sys.exit(run_video_shard(sys.argv[1]))
"""


def run_video_shard(root: str) -> int:
    """`python -m ipt2v RUN video 0` with the stand-in for the model; its exit code."""
    from ipt2v import stages
    from ipt2v.__main__ import main

    standing_in: Any = ModuleType("ipt2v.stages.video")
    standing_in.load = lambda *_: StandIn()
    sys.modules["ipt2v.stages.video"] = stages.video = standing_in
    return main([root, "video", "0"])


def call_video_shard(run: RunDir) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN_A_SHARD, str(run.root)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_a_shard_is_sealed_when_its_mp4s_are_there_with_one_line_a_video(tmp_path: Path) -> None:
    run = shard_of(tmp_path, 3)
    done = call_video_shard(run)
    assert done.returncode == 0, done.stderr
    keys = run.shard_keys(0)
    assert run.done("video", 0, keys) == set(keys)
    assert hdf5.sealed_keys(run.sealed_path("video", 0)) == keys
    lines = [line.split(" ", 2)[2] for line in done.stdout.splitlines() if " video " in line]
    assert lines == [*(f"video {key} 0.1 s" for key in keys), "video shard 0: 3 done, 0 failed"]
    assert list(run.root.rglob("*.tmp")) == []


@pytest.mark.slow
def test_a_full_disk_under_the_mp4s_ends_the_run_with_one_line_and_keeps_the_latents(tmp_path: Path) -> None:
    run = shard_of(tmp_path, 3)
    key = run.shard_keys(0)[1]
    folder = run.mp4_path(key).parent
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a tmpfs here: needs root")
    try:
        done = call_video_shard(run)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    text = f"{run.mp4_path(key)}: disk full; free space and submit again, finished items are kept"
    assert (done.returncode, done.stderr) == (1, f"error: [Errno {errno.ENOSPC}] {key}: {text}\n")
    assert key in run.recorded("video", 0, [key])
    assert not run.sealed_path("video", 0).exists()
    again = call_video_shard(run)
    assert again.returncode == 0, again.stderr
    assert run.done("video", 0, run.shard_keys(0)) == set(run.shard_keys(0))
