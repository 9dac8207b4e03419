"""Each distinct question is asked once in a run: over shards that run at once, and over crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import ROOT

from ipt2v.answers import answer_all
from ipt2v.manifest import shard_by_identity
from ipt2v.records import Answer, Item


class Llm:
    """Keeps what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, messages: Sequence[str]) -> list[Answer]:
        self.batches.append(list(messages))
        return [Answer(text=f"answer to {message}", finished=True) for message in messages]


def test_a_message_is_asked_once_and_answered_everywhere(tmp_path: Path) -> None:
    llm = Llm()
    answers = answer_all(["b", "a", "b"], llm, folder=tmp_path, batch_size=1)
    assert [answer.text for answer in answers] == ["answer to b", "answer to a", "answer to b"]
    assert answer_all(["a"], llm, folder=tmp_path, batch_size=1) == answers[1:2]
    assert llm.batches == [["b"], ["a"]]


def test_batches_are_filled(tmp_path: Path) -> None:
    llm = Llm()
    answer_all(["a", "b", "c", "d", "e"], llm, folder=tmp_path, batch_size=2)
    assert [len(batch) for batch in llm.batches] == [2, 2, 1]


def test_texts_and_whether_they_ended_survive(tmp_path: Path) -> None:
    said = [Answer(text='色\u0085\n"{prompt}"', finished=False)]
    answer_all(["m"], lambda _: said, folder=tmp_path, batch_size=1)
    assert answer_all(["m"], lambda _: pytest.fail("asked again"), folder=tmp_path, batch_size=1) == said


def test_what_was_answered_before_a_crash_is_not_asked_again(tmp_path: Path) -> None:
    llm = Llm()

    def crash_at_c(messages: Sequence[str]) -> list[Answer]:
        if "c" in messages:
            raise RuntimeError("out of memory")
        return llm(messages)

    with pytest.raises(RuntimeError):
        answer_all(["a", "b", "c", "d"], crash_at_c, folder=tmp_path, batch_size=1)
    answer_all(["a", "b", "c", "d"], llm, folder=tmp_path, batch_size=1)
    assert llm.batches == [["a"], ["b"], ["c"], ["d"]]


WORKER = """
import os, sys, time
from pathlib import Path
from ipt2v.answers import answer_all
from ipt2v.records import Answer
folder, log = Path(sys.argv[1]), sys.argv[2]
def generate(messages):
    with open(log, "a") as file:
        file.write("".join(f"{message}\\n" for message in messages))
    time.sleep(float(sys.argv[3]))
    return [Answer(text=f"answer to {message}", finished=True) for message in messages]
answers = answer_all(sys.stdin.read().split("\\n"), generate, folder=folder, batch_size=1)
assert all(answer.text.startswith("answer to ") for answer in answers)
"""


def start(folder: Path, log: Path, messages: Sequence[str], seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(folder), str(log), str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, text=True)
    assert process.stdin is not None
    process.stdin.write("\n".join(messages))
    process.stdin.close()
    return process


def sliding_window_testset() -> tuple[Item, ...]:
    """200 identities x 5 prompts like the 2025 set's: four from a pool read with a sliding window, one of their own."""
    return tuple(
        Item(
            identity=f"id{identity:03d}",
            prompt_id=f"prompt{number}",
            prompt=f"pool {(identity + number) % 100}" if number < 5 else f"caption of {identity}",
            reference="/photo.png",
            reference_sha256="0" * 64,
        )
        for identity in range(1, 201)
        for number in range(1, 6)
    )


def test_a_thousand_pairs_of_three_hundred_prompts_are_six_hundred_questions_over_eight_shards_at_once(tmp_path: Path) -> None:
    items = sliding_window_testset()
    assert (len(items), len({item.prompt for item in items})) == (1000, 300)
    log = tmp_path / "log"
    processes = []
    for shard in shard_by_identity(items, 8):
        messages = [f"{kind} {item.prompt}" for item in shard for kind in ("parse", "polish")]
        processes.append(start(tmp_path / "answers", log, messages, seconds=0.002))
    assert [process.wait(timeout=120) for process in processes] == [0] * 8
    asked = log.read_text().splitlines()
    assert len(asked) == len(set(asked)) == 600


def test_a_shard_that_is_killed_gives_its_claims_up(tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "answers"
    doomed = start(folder, log, ["a"], seconds=60)
    deadline = time.monotonic() + 30
    while not log.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    heir = start(folder, log, ["a"], seconds=0)
    time.sleep(1)
    assert heir.poll() is None, "it waits for the answer that another is about to give"
    os.kill(doomed.pid, signal.SIGKILL)
    assert heir.wait(timeout=30) == 0
    assert log.read_text().splitlines() == ["a", "a"]
