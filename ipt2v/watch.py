"""What ends a process that hangs, and what is done when one is told to end. Stdlib only: it is imported before torch."""

from __future__ import annotations

import faulthandler
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

# Set by the launcher; without them nobody watches, and time does not end.
STALL_SECONDS = "IPT2V_STALL_SECONDS"  # without a sign of life
END_TIME = "IPT2V_END_TIME"  # when the scheduler will end this process, in seconds of Unix time

# A collective that waits longer has lost a rank; the slowest legitimate wait is one rank reading 35 GB of weights.
COLLECTIVE_SECONDS = 30 * 60.0
AFTER_STALL_SECONDS = 5 * 60.0  # later than the timers of a rank that hangs, so that those come first and print its stacks

log = logging.getLogger(__name__)
_on_interruption: list[Callable[[], None]] = []


def beat() -> None:
    """A sign of life. The next is due within IPT2V_STALL_SECONDS: else all stacks go to stderr and the process ends.

    faulthandler's timer needs no interpreter, so it also fires in a call that never returns. A rank that hangs keeps the others
    in a collective: their timers fire with its own, and every rank's log says where it was.
    """
    seconds = float(os.environ.get(STALL_SECONDS, "0"))
    if seconds > 0:
        faulthandler.dump_traceback_later(seconds, exit=True)


def beating(values: Iterable[T]) -> Iterator[T]:
    """The values, with a sign of life before each."""
    for value in values:
        beat()
        yield value


def collective_timeout() -> timedelta:
    """How long a collective may take."""
    stall = float(os.environ.get(STALL_SECONDS, "0"))
    return timedelta(seconds=stall + AFTER_STALL_SECONDS if stall > 0 else COLLECTIVE_SECONDS)


def rest() -> None:
    """No sign of life is due any more."""
    faulthandler.cancel_dump_traceback_later()


def seconds_left() -> float:
    """Until the scheduler ends this process; infinite if nobody has said."""
    return float(os.environ.get(END_TIME, "inf")) - time.time()


@contextmanager
def on_interruption(act: Callable[[], None]) -> Iterator[None]:
    """While this lasts, `act` is called when the scheduler warns; in the main thread, between any two lines of it."""
    _on_interruption.append(act)
    try:
        yield
    finally:
        _on_interruption.remove(act)


def interrupted() -> None:
    """The scheduler has warned: save what there is to save, quickly. Nothing that goes wrong here keeps the process alive."""
    for act in reversed(_on_interruption):
        try:
            act()
        except Exception:
            log.exception("not saved on the scheduler's warning")
