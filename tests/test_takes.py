"""Rules on scores: what is rejected gets another take, nothing is lost, and the best of all takes is delivered."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import first_frame, frozen_run, noise_frames, provenance, video_latents

from ipt2v import hdf5
from ipt2v.config import AcceptConfig, ScoreConfig, Scoring
from ipt2v.mp4 import write_mp4
from ipt2v.records import Failure, Score, item_seed, take_seed
from ipt2v.run_dir import RunDir, seal_shard
from ipt2v.stages.score import ScoreStage
from ipt2v.takes import best_takes, broken_rules, make_room, rejected, shortfall
from launch.rejects import reject

ACCEPT = AcceptConfig(at_least={"arc_sim": 0.3, "dd": 1.0}, at_most={"drift": 0.1}, max_takes=2)
SCORING = Scoring(config=ScoreConfig(metrics=("arc_sim", "dd", "drift"), accept=ACCEPT), weights={})
GOOD = {"arc_sim": 0.5, "dd": 1.0, "drift": 0.0}


def row(key: str, metric: str, value: float | None) -> Score:
    return Score(
        key=key,
        metric=metric,
        value=value,
        reason="no face" if value is None else None,
        seconds=1.0,
        device="cpu",
        created="2026-01-01T00:00:00.000+00:00",
        video_sha256="0" * 64,
        scorer="0" * 12,
    )


def rows(key: str = "a/1", **values: float | None) -> list[Score]:
    return [row(key, metric, value) for metric, value in (GOOD | values).items()]


def deliver(run: RunDir, shard: int, key: str, *, seed: int = 0, **values: float | None) -> bytes:
    """A first frame, latents, an MP4 and scores of one item; the MP4's bytes."""
    store = run.scores()
    assert store is not None
    paint(run, key)
    record = replace(provenance(run.environment().run_digest), seed=seed)
    hdf5.save_video_latents(run.part_path("video", key), video_latents(key), record)
    write_mp4(run.mp4_path(key), noise_frames(5, seed=seed), fps=16, crf=30)
    video = run.mp4_path(key).read_bytes()
    sha256 = hashlib.sha256(video).hexdigest()
    store.finish(key, [replace(one, video_sha256=sha256) for one in rows(key, **values)])
    return video


def paint(run: RunDir, key: str) -> None:
    """A first frame as array 1 makes it of the item's next take."""
    take = 1 + run.numbers_of_takes([key]).get(key, 0)
    record = replace(first_frame(key, similarity=0.5 + take / 100), take=take)
    how = replace(provenance(run.environment().run_digest), created=f"2026-01-{take:02d}T00:00:00.000+00:00")
    hdf5.save_first_frame(run.part_path("first_frame", key), record, how)


def forget_scores(run: RunDir, key: str) -> None:
    store = run.scores()
    assert store is not None
    store.forget(0, [key])


def measure_otherwise(run: RunDir) -> None:
    """One metric more: another way of scoring, with nothing measured yet."""
    run.save_scoring(Scoring(config=ScoreConfig(metrics=("arc_sim", "dd", "drift", "oc"), accept=ACCEPT), weights={}))


def die_when_the_video_goes(monkeypatch: pytest.MonkeyPatch, run: RunDir, key: str, *, after: bool = False) -> None:
    """make_room of an item that is killed when its MP4 is about to be, or was, unlinked."""
    honest = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path != run.mp4_path(key) or after:
            honest(path, missing_ok)
        if path == run.mp4_path(key):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", unlink)
        make_room(run, 0, [key])


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two identities of two prompts in one shard, with rules; nothing made."""
    run = frozen_run(tmp_path, num_shards=1)
    run.save_scoring(SCORING)
    return run


def seal(run: RunDir) -> None:
    keys, store = run.shard_keys(0), run.scores()
    assert store is not None
    for stage in ("first_frame", "video"):
        seal_shard(run, stage, 0, keys)
    store.seal(0, keys)


@pytest.mark.parametrize(
    ("values", "reasons"),
    [
        ({}, ()),
        ({"arc_sim": 0.3, "drift": 0.1}, ()),  # the bound itself is good enough
        ({"arc_sim": 0.25}, ("arc_sim 0.250 is below 0.3",)),
        ({"arc_sim": None}, ("arc_sim has no value",)),
        ({"dd": 0.0, "drift": 0.2}, ("dd 0.000 is below 1", "drift 0.200 is above 0.1")),
    ],
)
def test_a_rule_is_a_bound_that_a_score_without_value_does_not_meet(
    values: dict[str, float | None], reasons: tuple[str, ...]
) -> None:
    assert broken_rules(rows(**values), ACCEPT) == reasons


def test_fewer_broken_rules_are_better_then_what_is_nearer() -> None:
    order = [{}, {"arc_sim": 0.29}, {"arc_sim": 0.1}, {"arc_sim": None}, {"arc_sim": 0.29, "dd": 0.0}]
    found = [shortfall(rows(**values), ACCEPT) for values in order]  # type: ignore[arg-type]
    assert found == sorted(found) and len(set(found)) == len(found)
    assert found[2] == (1, pytest.approx(0.2 / 0.3)) and found[3] == (1, math.inf)


def test_without_rules_nothing_can_be_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no rules to reject by; set score\.accept"):
        rejected(frozen_run(tmp_path))


def test_a_rule_for_what_is_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="a rule for oc, which is not measured"):
        ScoreConfig(metrics=("dd",), accept=AcceptConfig(at_least={"oc": 0.1}))


def test_rules_are_no_other_way_of_scoring() -> None:
    other = Scoring(config=SCORING.config.model_copy(update={"accept": AcceptConfig()}), weights={})
    assert other.digest == SCORING.digest


@pytest.mark.parametrize("sealed", [False, True])
def test_a_rejected_video_is_kept_and_counts_as_missing_its_neighbours_do_not(run: RunDir, sealed: bool) -> None:
    keys = run.shard_keys(0)
    made = {key: deliver(run, 0, key, seed=number) for number, key in enumerate(keys)}
    made[keys[1]] = deliver(run, 0, keys[1], seed=9, arc_sim=0.1)
    if sealed:
        seal(run)
    (bad,) = rejected(run)
    assert (bad.key, bad.num_takes, bad.reasons) == (keys[1], 1, ("arc_sim 0.100 is below 0.3",))
    lines = reject(run, busy=())
    assert lines[:2] == [
        "1 videos are rejected, 1 are made again with another seed",
        f"  arc_sim: 1, for example {keys[1]}: arc_sim 0.100 is below 0.3",
    ]
    for stage in run.stages():
        assert run.done(stage, 0, keys) == {*keys} - {keys[1]}, stage
    kept = run.takes_path(keys[1]) / "1"
    assert (kept / "video.mp4").read_bytes() == made[keys[1]]
    digest = run.environment().run_digest
    assert hdf5.load_first_frame(kept / "first_frame.h5", keys[1], run_digest=digest).key == keys[1]
    assert hdf5.load_video_latents(kept / "video.h5", keys[1], run_digest=digest).key == keys[1]
    for key in {*keys} - {keys[1]}:
        assert run.mp4_path(key).read_bytes() == made[key]
        path = run.record_path("video", 0, key)
        assert hdf5.load_video_latents(path, key, run_digest=digest).key == key
    assert run.numbers_of_takes(keys) == {keys[1]: 1}


def test_of_all_takes_the_best_is_delivered_and_a_new_one_not_before_it_is_scored(run: RunDir) -> None:
    key = run.shard_keys(0)[0]
    first = deliver(run, 0, key, seed=1, arc_sim=0.2)
    make_room(run, 0, [key])
    assert best_takes(run, 0, [key])[key].mp4.read_bytes() == first
    second = deliver(run, 0, key, seed=2, arc_sim=0.1)
    store = run.scores()
    assert store is not None
    scores = store.rows(0, [key])
    store.forget(0, [key])
    assert best_takes(run, 0, [key])[key].number == 1
    store.finish(key, scores)
    assert best_takes(run, 0, [key])[key].number == 1, "the second is worse"
    (bad,) = rejected(run)
    assert (bad.num_takes, bad.reasons) == (2, ("arc_sim 0.200 is below 0.3",))
    assert reject(run, busy=())[-1] == "1 have had 2 takes (score.accept.max_takes): the best of them is delivered"
    store.finish(key, rows(key))
    assert best_takes(run, 0, [key])[key].mp4.read_bytes() == second
    assert rejected(run) == []


@pytest.mark.parametrize("after", [False, True])
def test_a_death_in_between_costs_no_take(run: RunDir, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    key = run.shard_keys(0)[0]
    made = deliver(run, 0, key, arc_sim=0.1)
    seal(run)
    die_when_the_video_goes(monkeypatch, run, key, after=after)
    assert [path.name for path in run.takes_path(key).iterdir()] == ["1"]
    assert run.mp4_path(key).exists() != after
    (bad,) = rejected(run)
    assert bad.num_takes == 1, "the copy and what it is a copy of"
    assert reject(run, busy=())[0] == "1 videos are rejected, 1 are made again with another seed"
    assert [path.name for path in run.takes_path(key).iterdir()] == ["1"]
    assert best_takes(run, 0, [key])[key].mp4.read_bytes() == made
    assert not run.recorded("first_frame", 0, [key]) and not run.recorded("video", 0, [key])
    assert not run.mp4_path(key).exists() and not run.done("score", 0, [key])


@pytest.mark.parametrize("scored", [False, True])
def test_without_rules_the_newest_is_delivered(run: RunDir, scored: bool) -> None:
    key = run.shard_keys(0)[0]
    videos = []
    for seed in (1, 2, 3):
        videos.append(deliver(run, 0, key, seed=seed, arc_sim=0.3 / seed))
        if seed < 3:
            make_room(run, 0, [key])
    assert best_takes(run, 0, [key])[key].number == 1
    if scored:
        run.save_scoring(Scoring(config=SCORING.config.model_copy(update={"accept": AcceptConfig()}), weights={}))
    else:
        run.scoring_path.unlink()
    best = best_takes(run, 0, [key])[key]
    assert (best.mp4, best.number) == (run.mp4_path(key), 3)
    run.mp4_path(key).unlink()
    assert best_takes(run, 0, [key])[key].mp4.read_bytes() == videos[1]


def test_a_take_measured_in_another_way_is_judged_by_what_is_known_of_the_same_file(run: RunDir) -> None:
    key = run.shard_keys(0)[0]
    deliver(run, 0, key, seed=1, arc_sim=0.1)
    make_room(run, 0, [key])
    second = deliver(run, 0, key, seed=2, arc_sim=0.2)
    measure_otherwise(run)
    best = best_takes(run, 0, [key])[key]
    assert best.mp4.read_bytes() == second and {row.metric: row.value for row in best.rows} == GOOD | {"arc_sim": 0.2}
    assert reject(run, busy=())[-1].startswith("1 have had 2 takes")
    write_mp4(run.mp4_path(key), noise_frames(5, seed=3), fps=16, crf=30)
    assert best_takes(run, 0, [key])[key].number == 1, "these rows are of another file"


def test_the_scores_of_another_way_are_kept_with_the_take(run: RunDir) -> None:
    key = run.shard_keys(0)[0]
    deliver(run, 0, key, seed=1, arc_sim=0.1)
    make_room(run, 0, [key])
    deliver(run, 0, key, seed=2, arc_sim=0.2)
    measure_otherwise(run)
    make_room(run, 0, [key])
    best = best_takes(run, 0, [key])[key]
    assert best.number == 2 and {row.metric: row.value for row in best.rows} == GOOD | {"arc_sim": 0.2}


def test_a_new_take_that_waits_for_its_scores_is_left_alone(run: RunDir) -> None:
    key = run.shard_keys(0)[0]
    deliver(run, 0, key, seed=1, arc_sim=0.1)
    run.save_scoring(
        Scoring(config=SCORING.config.model_copy(update={"accept": ACCEPT.model_copy(update={"max_takes": 5})}), weights={})
    )
    reject(run, busy=())
    second = deliver(run, 0, key, seed=2)
    forget_scores(run, key)
    lines = reject(run, busy=())
    assert (lines[0], lines[-1]) == (
        "1 videos are rejected, 0 are made again with another seed",
        "1 have another take that waits for its scores",
    )
    assert run.mp4_path(key).read_bytes() == second and run.numbers_of_takes([key]) == {key: 1}


@pytest.mark.parametrize("painted", [False, True])
def test_a_new_take_that_is_not_made_yet_is_left_alone(run: RunDir, painted: bool) -> None:
    key = run.shard_keys(0)[0]
    deliver(run, 0, key, arc_sim=0.1)
    reject(run, busy=())
    if painted:
        paint(run, key)
        run.position_path(key).parent.mkdir(parents=True)
        run.position_path(key).touch()
    lines = reject(run, busy=())
    assert (lines[0], lines[-1]) == (
        "1 videos are rejected, 0 are made again with another seed",
        "1 have another take that is not made yet",
    )
    assert run.recorded("first_frame", 0, [key]) == ({key} if painted else set())
    assert run.position_path(key).exists() == painted


@pytest.mark.parametrize("stage", ["first_frame", "video", "score"])
def test_a_new_take_that_failed_is_left_alone_and_the_command_that_retries_it_said(run: RunDir, stage: str) -> None:
    key = run.shard_keys(0)[0]
    deliver(run, 0, key, arc_sim=0.1)
    reject(run, busy=())
    run.save_failure(Failure(key=key, stage=stage, reason="no face"))
    lines = reject(run, busy=())
    assert lines[0] == "1 videos are rejected, 0 are made again with another seed"
    assert lines[-1].startswith(f"1 have failed in their newest take: `ipt2v retry {run.root} --failed` lets")


@pytest.mark.parametrize("stage", ["first_frame", "video"])
def test_an_item_that_has_lost_a_record_is_left_alone_and_others_are_made_again(run: RunDir, stage: str) -> None:
    lost, other = run.shard_keys(0)[:2]
    made = {key: deliver(run, 0, key, arc_sim=0.1) for key in (lost, other)}
    run.part_path(stage, lost).unlink()
    lines = reject(run, busy=())
    assert lines[0] == "2 videos are rejected, 1 are made again with another seed"
    assert lines[-1].startswith("1 have lost a record of how they were made: submitting makes it anew")
    assert run.mp4_path(lost).read_bytes() == made[lost] and not run.mp4_path(other).exists()


def test_a_number_is_not_given_twice_when_an_older_take_was_put_aside(run: RunDir, tmp_path: Path) -> None:
    key = run.shard_keys(0)[0]
    deliver(run, 0, key, seed=1, arc_sim=0.1)
    make_room(run, 0, [key])
    deliver(run, 0, key, seed=2, arc_sim=0.1)
    shutil.move(run.takes_path(key) / "1", tmp_path / "aside")  # as `verify --repair` does
    assert reject(run, busy=())[0] == "1 videos are rejected, 1 are made again with another seed"
    assert run.numbers_of_takes([key]) == {key: 2}, "the next is the third"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_no_value(value: float) -> None:
    assert broken_rules(rows(arc_sim=value, drift=value), ACCEPT) == ("arc_sim has no value", "drift has no value")
    stage = ScoreStage(scoring=SCORING, weights_dir=Path(), device=torch.device("cpu"))
    found = stage._row("a/1", "0" * 64, "arc_sim", value, 1.0)
    assert (found.value, found.reason) == (None, f"found {value}, expected a number")


def test_a_kept_take_is_on_the_disk_before_the_original_goes(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    key = run.shard_keys(0)[0]
    deliver(run, 0, key, arc_sim=0.1)
    on_disk: set[int] = set()
    honest = os.fsync

    def fsync(descriptor: int) -> None:
        on_disk.add(os.fstat(descriptor).st_ino)
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    die_when_the_video_goes(monkeypatch, run, key)
    kept = run.takes_path(key) / "1"
    for path in (*kept.iterdir(), kept, kept.parent, kept.parent.parent, run.root / "takes", run.root):
        assert path.stat().st_ino in on_disk, path


def test_items_of_shards_in_the_queue_are_left_alone(run: RunDir) -> None:
    key = run.shard_keys(0)[0]
    deliver(run, 0, key, arc_sim=0.1)
    assert reject(run, busy={0})[-1].startswith("1 are in shards of which something waits or runs")
    assert run.done("video", 0, [key]) == {key}


def test_each_take_has_a_seed_of_its_own_and_the_first_the_runs() -> None:
    seeds = [item_seed(take_seed(2025, "id001/prompt1", take), "id001/prompt1", "video") for take in (1, 2, 3)]
    assert seeds[0] == item_seed(2025, "id001/prompt1", "video") and len(set(seeds)) == 3
