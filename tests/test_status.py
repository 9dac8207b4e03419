"""Claims about `ipt2v status` on planted runs: what it says of speed, price and end, what it cannot know, and --watch."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from helpers import first_frame, frozen_run, provenance, video_latents, write_tree

from ipt2v import hdf5
from ipt2v.records import Failure
from ipt2v.run_dir import RunDir, seal_shard
from launch.dashboard import view
from launch.measure import MAX_RECORDS
from launch.queue import Submitted, remember
from launch.status import (
    Look,
    Memory,
    Queue,
    StageLook,
    look_at,
    look_at_queue,
    rate_lines,
    ready_in,
    reason_lines,
    status_lines,
)

IPT2V = Path(sys.executable).parent / "ipt2v"
HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]no[/] face [/nothing]\r\nfirst_frame 9/9\u202e :smile: [link=http://x]x"
NOBODY = Queue(live={}, starts={}, at_once={}, has_driver=False, lost="")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two shards of one person and five prompts each, nothing made."""
    write_tree(tmp_path / "testset", num_prompts=5)
    return frozen_run(tmp_path, num_shards=2)


def plant(run: RunDir, stage: str, key: str, at: float, *, device: str = "cuda:0", seconds: float = 720.0) -> None:
    """A record that was finished then, on eight ranks; of a video the MP4 too."""
    created = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    made = replace(provenance(run.environment().run_digest), created=created, seconds=seconds, device=device, num_ranks=8)
    if stage == "first_frame":
        hdf5.save_first_frame(run.part_path(stage, key), first_frame(key), made)
        return
    hdf5.save_video_latents(run.part_path(stage, key), video_latents(key), made)
    run.mp4_path(key).parent.mkdir(parents=True, exist_ok=True)
    run.mp4_path(key).write_bytes(b"not opened")


def plant_all(run: RunDir, stage: str, *, num_items: int = 10, ago: float = 60.0, device: str = "cuda:0") -> None:
    """The first items of the run, one each 720 s, the last so long ago."""
    keys = [key for shard in (0, 1) for key in run.shard_keys(shard)][:num_items]
    for number, key in enumerate(reversed(keys)):
        plant(run, stage, key, time.time() - ago - 720 * number, device=device)


def look(run: RunDir, queue: Queue = NOBODY) -> Look:
    return look_at(run, queue, Memory())


def video(run: RunDir, queue: Queue = NOBODY) -> StageLook:
    return look(run, queue).stages[1]


def in_queue(**states: str) -> Queue:
    """video_0="RUNNING", ..."""
    live = {(name.rpartition("_")[0], int(name.rpartition("_")[2])): state for name, state in states.items()}
    return replace(NOBODY, live=live, at_once={"first_frame": 2, "video": 2})


# --- what it says -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
def test_ten_videos_of_twelve_minutes_on_eight_gpus_are_sixteen_gpu_hours(run: RunDir, sealed: bool) -> None:
    for stage in ("first_frame", "video"):
        plant_all(run, stage)
        if sealed:
            for shard in (0, 1):
                seal_shard(run, stage, shard, run.shard_keys(shard))
    first, second = look(run).stages
    for one in (first, second):
        assert one.rates is not None
        assert (one.rates.last_hour, one.rates.overall) == pytest.approx((5, 5), rel=1e-3)
        assert (one.seconds_per_item, one.done, one.num_sampled) == (720, 10, 10)
    assert second.used.gpu_hours == pytest.approx(16)
    assert first.used.gpu_hours == pytest.approx(2)  # its ranks make an item each
    lines = rate_lines(look(run))
    assert lines[2].split()[:8] == ["video", "5.00", "5.00", "720", "16.0", "GPU-h", "1.60", "GPU-h"]


def test_hours_on_a_cpu_are_not_called_gpu_hours(run: RunDir) -> None:
    plant_all(run, "video", device="cpu")
    lines = rate_lines(look(run))
    assert "16.0 rank-h" in lines[2] and "GPU-h" not in "".join(lines)


def test_a_run_resumed_after_a_day_is_as_fast_as_before(run: RunDir) -> None:
    plant_all(run, "video", num_items=5, ago=86400)
    rest = run.shard_keys(1)
    for number, key in enumerate(rest):
        plant(run, "video", key, time.time() - 60 - 720 * number)
    speed = video(run).rates
    assert speed is not None
    assert (speed.last_hour, speed.overall) == pytest.approx((5, 5), rel=1e-3)


def test_a_damaged_record_costs_its_own_numbers_only(run: RunDir) -> None:
    plant_all(run, "video")
    run.part_path("video", run.shard_keys(0)[1]).write_bytes(b"cut short")
    assert video(run).num_sampled == 9
    assert "~ is about: from 9 of 10 video records" in "\n".join(rate_lines(look(run)))


@pytest.mark.slow
def test_of_many_videos_the_files_times_count_unless_they_were_copied(tmp_path: Path) -> None:
    write_tree(tmp_path / "testset", num_prompts=MAX_RECORDS // 2 + 10)
    run, now = frozen_run(tmp_path, num_shards=2), time.time()
    keys = [key for shard in (0, 1) for key in run.shard_keys(shard)]
    for number, key in enumerate(keys):
        plant(run, "video", key, now - 60.0 * number, seconds=60)
    speed = video(run).rates
    assert speed is not None and speed.overall == pytest.approx(60, rel=0.05)  # all MP4s are of this second
    for number, key in enumerate(keys):
        os.utime(run.mp4_path(key), (now - 60 * number, now - 120 * number))
    speed = video(run).rates
    assert speed is not None and speed.overall == pytest.approx(30, rel=0.05)


# --- until when ---------------------------------------------------------------------------------------------------------


def test_nothing_finished_is_no_estimate(run: RunDir) -> None:
    assert [ready_in(one) for one in look(run, in_queue(first_frame_0="RUNNING")).stages] == [
        "no estimate yet: nothing finished",
        "no estimate yet: nothing finished",
    ]


def test_more_elements_that_run_make_it_sooner(run: RunDir) -> None:
    plant_all(run, "first_frame")
    plant_all(run, "video", num_items=2)
    one, two = (
        video(run, queue).estimate for queue in (in_queue(video_1="RUNNING"), in_queue(video_0="RUNNING", video_1="RUNNING"))
    )
    assert one is not None and two is not None
    assert (one.low_seconds, one.high_seconds) == (7 * 720, 8 * 720)
    assert (two.low_seconds, two.high_seconds) == (3 * 720, 4.5 * 720)
    assert ready_in(video(run, in_queue(video_1="RUNNING"))) == "84.0 to 96.0 min (1 run, 0 wait)"


def test_an_element_that_has_made_its_own_shard_still_counts(run: RunDir) -> None:
    plant_all(run, "first_frame")
    plant_all(run, "video", num_items=5)
    assert ready_in(video(run, in_queue(video_0="RUNNING"))) == "48.0 to 60.0 min (1 run, 0 wait)"


def test_videos_wait_for_first_frames(run: RunDir) -> None:
    plant_all(run, "first_frame", num_items=8, ago=86400)
    plant_all(run, "video", num_items=1)
    first, second = look(run, in_queue(first_frame_1="RUNNING", video_0="PENDING", video_1="PENDING")).stages
    assert first.estimate is not None and second.estimate is not None
    assert second.estimate.high_seconds > first.estimate.high_seconds
    assert ready_in(video(run, in_queue(video_1="PENDING"))) == "no estimate: there is none for first_frame"


def test_what_waits_without_an_expected_start_is_no_estimate(run: RunDir) -> None:
    plant_all(run, "first_frame")
    plant_all(run, "video", num_items=2)
    queue = in_queue(video_0="PENDING")
    assert ready_in(video(run, queue)) == "no estimate: 1 wait, none runs, SLURM does not say when one will"
    expected = replace(queue, starts={("video", 0): time.time() + 3600})
    estimate = video(run, expected).estimate
    assert estimate is not None and estimate.high_seconds == pytest.approx(3600 + 8 * 720, abs=10)


def test_without_a_queue_the_rate_tells_as_long_as_something_happens(run: RunDir) -> None:
    plant_all(run, "first_frame")
    plant_all(run, "video", num_items=5)
    assert ready_in(video(run)) == "about 60.0 min (if it goes on as before; not by the queue)"
    run_of_yesterday = replace(NOBODY, lost="squeue does not answer")
    for number, key in enumerate(run.shard_keys(0)):
        plant(run, "video", key, time.time() - 86400 - number)
    assert ready_in(video(run)) == "no estimate: nothing of it is in the queue; submit again"
    assert ready_in(video(run, run_of_yesterday)) == "no estimate: the queue is not known, nothing was finished for 24 h"


# --- failures -----------------------------------------------------------------------------------------------------------


def test_failures_are_grouped_and_the_most_frequent_come_first(run: RunDir) -> None:
    first, second, third, *rest = (key for shard in (0, 1) for key in run.shard_keys(shard))
    run.save_failure(Failure(key=first, stage="first_frame", reason=f"{first}: not a picture"))
    run.save_failure(Failure(key=second, stage="first_frame", reason="the face has 12 px"))
    run.save_failure(Failure(key=third, stage="first_frame", reason="the face has 31 px"))
    assert reason_lines(look(run)) == [
        f"failed: 2 items (first_frame), {second} for one: the face has 12 px",
        f"failed: {first} (first_frame): {first}: not a picture",
    ]
    for number, key in enumerate(rest):
        run.save_failure(Failure(key=key, stage="first_frame", reason="bad " + "abcdefgh"[number]))
    assert len(reason_lines(look(run))) == 6
    assert reason_lines(look(run))[-1] == f"... and 4 more for 4 other reasons, below {run.root / 'failure'}"


def test_a_hostile_reason_moves_no_cursor_and_is_no_markup(run: RunDir) -> None:
    from rich.console import Console

    run.save_failure(Failure(key=run.shard_keys(0)[0], stage="first_frame", reason=HOSTILE))
    for lines in (status_lines(look(run)), [_screen(view(look(run), 100), Console)]):
        text = "\n".join(lines)
        assert "\x1b" not in text and "\u202e" not in text and "\r" not in text
        assert "first_frame 9/9\\u202e" not in text.splitlines()  # no line of its own
        assert "[link=http://x]x" in text and ":smile:" in text


def _screen(what: object, console: type) -> str:
    screen = console(width=100, force_terminal=False, record=False)
    with screen.capture() as shown:
        screen.print(what)
    return shown.get()


# --- the queue ----------------------------------------------------------------------------------------------------------


def submitted(run: RunDir, slurm: FakeSlurm) -> None:
    remember(run, Submitted(place="slurm", stage="video", job_id="1001", shards=(0, 1), after=None, name="x.video.1.0"))
    (run.jobs_path("video") / "x.video.1.0.sh").write_text("#!/bin/bash\n#SBATCH --array=0-1%1\n")
    slurm.write("queue", [{"id": "1001", "array": "0-1", "job-name": "x", "script": ""}])
    slurm.end("1001", "RUNNING", 0)


def test_states_and_limits_come_from_squeue_and_the_script(run: RunDir, slurm: FakeSlurm) -> None:
    submitted(run, slurm)
    queue = look_at_queue(run)
    assert queue.live == {("video", 0): "RUNNING", ("video", 1): "PENDING"}
    assert (queue.at_once, queue.lost, queue.starts) == ({"video": 1}, "", {})
    assert "queue: 1 video pending, 1 video running" in status_lines(look(run, queue))


def test_what_squeue_expects_is_read(run: RunDir, slurm: FakeSlurm, tmp_path: Path) -> None:
    submitted(run, slurm)
    squeue = tmp_path / "slurm" / "bin" / "squeue"
    start = datetime.fromtimestamp(time.time() + 9000).isoformat(timespec="seconds")
    text = f"1001_0|{start}\n1001_1|{start}\n1001_7|N/A"
    rows = "1001_0|RUNNING\n1001_1|PENDING"
    squeue.write_text(f'#!/bin/sh\ncase "$*" in *--start*) echo "{text}";; *) echo "{rows}";; esac\n')
    queue = look_at_queue(run)
    assert queue.starts.keys() == {("video", 1)}
    assert "queue: SLURM expects the next to start in 2.5 h" in status_lines(look(run, queue))


def test_a_silent_squeue_costs_the_queue_only_and_is_named(run: RunDir, slurm: FakeSlurm) -> None:
    submitted(run, slurm)
    slurm.squeue_answers(False)
    plant_all(run, "video", num_items=5)
    found = look(run, look_at_queue(run))
    assert found.queue.live == {}
    (line,) = [line for line in status_lines(found) if "squeue" in line]
    assert line.startswith("squeue does not answer: the queue is not known (squeue: slurm_load_jobs error")
    assert found.stages[1].rates is not None


# --- the command --------------------------------------------------------------------------------------------------------


def ipt2v(*words: object, expect: int = 0) -> str:
    done = subprocess.run([IPT2V, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_json_stays_a_list_of_shards_and_rates_are_an_object(run: RunDir) -> None:
    plant_all(run, "video")
    rows = json.loads(ipt2v("status", run.root, "--json"))
    assert rows[0] == {"stage": "first_frame", "shard": 0, "done": 0, "failed": 0, "missing": 5, "queue": ""}
    facts = json.loads(ipt2v("status", run.root, "--json", "--rates"))
    assert facts["shards"] == rows
    assert facts["stages"][1]["used"] == pytest.approx({"gpu_hours": 16, "cpu_rank_hours": 0})
    assert "exclude each other" in ipt2v("status", run.root, "--json", "--watch", expect=2)


Read = Callable[[], bytes]


@contextmanager
def watching(run: RunDir, *, terminal: bool) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`status --watch` and where to read what it writes: a terminal of 100 columns, or a pipe."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    words = [IPT2V, "status", run.root, "--watch", "--every", "0.3"]
    process = subprocess.Popen(words, stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    try:
        yield process, reader
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def read_until(reader: int, words: str, seconds: float = 40.0) -> str:
    """What is written, until these words are."""
    text, deadline = b"", time.monotonic() + seconds
    while words.encode() not in text:
        assert time.monotonic() < deadline, text.decode(errors="replace")
        if select.select([reader], [], [], 0.2)[0]:
            text += os.read(reader, 65536)
    return text.decode(errors="replace")


def rest_of(reader: int) -> str:
    text = b""
    while select.select([reader], [], [], 1.0)[0]:
        try:
            new = os.read(reader, 65536)
        except OSError:  # so a terminal says that nobody writes to it any more
            break
        if not new:
            break
        text += new
    return text.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True])
def test_watch_shows_a_new_record_and_ends_with_0_by_ctrl_c(run: RunDir, terminal: bool) -> None:
    run.save_failure(Failure(key=run.shard_keys(1)[4], stage="first_frame", reason=HOSTILE))
    with watching(run, terminal=terminal) as (process, reader):
        before = read_until(reader, "first_frame 0/10 (1 failed)")
        plant_all(run, "first_frame", num_items=3)
        after = read_until(reader, "first_frame 3/10 (1 failed)")
        process.send_signal(signal.SIGINT)
        end = rest_of(reader)
        assert process.wait(timeout=20) == 0
    shown = before + after + end
    assert "owned" not in shown and "\x1b[2J\x1b]0" not in shown
    assert "Traceback" not in shown and "Aborted" not in shown
    if terminal:
        assert "\x1b[?1049h" in before and "\x1b[?1049l" in end and "\x1b[?25h" in end  # the screen and cursor are back
        assert "first_frame 3/10 (1 failed)" in end.partition("\x1b[?1049l")[2]  # the last look stays
    else:
        assert "\x1b" not in shown


@pytest.mark.slow
def test_watch_into_a_pipe_that_is_closed_ends_quietly(run: RunDir) -> None:
    command = f"'{IPT2V}' status '{run.root}' --watch --every 0.1 | head -n 2"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_live_view_has_a_character_for_each_shard(run: RunDir) -> None:
    from rich.console import Console

    plant_all(run, "first_frame", num_items=7)
    text = _screen(view(look(run, in_queue(first_frame_1="RUNNING")), 100), Console)
    assert "first_frame   █▄" in text
    assert "video         ··" in text
    plain = _screen(view(look(run), 100, ascii_only=True), Console)
    assert plain.isascii()
