"""Claims about an element's first moments on a node: it finds its pickle, whatever an earlier life has left."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from submitit.core.utils import JobPaths

from launch.element import prepare
from launch.job import ArrayJob


class Shard:
    def __call__(self, shard: int) -> object:
        return shard

    def checkpoint(self, shard: int) -> object:
        return ("again", shard)


def paths(folder: Path, rank: int = 0) -> JobPaths:
    return JobPaths(folder, job_id="17_3", task_id=rank)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "x.video.1.0.pkl").write_text("the array's")
    return tmp_path


def test_many_ranks_at_once_find_one_whole_pickle(folder: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda rank: prepare(folder, "x.video.1.0", paths(folder, rank)), range(64)))
    assert sorted(path.name for path in folder.iterdir()) == ["17_3_submitted.pkl", "x.video.1.0.pkl"]
    assert paths(folder).submitted_pickle.read_text() == "the array's"


def test_without_links_the_pickle_is_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    prepare(folder, "x.video.1.0", paths(folder))
    assert paths(folder).submitted_pickle.read_text() == "the array's"


def test_what_a_checkpoint_has_left_is_used(folder: Path) -> None:
    paths(folder).submitted_pickle.write_text("after a checkpoint")
    prepare(folder, "x.video.1.0", paths(folder))
    assert paths(folder).submitted_pickle.read_text() == "after a checkpoint"
    assert (folder / "x.video.1.0.pkl").read_text() == "the array's"


def test_scratch_files_of_a_killed_life_are_gone_but_not_those_of_others(folder: Path) -> None:
    ours = [folder / "17_3_submitted.pkl.save_tmp", folder / "17_3_0_result.pkl.save_tmp"]
    others = [folder / "17_4_submitted.pkl.save_tmp", folder / "17_3_1_result.pkl.save_tmp"]
    for path in (*ours, *others):
        path.touch()
    prepare(folder, "x.video.1.0", paths(folder))
    assert [path.exists() for path in (*ours, *others)] == [False, False, True, True]


def test_only_rank_0_clears_what_rank_0_may_be_writing(folder: Path) -> None:
    (folder / "17_3_submitted.pkl.save_tmp").touch()
    prepare(folder, "x.video.1.0", paths(folder, rank=1))
    assert (folder / "17_3_submitted.pkl.save_tmp").exists()


def test_an_array_that_came_after_it_was_given_up_does_nothing(folder: Path) -> None:
    (folder / "x.video.1.0.dropped").touch()
    with pytest.raises(SystemExit, match="its shards are in another array"):
        prepare(folder, "x.video.1.0", paths(folder))


def test_an_element_makes_the_shard_at_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    job = ArrayJob(job=Shard(), shards=(40, 42), tasks=(3, 5))  # type: ignore[arg-type]
    assert (job(), job.checkpoint()) == (42, ("again", 42))
