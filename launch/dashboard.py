"""`status --watch`: how a run stands, again and again, on a terminal or as lines of a log. Writes nothing but to the screen."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ipt2v.run_dir import RunDir, StageCount
from launch.fault_text import printable
from launch.progress import summary
from launch.status import (
    RUNNING,
    Look,
    Memory,
    Queue,
    look_at,
    look_at_queue,
    note_lines,
    queue_lines,
    rate_rows,
    reason_lines,
    status_lines,
)

QUEUE_SECONDS = 15.0  # before squeue is asked again: all users of a cluster share one controller
SILENCE_SECONDS = 60.0  # the same, where it has not answered: the view stands still meanwhile
LOOKING_SHARE = 0.25  # of the time at most is spent on reading the run folder, however large it is
MAX_TRIES = 3  # of a look into a folder that others change
MAX_BAR_LINES = 3  # of one stage
HEIGHTS = "▁▂▃▄▅▆▇█"
ASCII_HEIGHTS = "12345678"  # for terminals without Unicode


class Watcher:
    """Looks at one run again and again; keeps what need not be read twice."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.memory = run, Memory()
        self.queue: Queue | None = None
        self.asked = 0.0

    def look(self) -> Look:
        pause = SILENCE_SECONDS if self.queue is not None and self.queue.lost else QUEUE_SECONDS
        if self.queue is None or time.monotonic() - self.asked >= pause or self.queue.has_driver:
            self.queue = look_at_queue(self.run)
            self.asked = time.monotonic()
        for _ in range(MAX_TRIES - 1):
            with contextlib.suppress(FileNotFoundError):  # a job has just sealed a shard, or somebody retries a failure
                return look_at(self.run, self.queue, self.memory)
        return look_at(self.run, self.queue, self.memory)


def watch(run: RunDir, every_seconds: float) -> None:
    """Show the run until Ctrl-C, which is raised: a live view on a terminal, else the lines of `status` once per interval."""
    run.environment()  # a mistyped folder is no run, however long one looks at it
    console = Console(markup=False, highlight=False, emoji=False)
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            _watch_live(Watcher(run), console, every_seconds)
        else:
            _watch_plain(Watcher(run), every_seconds)
    except BrokenPipeError:  # `| head` has seen enough; Python would complain of the same when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _watch_live(watcher: Watcher, console: Console, every_seconds: float) -> None:
    look = None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                start = time.monotonic()
                look = watcher.look()
                live.update(view(look, console.width, ascii_only=not console.encoding.startswith("utf")), refresh=True)
                _sleep(every_seconds, time.monotonic() - start)
    finally:
        if look is not None:  # the other screen, with all that was shown, is gone
            print("\n".join(status_lines(look)))


def _watch_plain(watcher: Watcher, every_seconds: float) -> None:
    while True:
        start = time.monotonic()
        look = watcher.look()
        print("\n".join([_clock(look), *status_lines(look), ""]), flush=True)
        _sleep(every_seconds, time.monotonic() - start)


def _sleep(every_seconds: float, took_seconds: float) -> None:
    time.sleep(max(every_seconds - took_seconds, took_seconds * (1 / LOOKING_SHARE - 1)))


def view(look: Look, width: int, *, ascii_only: bool = False) -> Group:
    """The run for a screen of so many columns. Everything is plain text to rich: names and reasons are somebody else's."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    head, *rows = rate_rows(look)
    for index, name in enumerate(head):
        table.add_column(Text(name), justify="left" if index in (0, len(head) - 1) else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    parts = [Text(f"{printable(str(look.run.root))}  {_clock(look)}", "bold"), Text(summary(list(look.counts))), Text()]
    for stage in dict.fromkeys(count.stage for count in look.counts):
        parts.append(bar(stage, [count for count in look.counts if count.stage == stage], look.queue, width, ascii_only))
    parts.append(_legend(ascii_only))
    notes = [Text(line, "dim") for line in note_lines(look)]
    reasons = [Text(line, "red") for line in reason_lines(look)]
    queue = [Text(line, "yellow" if line == look.queue.lost else "") for line in queue_lines(look)]
    return Group(*parts, Text(), table, *notes, Text(), *reasons, *queue, Text("Ctrl-C ends this view, not the run", "dim"))


def bar(stage: str, counts: Sequence[StageCount], queue: Queue, width: int, ascii_only: bool) -> Text:
    """A character for each shard, or for several where there are more than the lines hold: its height is what is done."""
    columns = max(8, width - 14)
    group = max(1, -(-len(counts) // (columns * MAX_BAR_LINES)))
    text = Text(f"{stage:<12}  ")
    for number, start in enumerate(range(0, len(counts), group)):
        if number and number % columns == 0:
            text.append("\n" + " " * 14)
        mine = counts[start : start + group]
        text.append(_height(mine, ascii_only), _colour(mine, queue))
    if group > 1:
        text.append(f"\n{'':<14}({group} shards each)", "dim")
    return text


def _height(counts: Sequence[StageCount], ascii_only: bool) -> str:
    """Full if all that can be made is made."""
    heights = ASCII_HEIGHTS if ascii_only else HEIGHTS
    done, missing = sum(count.done for count in counts), sum(count.missing for count in counts)
    if not done and missing:
        return "." if ascii_only else "·"
    return heights[-1] if not missing else heights[min(len(heights) - 2, done * len(heights) // (done + missing))]


def _colour(counts: Sequence[StageCount], queue: Queue) -> str:
    states = {queue.live.get((count.stage, count.shard), "") for count in counts}
    if any(count.failed for count in counts):
        return "red"
    if not any(count.missing for count in counts):
        return "green"
    if states & RUNNING:
        return "cyan"
    return "yellow" if states - {""} else ""


def _legend(ascii_only: bool) -> Text:
    text = Text(" " * 14)
    full = (ASCII_HEIGHTS if ascii_only else HEIGHTS)[-1]
    for word, colour in (
        ("done", "green"),
        ("runs", "cyan"),
        ("waits", "yellow"),
        ("has failures", "red"),
        ("in no queue", ""),
    ):
        text.append(f"{full} {word}  ", colour)
    return text


def _clock(look: Look) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(look.at))
