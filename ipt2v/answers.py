"""The LLM's answers, kept by what was asked: each is computed once in a run, whichever shard asks. Knows no model, no torch."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from ipt2v.atomic import write_text
from ipt2v.records import Answer
from ipt2v.watch import beat

WAIT_SECONDS = 0.5  # between looks at what another shard is asking


Generate = Callable[[Sequence[str]], list[Answer]]


def answer_all(messages: Sequence[str], generate: Generate, *, folder: Path, batch_size: int) -> list[Answer]:
    """The answer to each message, from `folder` or by `generate`, which is then kept there.

    Shards that run at once share the folder: each message is claimed by one of them, and the others wait for its answer. A
    claim is a lock of the operating system, so a shard that dies gives its claims up. Where the file system has no locks,
    shards may ask the same twice; answers depend on the message alone, so nothing else changes.
    """
    answers: dict[str, Answer] = {}
    waiting = list(dict.fromkeys(messages))
    while waiting:
        beat()
        with ExitStack() as claims:
            known, mine = _look(waiting, folder, batch_size, claims)
            made = dict(zip(mine, generate(mine), strict=True)) if mine else {}
            for message, answer in made.items():
                write_text(_path(folder, message), json.dumps({"message": message, **asdict(answer)}, indent=1) + "\n")
        answers |= known | made
        waiting = [message for message in waiting if message not in answers]
        if waiting and not known and not made:
            time.sleep(WAIT_SECONDS)
    return [answers[message] for message in messages]


def _look(waiting: Sequence[str], folder: Path, number: int, claims: ExitStack) -> tuple[dict[str, Answer], list[str]]:
    """(what is answered by now, at most `number` messages that nobody is about to answer, claimed until `claims` ends)."""
    known: dict[str, Answer] = {}
    mine: list[str] = []
    for message in waiting:
        answer = _read(folder, message)
        if answer is None and claims.enter_context(_locked(_path(folder, message).with_suffix(".lock"))):
            answer = _read(folder, message)  # again: it may have come between the look and the lock
            if answer is None:
                mine.append(message)
        if answer is not None:
            known[message] = answer
        if len(mine) == number:
            break
    return known, mine


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether we hold the lock, which nobody else then does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # no locks on this file system: as if we held it
        yield True


def _read(folder: Path, message: str) -> Answer | None:
    try:
        kept = json.loads(_path(folder, message).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Answer(text=kept["text"], finished=kept["finished"])


def _path(folder: Path, message: str) -> Path:
    return folder / f"{hashlib.sha256(message.encode()).hexdigest()[:32]}.json"
