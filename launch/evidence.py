"""What is known of an element and of an item: read from records, logs, squeue and sacct, each of which may be missing."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ipt2v.leases import Leases
from ipt2v.run_dir import STAGES, VERIFY_SPLIT, RunDir
from launch import controller
from launch.controller import NoAnswer
from launch.fault_text import ago, expand_nodes, explain, newest_life, nodes_to_exclude, printable
from launch.fault_words import RUNNING_STATES, WAITING_STATES, Evidence, Fault, RankLog
from launch.faults import classify
from launch.queue import Submitted, live_elements, newest, submissions

TAIL_BYTES = 128 * 1024  # of each log; with a rank's stacks and a traceback of all libraries it is some 20 kB
MAX_LINE = 4000
MAX_FAULTS = 200  # elements whose logs are read before each submission: a second each, if all their ranks have failed
MAX_EXCLUDED = 8  # nodes
ANSWER_SECONDS = 30
_LOG_NAME = re.compile(r"(?P<element>\d+(?:_\d+)?)_(?P<rank>\d+)_log\.(?P<kind>out|err)")
# of `squeue -O`, with widths: neither names of nodes nor reasons can run into the next column
_COLUMNS = (("jobarrayid", 32), ("state", 20), ("exit_code", 12), ("restartcnt", 8), ("reason", 64), ("nodelist", 400))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a scheduler says of one life of an element."""

    state: str
    reason: str = ""
    exit_code: int = 0
    signal: int = 0
    nodes: tuple[str, ...] = ()
    num_restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """All that there is on a run's elements, but for what is in the logs and records."""

    run: RunDir
    submitted: tuple[Submitted, ...]  # oldest first
    queue: dict[str, Row] | None  # by squeue, of each element that SLURM has not forgotten; None: no answer
    lives: dict[str, tuple[Row, ...]]  # by sacct, oldest first
    local: frozenset[tuple[str, int]]  # (stage, shard) of processes of this machine that run
    logs: dict[str, dict[str, frozenset[int]]]  # stage -> element -> its ranks
    blind: bool  # neither squeue nor sacct has answered
    lost: tuple[str, ...]  # what cannot be known here, and why


def gather(run: RunDir) -> Known:
    """Ask squeue and sacct once for everything that the run has submitted. Neither has to be there."""
    known = tuple(submissions(run))
    ids = [one.job_id for one in known if one.place == "slurm"]
    queue, no_queue = _queue(ids)
    lives, no_lives = _lives(ids, run)
    has_local = any(one.place == "local" for one in known)
    local = {(one.stage, shard) for one in known if one.place == "local" for shard in one.shards}
    return Known(
        run=run,
        submitted=known,
        queue=queue,
        lives=lives or {},
        local=frozenset(local & live_elements(run).keys()) if has_local else frozenset(),
        logs={stage: _log_index(run.jobs_path(stage)) for stage in (*STAGES, VERIFY_SPLIT)},
        blind=bool(ids) and queue is None and not lives,
        lost=tuple(filter(None, (no_queue, no_lives))),
    )


def collect(known: Known, stage: str, shard: int, submitted: Submitted | None = None) -> Evidence:
    """What is known of the newest element that has a shard; or of an earlier one's end, whatever has been made since."""
    run, chosen = known.run, submitted or newest(known.submitted, stage, shard)
    finished = submitted is None and _is_finished(run, stage, shard)
    if chosen is None:
        return Evidence(stage=stage, shard=shard, submitted=False, finished=finished)
    element = chosen.element(chosen.shards.index(shard))
    row, lives = (known.queue or {}).get(element), known.lives.get(element, ())
    logs, starts = ((), 0) if finished else _read_logs(known, stage, element)
    last = lives[-1] if lives else Row(state="")
    if known.queue is not None and row is None and last.state in RUNNING_STATES | WAITING_STATES:
        last = replace(last, state="")  # what squeue does not have does not run: sacct has not yet heard of it
    best = row or last
    state = best.state if row else ""
    if chosen.place == "local":
        state = "RUNNING" if (stage, shard) in known.local else ""
    return Evidence(
        stage=stage,
        shard=shard,
        finished=finished,
        waits=chosen.after is not None,
        blind=known.blind and chosen.place == "slurm",
        state=state,
        accounted=last.state,
        reason=best.reason,
        exit_code=best.exit_code,
        signal=best.signal,
        nodes=best.nodes or last.nodes,
        num_restarts=max(best.num_restarts, len(lives) - 1, starts - 1, 0),
        logs=_with_nodes(logs, best.nodes),
    )


def all_faults(known: Known) -> Iterator[Fault]:
    """How every element of every submission has ended, newest first, earlier lives of requeued ones included."""
    for submitted in reversed(known.submitted):
        for index, shard in enumerate(submitted.shards):
            for life in known.lives.get(submitted.element(index), ())[:-1]:
                yield classify(Evidence(stage=submitted.stage, shard=shard, state=life.state, nodes=life.nodes))
            yield classify(collect(known, submitted.stage, shard, submitted))


def bad_nodes(run: RunDir) -> tuple[str, ...]:
    """Nodes that the next submission should not be given, from how its newest MAX_FAULTS elements have ended.

    None where so many are named that the site, not its nodes, is to blame: then every node would be left out.
    """
    nodes = nodes_to_exclude(islice(all_faults(gather(run)), MAX_FAULTS))
    return nodes if len(nodes) <= MAX_EXCLUDED else ()


def find_shard(run: RunDir, key: str) -> int:
    """The shard of an item. Raises ValueError, naming near ones, if the run has no such item."""
    known: list[str] = []
    for shard in range(run.environment().num_shards):
        keys = run.shard_keys(shard)
        if key in keys:
            return shard
        known += keys
    near = get_close_matches(key, known, n=3) or known[:3]
    raise ValueError(f"{printable(key)}: no item of {run.root}; near: {', '.join(map(printable, near))}")


def next_stage(run: RunDir, key: str, shard: int) -> str | None:
    """The stage that an item waits for; None if it is delivered, or has failed."""
    for stage in run.stages():
        if run.failed(stage, [key]):
            return None
        if not run.done(stage, shard, [key]):
            return stage
    return None


def why_lines(run: RunDir, what: tuple[str, ...]) -> list[str]:
    """What has become of an item (its key) or of an element (stage, shard), and what to do.

    Raises ValueError if `what` is neither, or names nothing of the run.
    """
    run.environment()
    lines: list[str] = []
    match what:
        case (key,):
            shard = find_shard(run, key)
            stage, lines = next_stage(run, key, shard), item_lines(run, key, shard)
            if stage is None:
                return [*lines, *_item_advice(run, key)]
            lines.append("")
        case (stage, number) if stage in (*STAGES, VERIFY_SPLIT) and number.isdigit():
            shard = int(number)
            run.shard(shard)
        case _:
            raise ValueError(
                f"why: found {' '.join(what)!r}, expected an item (id001/prompt1), or a stage and a shard: video 3"
            )
    known = gather(run)
    about, *rest = explain(classify(collect(known, stage, shard)), run.root)
    return [*lines, f"{about}{_counts(run, stage, shard)}", *rest, *(f"  not known: {line}" for line in known.lost)]


def _counts(run: RunDir, stage: str, shard: int) -> str:
    if stage == VERIFY_SPLIT:
        return ""
    count = run.count(stage, shard, run.shard_keys(shard))
    return f"  ({count.done} made, {count.failed} failed, {count.missing} missing)"


def _item_advice(run: RunDir, key: str) -> list[str]:
    from ipt2v.verify import photo_advice  # here alone, as it loads what reads videos

    again = f"  to do: `ipt2v retry {run.root} {shlex.quote(key)}`, then submit,"
    if run.failed("first_frame", [key]):
        return [f"{again} tries it again;", f"  {photo_advice(run)}"]
    return [f"{again} makes it again"] if any(run.failed(stage, [key]) for stage in STAGES) else []


def item_lines(run: RunDir, key: str, shard: int) -> list[str]:
    """How far an item is, as lines for a terminal."""
    lines = [f"{printable(key)}  (shard {shard})"]
    for stage in run.stages():
        lines.append(f"  {stage:<12} {_stage_line(run, stage, shard, key)}")
        if run.failed(stage, [key]):
            return lines
    crashes = run.crashes(key)
    lines += [f"  {'':<12} crashed ({number} of {len(crashes)}): {printable(text)}" for number, text in enumerate(crashes, 1)]
    if not run.done("video", shard, [key]):
        lines += [f"  {'':<12} {line}" for line in (*_position_line(run, key), *_lease_line(run, key))]
    return lines


def _stage_line(run: RunDir, stage: str, shard: int, key: str) -> str:
    if run.failed(stage, [key]):
        try:
            reason = json.loads(run.failure_path(stage, key).read_text(encoding="utf-8"))["reason"]
        except (OSError, ValueError, KeyError) as error:
            reason = f"(its record cannot be read: {error})"
        return f"failed: {printable(str(reason))}"
    if run.done(stage, shard, [key]):
        path = run.mp4_path(key) if stage == "video" else run.made_path(stage, shard, key)
        return f"made: {printable(str(path.relative_to(run.root)))}"
    if key in run.recorded(stage, shard, [key]):
        return "denoised, its MP4 is not written yet"
    return "not made yet"


def _position_line(run: RunDir, key: str) -> list[str]:
    """Read here and not by ipt2v.position_file, which needs torch: it writes its facts as JSON beside the tensors."""
    path = run.position_path(key)
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})["facts"])
        return [f"saved: goes on after step {int(facts['num_done'])} of {int(facts['num_steps'])}"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return ["saved: its file cannot be read, it starts again at step 0"]


def _lease_line(run: RunDir, key: str) -> list[str]:
    leases = Leases(folder=run.leases_path, owner="")  # nobody's: only looked at
    path = leases.path(key)
    try:
        owner, age = path.read_text(encoding="utf-8", errors="replace"), max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return []
    alive = "" if age < leases.seconds else "; that is too long: the next to come takes it"
    return [f"at work on it: {printable(owner)}, last sign of life {ago(age)} ago{alive}"]


def tail(path: Path, num_bytes: int = TAIL_BYTES) -> list[str]:
    """The last lines of a file that others write to; [] if it is not there."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            text = file.read(num_bytes).decode("utf-8", errors="replace")
    except OSError:
        return []
    lines = [line[:MAX_LINE] for line in text.split("\n")]
    return [line for line in (lines[1:] if size > num_bytes else lines) if line.strip()]


def _is_finished(run: RunDir, stage: str, shard: int) -> bool:
    if stage == VERIFY_SPLIT:
        return run.split_check_path(shard).exists()
    return run.count(stage, shard, run.shard_keys(shard)).missing == 0


def _log_index(folder: Path) -> dict[str, frozenset[int]]:
    """Element -> ranks that have a log; one listing, as there may be tens of thousands."""
    found: dict[str, set[int]] = {}
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    for name in names:
        if match := _LOG_NAME.fullmatch(name):
            found.setdefault(match["element"], set()).add(int(match["rank"]))
    return {element: frozenset(ranks) for element, ranks in found.items()}


def _read_logs(known: Known, stage: str, element: str) -> tuple[tuple[RankLog, ...], int]:
    """The newest life of each rank, and the number of starts that rank 0's log shows."""
    folder, logs, most = known.run.jobs_path(stage), [], 0
    for rank in sorted(known.logs[stage].get(element, ())):
        output, errors = (tail(folder / f"{element}_{rank}_log.{kind}") for kind in ("out", "err"))
        log, starts = newest_life(rank, output, errors)
        if log.lines:
            logs.append(log)
            most = max(most, starts)
    return tuple(logs), most


def _with_nodes(logs: Sequence[RankLog], nodes: tuple[str, ...]) -> tuple[RankLog, ...]:
    """With the element's only node where the log names none."""
    only = nodes[0] if len(nodes) == 1 else ""
    return tuple(log if log.node else replace(log, node=only) for log in logs)


def _queue(ids: Sequence[str]) -> tuple[dict[str, Row] | None, str]:
    """Element -> what squeue says; None, and why, if it says nothing."""
    if not ids:
        return {}, ""
    columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS)
    text, problem = _answer("squeue", "-h", "-a", "-r", "-t", "all", "-O", columns, "-j", ",".join(ids))
    if text is None and "invalid job id" in problem.lower():  # so it says that it has forgotten them
        return {}, ""
    if text is None:
        return None, f"{problem}: whether an element waits or runs is not known"
    rows = {}
    for line in text.splitlines():
        element, state, status, restarts, reason, nodes = _cut(line)
        code = int(status) if status.isdigit() else 0
        rows[element] = Row(
            state=state,
            reason=reason,
            exit_code=code >> 8,  # squeue gives what wait(2) does
            signal=code & 127,
            nodes=expand_nodes(nodes),
            num_restarts=int(restarts) if restarts.isdigit() else 0,
        )
    return rows, ""


def _cut(line: str) -> Iterator[str]:
    start = 0
    for _, width in _COLUMNS:
        yield line[start : start + width].strip()
        start += width


def _lives(ids: Sequence[str], run: RunDir) -> tuple[dict[str, tuple[Row, ...]] | None, str]:
    """Element -> every life of it that the accounting has; None, and why, if it says nothing."""
    if not ids:
        return {}, ""
    # without a start sacct looks at today only; a day before the run was frozen, whatever the time zone
    since = (datetime.fromisoformat(run.environment().created) - timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%S")
    words = (
        "-X",
        "-D",
        "-n",
        "--parsable2",
        f"--starttime={since}",
        "-o",
        "JobID,State,ExitCode,NodeList",
        "-j",
        ",".join(ids),
    )
    text, problem = _answer("sacct", *words)
    if text is None:
        return None, f"{problem}: what SLURM forgets after minutes (end states, former lives) is not known"
    lives: dict[str, tuple[Row, ...]] = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) >= 4:
            element, state, code, nodes = fields[:4]
            number, _, signal = code.partition(":")
            row = Row(state=state, exit_code=_int(number), signal=_int(signal), nodes=expand_nodes(nodes))
            lives[element] = (*lives.get(element, ()), row)
    return lives, ""


def _answer(*command: str) -> tuple[str | None, str]:
    """What a command prints; None, and why, if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None, f"no {command[0]} here"
    try:
        done = controller.call(*command, seconds=ANSWER_SECONDS)
    except NoAnswer as error:
        return None, printable(str(error), 120)
    if done.returncode:
        said = printable((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1], 120)
        return None, f"{command[0]} says: {said}"
    return done.stdout, ""


def _int(text: str) -> int:
    return int(text) if text.isdigit() else 0
