"""What has happened to an element, and what to do about it, from what is known of it. Pure: reads no file, asks no scheduler.

A fault leaves words in many logs: the rank that fell says why, the others only that it is gone, and SLURM kills what is left
and says so too. So causes are looked for first, in the logs of all ranks, and consequences last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from launch.fault_text import printable
from launch.fault_words import (
    ABORTED,
    BLIND,
    CAUSES,
    COLLECTIVE_FRAME,
    CONSEQUENCES,
    ENDED_STATES,
    ENDINGS,
    EXCEPTION,
    EXCEPTION_LINE,
    FIRST_FRAME_CRASH,
    FRAME,
    HANGS,
    HELD,
    HELD_STATES,
    KILLED,
    LOADING_FRAME,
    MEANINGS,
    NAMED_NODE,
    NEVER_SATISFIED,
    NEVER_STARTED,
    RANK_PREFIX,
    REQUEUING_STATES,
    RUNNING_STATES,
    SIGNALS,
    SOME_MISSING,
    SOURCE_LINE,
    SRUN_TASK,
    STAGE_FRAME,
    WAITING_STATES,
    Evidence,
    Fault,
    Kind,
    Meaning,
    Pattern,
    Quote,
    RankLog,
)

MAX_QUOTES = 4


@dataclass(frozen=True, slots=True)
class _Verdict:
    """A kind, and what of the evidence says so."""

    kind: Kind
    quotes: tuple[Quote, ...] = ()
    nodes: tuple[str, ...] = ()
    is_hard: bool = False
    meaning: Meaning | None = None
    more: str = field(default="")  # a sentence after the meaning's


def classify(evidence: Evidence) -> Fault:
    """What has happened to an element. Never raises: states and words that nobody knows are Kind.UNKNOWN."""
    verdict = _in_queue(evidence) or _ended(evidence)
    meaning = verdict.meaning or MEANINGS[verdict.kind]
    return Fault(
        stage=evidence.stage,
        shard=evidence.shard,
        kind=verdict.kind,
        text=" ".join(filter(None, (meaning.text, verdict.more))),
        policy=meaning.policy,
        advice=meaning.advice,
        quotes=verdict.quotes,
        nodes=verdict.nodes,
        is_hard=verdict.is_hard,
    )


def _in_queue(evidence: Evidence) -> _Verdict | None:
    """What to say of an element that SLURM has yet to start or to end; None if there is none."""
    # sacct may say NODE_FAIL or PREEMPTED of the life before while squeue has the job again: squeue is right
    state = _word(evidence.state) or _word(evidence.accounted)
    if state in RUNNING_STATES:
        times = f"It is its start number {evidence.num_restarts + 1}." if evidence.num_restarts else ""
        return _Verdict(Kind.RUNNING, more=times)
    if state not in WAITING_STATES:
        return None
    if evidence.reason == NEVER_SATISFIED:
        return _Verdict(Kind.DEPENDENCY)
    if state in HELD_STATES or "held" in evidence.reason.lower():
        return _Verdict(Kind.WAITING, meaning=HELD, more=_because(evidence))
    if evidence.num_restarts or state != "PENDING" or _word(evidence.accounted) in REQUEUING_STATES:
        before = _first(ENDINGS, evidence.logs)
        cause = before.kind if before else ENDED_STATES.get(_word(evidence.accounted), Kind.REQUEUED)
        more = "" if cause == Kind.REQUEUED else f"Before that: {cause}."
        return _Verdict(Kind.REQUEUED, quotes=before.quotes if before else (), more=more)
    return _Verdict(Kind.WAITING, more=_because(evidence))


def _ended(evidence: Evidence) -> _Verdict:
    if evidence.finished:
        return _Verdict(Kind.DONE)
    if not evidence.submitted:
        return _Verdict(Kind.NOT_SUBMITTED)
    state = _word(evidence.state) or _word(evidence.accounted)
    if evidence.reason == NEVER_SATISFIED:
        return _Verdict(Kind.DEPENDENCY)
    logs = evidence.logs
    if state == "COMPLETED" or (not state and _all_ended_well(logs)):
        return _Verdict(Kind.UNKNOWN, meaning=SOME_MISSING)
    return (
        _first(CAUSES, logs)
        or _by_state(state, evidence)
        or _first(ENDINGS, logs)
        or _first_to_fall(logs)
        or _hang(logs)
        or _exception(logs)
        or _first(ABORTED, logs)
        or _loss(logs)
        or _by_exit_code(evidence)
        or _without_words(state, evidence)
    )


def _by_state(state: str, evidence: Evidence) -> _Verdict | None:
    kind = ENDED_STATES.get(state)
    if kind is None:
        return None
    if kind == Kind.CANCELLED and evidence.waits and not evidence.logs and not evidence.nodes:
        return _Verdict(Kind.DEPENDENCY, more="(SLURM has forgotten the reason; somebody may have cancelled it.)")
    said = _first(tuple(row for row in ENDINGS if row.kind == kind), evidence.logs)
    if said:
        return said
    return _Verdict(kind, nodes=evidence.nodes if kind == Kind.NODE_FAILURE else ())


def _first(rows: Iterable[Pattern], logs: tuple[RankLog, ...]) -> _Verdict | None:
    """The first row that matches in some log, with the first line of each log that it matches."""
    for row in rows:
        quotes = tuple(_quotes(row.regex, logs))
        if quotes:
            return _Verdict(row.kind, quotes[:MAX_QUOTES], _nodes_of(quotes, row.kind), row.is_hard, row.meaning)
    return None


def _quotes(regex: re.Pattern[str], logs: tuple[RankLog, ...]) -> Iterator[Quote]:
    for log in logs:
        line = next((line for line in log.lines if regex.search(line) and not SOURCE_LINE.match(line)), None)
        if line is not None:
            named = SRUN_TASK.search(line) or NAMED_NODE.search(line)
            yield Quote(rank=log.rank, node=log.node, line=line, about=named["node"] if named else "")


def _nodes_of(quotes: tuple[Quote, ...], kind: Kind) -> tuple[str, ...]:
    """Where the quoted ranks were. slurmstepd's own line of a node failure comes from a node that lives, so it names none."""
    if kind == Kind.NODE_FAILURE:
        quotes = tuple(quote for quote in quotes if NAMED_NODE.search(quote.line))
    return _distinct(quote.about or quote.node for quote in quotes)


def _first_to_fall(logs: tuple[RankLog, ...]) -> _Verdict | None:
    """A rank that a signal has ended: the first that srun names, as --kill-on-bad-exit has the later ones killed."""
    for log in logs:
        first = next((line for line in log.lines if SRUN_TASK.search(line)), "")
        fallen = _first(SIGNALS[1:], (RankLog(rank=log.rank, node=log.node, lines=(first,)),))
        if fallen:
            return fallen
    return _first(SIGNALS[:1], logs)


def _hang(logs: tuple[RankLog, ...]) -> _Verdict | None:
    """A hang; and where it can be told, the ranks that were not waiting for others: these hang, the others wait for them."""
    found = _first(HANGS, logs)
    if found is None:
        return None
    dumped = [log for log in logs if any(HANGS[0].regex.search(line) for line in log.lines)]
    alone = [log for log in dumped if not any(COLLECTIVE_FRAME.search(line) for line in log.lines)]
    if not alone or len(alone) == len(logs):
        return _Verdict(Kind.HANG, found.quotes)
    frames = [(log, next((line.strip() for line in log.lines if line.startswith('  File "')), "")) for log in alone]
    quotes = tuple(Quote(rank=log.rank, node=log.node, line=line) for log, line in frames if line)
    ranks = ", ".join(str(log.rank) for log in alone)
    more = f"Rank {ranks} did not wait for the others: it is the one that hung."
    return _Verdict(Kind.HANG, (*found.quotes[:1], *quotes)[:MAX_QUOTES], _distinct(log.node for log in alone), more=more)


def _exception(logs: tuple[RankLog, ...]) -> _Verdict | None:
    """The exception that ended a rank, unless it only says that another is gone."""
    for log in logs:
        line = _last_exception(log.lines)
        if not line or any(row.regex.search(line) for row in CONSEQUENCES):
            continue
        quotes = (Quote(rank=log.rank, node=log.node, line=line),)
        frames = [frame for frame in log.lines if FRAME.search(frame)]
        if any(STAGE_FRAME.search(frame) for frame in frames) and not any(LOADING_FRAME.search(frame) for frame in frames):
            in_first_frame = any("stages/first_frame.py" in frame for frame in frames)
            return _Verdict(Kind.BAD_ITEM, quotes, meaning=FIRST_FRAME_CRASH if in_first_frame else None)
        if line.partition(":")[0] == "ValueError":  # house rule: input that is not right
            return _Verdict(Kind.BAD_INPUT, quotes)
        return _Verdict(Kind.UNKNOWN, quotes, meaning=EXCEPTION)
    return None


def _last_exception(lines: tuple[str, ...]) -> str:
    """The line that names the exception of the last traceback; or, of one whose beginning is cut off, what looks like it."""
    found, inside = "", False
    for text in lines:
        line = RANK_PREFIX.sub("", text)
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and not line.startswith((" ", "\t")):
            inside, found = False, line
        elif not inside and EXCEPTION_LINE.search(line):
            found = line
    return found


def _loss(logs: tuple[RankLog, ...]) -> _Verdict | None:
    """Ranks that say that another is gone, and none that says why: the silent ones are suspect."""
    found = _first(CONSEQUENCES, logs)
    if found is None:
        return None
    silent = [log for log in logs if not any(row.regex.search(line) for row in CONSEQUENCES for line in log.lines)]
    ranks = ", ".join(str(log.rank) for log in silent)
    more = f"Rank {ranks} says nothing; the others say that it is gone." if silent else ""
    return _Verdict(Kind.RANK_DIED, found.quotes, _distinct(log.node for log in silent), more=more)


def _by_exit_code(evidence: Evidence) -> _Verdict | None:
    """By the number alone. SLURM gives 137 also where one rank raised and it killed the others: so words came first."""
    code, signal = evidence.exit_code or 0, evidence.signal or 0
    number = signal or (code - 128 if code > 128 else code)
    if number == 9:
        return _Verdict(Kind.HOST_MEMORY, meaning=KILLED)
    if number in {4, 7, 8, 11}:  # SIGILL, SIGBUS, SIGFPE, SIGSEGV
        return _Verdict(Kind.RANK_DIED, more=f"(signal {number})")
    return _Verdict(Kind.BAD_INPUT, more="(exit code 2)") if (code, signal) == (2, 0) else None


def _all_ended_well(logs: tuple[RankLog, ...]) -> bool:
    """By submitit's own word in the log of every rank."""
    return bool(logs) and all(any("Job completed successfully" in line for line in log.lines[-20:]) for log in logs)


def _without_words(state: str, evidence: Evidence) -> _Verdict:
    if evidence.blind:
        return _Verdict(Kind.UNKNOWN, meaning=BLIND)
    if not evidence.logs and not evidence.nodes:
        return _Verdict(Kind.DEPENDENCY if evidence.waits else Kind.UNKNOWN, meaning=None if evidence.waits else NEVER_STARTED)
    return _Verdict(Kind.UNKNOWN, more=f"SLURM calls it {printable(state.lower())}." if state else "")


def _because(evidence: Evidence) -> str:
    return f"SLURM's reason: {printable(evidence.reason)}." if evidence.reason not in {"", "None"} else ""


def _word(state: str) -> str:
    """CANCELLED for sacct's "CANCELLED by 1000"."""
    return (state.split() or [""])[0].rstrip("+").upper()


def _distinct(nodes: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node for node in nodes if node))
