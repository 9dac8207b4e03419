"""Give items another chance that count as failed: their failure records and crash notes are put aside, never deleted."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ipt2v.run_dir import STAGES, RunDir
from launch.evidence import find_shard
from launch.fault_text import printable
from launch.freeze import run_name
from launch.progress import ranges
from launch.queue import live_elements, submissions


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried:
    """An item that the next submission makes again."""

    key: str
    stages: tuple[str, ...]  # in which it had failed
    num_crashes: int  # that were held against it


def retry(run: RunDir, keys: Iterable[str], stages: tuple[str, ...] = STAGES) -> list[Retried]:
    """Put aside what keeps the items from being made; those that nothing kept are left out. Without keys, all that have failed.

    Raises ValueError for an item that the run does not have, or settings that were changed, before anything is moved.
    """
    run.config()
    chosen = list(dict.fromkeys(keys))
    for key in chosen:
        find_shard(run, key)
    failed = dict.fromkeys(failure.key for failure in run.failures() if failure.stage in stages)
    retried = []
    for key in chosen or failed:
        had_failed = tuple(stage for stage in stages if run.failed(stage, [key]))
        for stage in had_failed:
            _put_aside(run, run.failure_path(stage, key), f"{stage}/{key}.json")
        notes = run.crash_paths(key) if "video" in stages else []
        for note in notes:
            _put_aside(run, note, f"crashes/{key}/{note.name}")
        if had_failed or notes:
            retried.append(Retried(key=key, stages=had_failed, num_crashes=len(notes)))
    return retried


def _put_aside(run: RunDir, path: Path, name: str) -> None:
    """Move a file below failure/retried, beside what an earlier retry has put there."""
    folder, number = run.root / "failure" / "retried", 0
    target = folder / name
    while target.exists():
        number += 1
        target = (folder / name).with_suffix(f".{number}{path.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)


def retry_lines(run: RunDir, retried: list[Retried]) -> list[str]:
    """What was put aside, and the command that makes the items again."""
    if not retried:
        return ["nothing to retry: none of these items has a failure record or a crash note"]
    lines = []
    for one in retried:
        crashes = f"{one.num_crashes} crash notes" if one.num_crashes else ""
        said = ", ".join(filter(None, (*(f"failed in {stage}" for stage in one.stages), crashes)))
        lines.append(f"{printable(one.key)}: {said}; put aside")
    lines += rename_lines(run)
    return [*lines, f"{len(retried)} items are made again by: {submit_command(run)}", *_busy_lines(run, retried)]


def submitted_root(run: RunDir) -> Path:
    """The folder that a submission of the frozen settings goes on with: this one, unless it has been renamed."""
    root, name = run.root.absolute(), run_name(run.config(), run.environment().run_digest)
    if root.resolve().name == name:  # the other may be a link, or end in ".."
        return root if root.name == name else root.resolve()
    return root.with_name(name)


def rename_lines(run: RunDir) -> list[str]:
    """What comes before submit_command if the folder has been renamed; without it, a new run would be made from nothing."""
    root, target = run.root.absolute(), submitted_root(run)
    if root.resolve() == target.resolve():
        return []
    why = f"{root} has been renamed, but submit finds a run by the name of its folder"
    if target.exists():
        return [f"{why}: {target} is what it would go on with; move that away, then rename this one back to {target.name}"]
    return [f"{why}: first rename it back, by: {shlex.join(['mv', str(root), str(target)])}"]


def submit_command(run: RunDir) -> str:
    """The command that goes on with a run: the frozen settings are the same run wherever they are read from.

    Of a renamed run it is right after what rename_lines says.
    """
    known, root = submissions(run), submitted_root(run)
    weights, place = run.environment().weights_dir, known[-1].place if known else "slurm"
    words = [
        "ipt2v",
        "submit",
        str(RunDir(root).config_path),
        "--weights",
        weights,
        "--runs",
        str(root.parent),
        "--on",
        place,
    ]
    return f"{shlex.join(words)} --cluster FILE"


def _busy_lines(run: RunDir, retried: list[Retried]) -> list[str]:
    """An element reads what there is to make when it starts."""
    live = {shard for _, shard in live_elements(run)}
    busy = sorted(live & {find_shard(run, one.key) for one in retried})
    return [f"shards {ranges(busy)} are in the queue: submit when they are over, too"] if busy else []
