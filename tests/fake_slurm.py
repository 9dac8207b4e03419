#!/usr/bin/env python3
"""sbatch, squeue, scontrol and the rest as far as `submit` knows them: a file is the queue, another says what to answer.

Copied under those names into a folder on PATH. State lies in the folder $FAKE_SLURM: `queue.json`, and `answers`, one word for
each call of sbatch to come.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sacct", "srun")
TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


class FakeSlurm:
    """The state of the fake, for tests and for the commands themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self) -> Path:
        """The folder for PATH."""
        commands = self.folder / "bin"
        commands.mkdir(parents=True)
        for name in COMMANDS:
            (commands / name).write_text(f"#!{sys.executable} -IS\n" + Path(__file__).read_text().partition("\n")[2])
            (commands / name).chmod(0o755)
        return commands

    def read(self, name: str, default: Any) -> Any:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else default

    def write(self, name: str, value: Any) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(value))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """What each sbatch was given, and which files lay beside its script then."""
        return self.read("calls", [])

    @property
    def queue(self) -> list[dict[str, Any]]:
        return self.read("queue", [])

    def will(self, *answers: str) -> None:
        """What the next calls of sbatch do; after that, `accept`."""
        self.write("answers", list(answers))

    def end(self, job_id: str, state: str, *tasks: int) -> None:
        self.write("states", self.read("states", {}) | {f"{job_id}_{task}": state for task in tasks})

    def forget(self, *job_ids: str) -> None:
        self.write("queue", [job for job in self.queue if job["id"] not in job_ids])

    def squeue_answers(self, yes: bool) -> None:
        self.write("silent", not yes)


def tasks_of(array: str) -> list[int]:
    """0-2,5%2 -> 0, 1, 2, 5"""
    parts = [part.split("-") for part in array.partition("%")[0].split(",")]
    return [task for part in parts for task in range(int(part[0]), int(part[-1]) + 1)]


def sbatch(fake: FakeSlurm, words: list[str]) -> int:
    script = Path(words[-1])
    text = script.read_text()
    job = {
        name: "".join(re.findall(rf"^#SBATCH --{name}='?([^'\n]*)", text, re.M)) for name in ("job-name", "array", "dependency")
    }
    job |= {"script": str(script), "id": str(1001 + len(fake.calls))}
    beside = sorted(path.name for path in script.parent.iterdir())
    environment = [name for name in os.environ if name.startswith(("SBATCH_", "SQUEUE_"))]
    fake.write("calls", [*fake.calls, job | {"beside": beside, "text": text, "environment": environment}])
    answers = fake.read("answers", [])
    answer, rest = (answers or ["accept"])[0], answers[1:]
    fake.write("answers", rest)
    if answer in ("accept", "accept_and_time_out", "accept_and_kill"):
        fake.write("queue", [*fake.queue, job])
    if answer in ("accept_and_kill", "kill"):
        os.kill(os.getppid(), signal.SIGKILL)
    problem = {
        "accept_and_time_out": TIMED_OUT,
        "time_out": TIMED_OUT,
        "busy": "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
        "refuse": "sbatch: error: invalid partition specified: nope\nsbatch: error: Invalid partition name specified",
    }.get(answer)
    print(problem or job["id"], file=sys.stderr if problem else sys.stdout)
    return 1 if problem else 0


def squeue(fake: FakeSlurm, words: list[str]) -> int:
    if fake.read("silent", False):
        print("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", file=sys.stderr)
        return 1
    states = fake.read("states", {})
    named = [word.removeprefix("--name=").split(",") for word in words if word.startswith("--name=")]
    if named:
        for job in fake.queue:
            if job["job-name"] in named[0]:
                print(f"{job['id']}|{job['job-name']}|{job['script']}")
        return 0
    asked = words[words.index("-j") + 1].split(",")
    known = [job for job in fake.queue if job["id"] in asked]
    if not known:
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    for job in known:
        for task in tasks_of(job["array"]):
            element = f"{job['id']}_{task}"
            print(f"{element}|{states.get(element, 'PENDING')}")
    return 0


def sacct(fake: FakeSlurm, words: list[str]) -> int:
    (name,) = (word.removeprefix("--name=") for word in words if word.startswith("--name="))
    print("\n".join(fake.read("ended", {}).get(name, [])))
    return 0


def scontrol(fake: FakeSlurm, words: list[str]) -> int:
    print(f"Configuration data\nMaxArraySize            = {fake.read('max_array_size', 1001)}\nMaxJobCount   = 10000")
    return 0


def main() -> int:
    fake, command = FakeSlurm(Path(os.environ["FAKE_SLURM"])), Path(sys.argv[0]).name
    if command == "scancel":
        fake.forget(*sys.argv[1:])
        return 0
    does = {"sbatch": sbatch, "squeue": squeue, "scontrol": scontrol, "sacct": sacct}
    return does[command](fake, sys.argv[1:]) if command in does else 1


if __name__ == "__main__":
    sys.exit(main())
