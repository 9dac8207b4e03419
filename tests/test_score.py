"""Array 3 on a run whose videos are there: a row for each item and metric, nothing measured twice, nothing stale kept.

Real networks of toy weights; the videos are noise.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from helpers import first_frame, frozen_run, noise_frames, provenance, video_latents

from ipt2v import hdf5
from ipt2v.config import Metric
from ipt2v.metrics import measures
from ipt2v.metrics.toy_weights import write_toy_scores
from ipt2v.mp4 import write_mp4
from ipt2v.parallel import Group
from ipt2v.records import Score
from ipt2v.run import run_shard
from ipt2v.run_dir import RunDir
from ipt2v.score_dir import read_scores, write_scores
from ipt2v.score_shard import make_scores
from ipt2v.stages import score
from ipt2v.work import open_work

pytestmark = pytest.mark.slow
CHEAP: tuple[Metric, ...] = ("oc", "dd", "motion_pixels", "first_frame_arc_sim")
SIZE = {"height": 128, "width": 128}


def scored_run(tmp_path: Path, metrics: Collection[str] = CHEAP) -> RunDir:
    """A run whose first frames and videos are there, and that wants these scores."""
    overrides = (f"score.metrics=[{', '.join(metrics)}]", "video.width=128", "video.height=128")
    if not (tmp_path / "weights").exists():
        frozen_run(tmp_path)
        write_toy_scores(tmp_path / "weights")
    run = frozen_run(tmp_path, *overrides)
    digest = run.environment().run_digest
    for number, key in enumerate(key for shard in range(2) for key in run.shard_keys(shard)):
        if not run.mp4_path(key).exists():
            hdf5.save_first_frame(run.part_path("first_frame", key), first_frame(key), provenance(digest))
            hdf5.save_video_latents(run.part_path("video", key), video_latents(key), provenance(digest))
            write_mp4(run.mp4_path(key), noise_frames(9, **SIZE, seed=number), fps=16, crf=30)
    return run


def rows_of(run: RunDir, shard: int = 0) -> dict[tuple[str, str], Score]:
    store = run.scores()
    assert store is not None
    return {(row.key, row.metric): row for row in store.rows(shard, run.shard_keys(shard))}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Metrics, each time that one is measured."""
    calls: list[str] = []
    honest = score.ScoreStage._row

    def counted(self, key, sha256, metric, value, seconds):  # type: ignore[no-untyped-def]
        calls.append(f"{key} {metric}")
        return honest(self, key, sha256, metric, value, seconds)

    monkeypatch.setattr(score.ScoreStage, "_row", counted)
    return calls


def test_every_item_has_a_row_for_every_metric_with_a_value_or_a_reason(tmp_path: Path) -> None:
    run = scored_run(tmp_path, [*measures_of_all()])
    result = run_shard(run.root, "score", 0)
    rows = rows_of(run)
    assert (result.done, result.failed) == (2, 0)
    assert sorted(rows) == sorted((key, metric) for key in run.shard_keys(0) for metric in measures_of_all())
    for row in rows.values():
        assert (row.value is None) == (row.reason is not None)
        assert row.device == "cpu" and row.seconds >= 0
    assert {row.value for (_, metric), row in rows.items() if metric == "dd"} <= {0.0, 1.0}
    assert all(row.value is not None for (_, metric), row in rows.items() if metric in ("oc", "aq", "iq", "ms", "clip_score"))
    store = run.scores()
    assert store is not None and store.sealed_path(0).exists() and not list(store.folder.rglob("parts/*/*.csv"))


def measures_of_all() -> list[Metric]:
    return sorted(metric for family in measures.FAMILIES for metric in family.metrics if metric != "motion_amplitude")


def test_what_was_measured_before_a_kill_is_not_measured_again(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = scored_run(tmp_path)
    _, second = run.shard_keys(0)

    motion = next(family for family in measures.FAMILIES if "dd" in family.metrics)
    with monkeypatch.context() as patch:
        honest = motion.load

        def load(*args):  # type: ignore[no-untyped-def]
            measure, calls = honest(*args), []

            def measure_or_die(video, wanted):  # type: ignore[no-untyped-def]
                calls.append(wanted)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return measure(video, wanted)

            return measure_or_die

        families = tuple(replaced(family, load) if family is motion else family for family in measures.FAMILIES)
        patch.setattr(measures, "FAMILIES", families)
        with pytest.raises(KeyboardInterrupt):
            run_shard(run.root, "score", 0)
    before = sorted(measured)
    assert len(before) == 4 + 2  # the first video's, and of the second what came before its motion
    measured.clear()
    run_shard(run.root, "score", 0)
    assert sorted(measured) == [f"{second} dd", f"{second} motion_pixels"]
    assert len(rows_of(run)) == 8
    measured.clear()
    run_shard(run.root, "score", 0)
    assert measured == []


def replaced(family: measures.Family, load) -> measures.Family:  # type: ignore[no-untyped-def]
    return measures.Family(metrics=family.metrics, load=load)


def test_another_metric_later_is_all_that_is_measured_then(tmp_path: Path, measured: list[str]) -> None:
    run_shard(scored_run(tmp_path).root, "score", 0)
    measured.clear()
    run = scored_run(tmp_path, [*CHEAP, "clip_score"])
    assert run.count("score", 0, run.shard_keys(0)).missing == 2
    run_shard(run.root, "score", 0)
    assert sorted(measured) == [f"{key} clip_score" for key in run.shard_keys(0)]
    assert len(rows_of(run)) == 2 * 5
    assert len(run.all_scores()) == 2


def test_a_video_that_was_made_anew_is_measured_anew(tmp_path: Path, measured: list[str]) -> None:
    run = scored_run(tmp_path)
    run_shard(run.root, "score", 0)
    old, (key, other) = rows_of(run), run.shard_keys(0)
    write_mp4(run.mp4_path(key), noise_frames(9, **SIZE, seed=99), fps=16, crf=30)
    store = run.scores()
    assert store is not None
    store.forget(0, [key])
    measured.clear()
    run_shard(run.root, "score", 0)
    assert {line.split()[0] for line in measured} == {key}
    assert rows_of(run)[key, "oc"].video_sha256 != old[key, "oc"].video_sha256
    assert rows_of(run)[other, "oc"] == old[other, "oc"]


def test_other_weights_are_another_way_of_scoring(tmp_path: Path, measured: list[str]) -> None:
    run_shard(scored_run(tmp_path).root, "score", 0)
    measured.clear()
    write_toy_scores(tmp_path / "weights", seed=1)
    run = scored_run(tmp_path)
    run_shard(run.root, "score", 0)
    assert len(measured) == 2 * len(CHEAP)
    assert len(run.all_scores()) == 2


def test_a_video_that_does_not_decode_is_a_failure_and_its_neighbours_are_scored(tmp_path: Path) -> None:
    run = scored_run(tmp_path)
    broken, whole = run.shard_keys(0)
    run.mp4_path(broken).write_bytes(run.mp4_path(broken).read_bytes()[:300])
    result = run_shard(run.root, "score", 0)
    assert (result.done, result.failed) == (1, 1)
    assert {key for key, _ in rows_of(run)} == {whole}
    (failure,) = run.failures()
    assert (failure.key, failure.stage) == (broken, "score") and str(run.mp4_path(broken)) in failure.reason
    run.mp4_path(broken).unlink()  # as the failure says
    assert run.count("score", 0, run.shard_keys(0)).missing == 1


def test_a_photo_that_is_out_of_reach_fails_the_element_and_no_video(tmp_path: Path) -> None:
    run = scored_run(tmp_path)
    (tmp_path / "testset").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="image"):
        run_shard(run.root, "score", 0)
    assert run.failures() == []
    (tmp_path / "elsewhere").rename(tmp_path / "testset")
    assert run_shard(run.root, "score", 0).done == 2


@pytest.mark.parametrize("late_rank", [0, 1])
def test_all_ranks_end_as_out_of_time_when_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late_rank: int) -> None:
    run, asked = scored_run(tmp_path), list[bool]()

    class Pair(Group):
        def anywhere(self, here: bool) -> bool:
            asked.append(here)
            return here or late_rank == 1

    monkeypatch.setattr("ipt2v.score_shard.seconds_left", lambda: 0.0 if late_rank == 0 else 1e9)
    group = Pair(rank=0, world_size=1, num_nodes=1, device=torch.device("cpu"))
    assert make_scores(open_work(run, "score", 0), group)
    assert asked == [late_rank == 0]


def test_videos_that_are_still_made_are_waited_for_and_others_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scored_run(tmp_path)
    late, gone = run.shard_keys(0)
    lease = run.leases_path / f"{late}.lease"
    lease.parent.mkdir(parents=True)
    lease.write_text("video element 1", encoding="utf-8")
    kept = run.mp4_path(late).read_bytes()
    for key in (late, gone):
        run.mp4_path(key).unlink()

    def deliver(seconds: float) -> None:
        run.mp4_path(late).write_bytes(kept)
        os.utime(lease, (0, 0))

    monkeypatch.setattr("ipt2v.score_shard.time.sleep", deliver)
    result = run_shard(run.root, "score", 0)
    assert result.done == 1
    assert {key for key, _ in rows_of(run)} == {late}
    store = run.scores()
    assert store is not None and not store.sealed_path(0).exists()  # something is missing: not whole


def test_a_run_without_scores_says_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not scored; set score\.metrics"):
        run_shard(frozen_run(tmp_path).root, "score", 0)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = (0.1 + 0.2, -1.0, None)
    rows = [
        Score(
            key="id001/prompt1",
            metric="oc",
            value=value,
            reason=None if value is not None else 'no "face",\nat all',
            seconds=1.5,
            device="cpu",
            created=time.strftime("%Y-%m-%dT%H:%M:%S+00:00"),
            video_sha256="0" * 64,
            scorer="0" * 12,
        )
        for value in values
    ]
    write_scores(tmp_path / "rows.csv", rows)
    assert read_scores(tmp_path / "rows.csv") == rows
    text = (tmp_path / "rows.csv").read_text(encoding="utf-8")
    (tmp_path / "cut.csv").write_text(text[: text.rindex("0" * 64) + 12], encoding="utf-8")
    with pytest.raises(ValueError, match=r"cut\.csv: no table of scores"):
        read_scores(tmp_path / "cut.csv")
    (tmp_path / "rows.csv").write_text("key,metric\nid001/prompt1,oc\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.csv: no table of scores"):
        read_scores(tmp_path / "rows.csv")
