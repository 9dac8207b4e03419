"""Fixtures that several test files share."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import skip_if

from slurm.devcluster import Cluster, missing_binaries  # by path: slurm/ is not an installed package

settings.register_profile("busy_machine", deadline=None)  # an example that takes long on a shared machine is no fault
settings.load_profile("busy_machine")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A new folder with a name short enough for sockets below it, in memory if the machine can."""
    folder = Path(tempfile.mkdtemp(prefix="c", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[object], Path]:
    """save(content): a file of torch.save, called after the test file: raft.pth for test_raft.py."""
    import torch

    def save(content: object) -> Path:
        path = tmp_path / f"{request.module.__name__.removeprefix('test_')}.pth"
        torch.save(content, path)
        return path

    return save


@dataclass(frozen=True)
class Answer:
    """What a command line left behind."""

    code: int
    out: str
    err: str


Call = Callable[..., Answer]


@pytest.fixture
def ipt2v(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command, run in this process."""
    from launch import cli

    def call(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["ipt2v", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """SLURM's commands on PATH, pretended, with an empty queue."""
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.install()}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(fake.folder))
    return fake


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running SLURM cluster, 4 nodes of 4 pretend GPUs, shared by all tests: leave it as you found it.

    With accounting unless IPT2V_NO_ACCOUNTING=1: what does not ask sacct itself must hold without, too.
    """
    yield from _running_cluster(accounting=os.environ.get("IPT2V_NO_ACCOUNTING") != "1")


@pytest.fixture
def cluster_without_accounting() -> Iterator[Cluster]:
    """A running SLURM cluster of this test alone, without sacct."""
    yield from _running_cluster(accounting=False)


def _running_cluster(*, accounting: bool) -> Iterator[Cluster]:
    skip_if(missing_binaries(accounting=accounting), "slurm/apt.txt")
    root = tempfile.mkdtemp(prefix="c", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    with Cluster(root, accounting=accounting) as running:
        yield running


@pytest.fixture(scope="session")
def toy_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny random checkpoints in the published layouts; shared by all tests, so not to be written to."""
    from ipt2v.metrics.toy_weights import write_all_toy_weights

    root = tmp_path_factory.mktemp("toy_weights")
    write_all_toy_weights(root)
    return root
