"""Rules on scores: what is rejected gets another take, nothing is lost, and the best of all takes is delivered."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from helpers import first_frame, frozen_run, noise_frames, provenance, video_latents

from ipt2v import hdf5
from ipt2v.config import AcceptConfig, ScoreConfig, Scoring
from ipt2v.mp4 import write_mp4
from ipt2v.records import Score, item_seed, take_seed
from ipt2v.run_dir import RunDir, seal_shard
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
    digest, store = run.environment().run_digest, run.scores()
    assert store is not None
    take = 1 + run.numbers_of_takes([key]).get(key, 0)
    record = first_frame(key, similarity=0.5 + take / 100)
    hdf5.save_first_frame(run.part_path("first_frame", key), record, provenance(digest))
    hdf5.save_video_latents(run.part_path("video", key), video_latents(key), provenance(digest))
    write_mp4(run.mp4_path(key), noise_frames(5, seed=seed), fps=16, crf=30)
    store.finish(key, rows(key, **values))
    return run.mp4_path(key).read_bytes()


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


def test_a_death_in_between_costs_no_take(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    key = run.shard_keys(0)[0]
    made = deliver(run, 0, key, arc_sim=0.1)

    def die(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", die)
        make_room(run, 0, [key])
    make_room(run, 0, [key])
    assert [path.name for path in run.takes_path(key).iterdir()] == ["1"]
    assert best_takes(run, 0, [key])[key].mp4.read_bytes() == made
    assert run.done("video", 0, [key]) == set()


def test_items_of_shards_in_the_queue_are_left_alone(run: RunDir) -> None:
    key = run.shard_keys(0)[0]
    deliver(run, 0, key, arc_sim=0.1)
    assert reject(run, busy={0})[-1].startswith("1 are in shards of which something waits or runs")
    assert run.done("video", 0, [key]) == {key}


def test_each_take_has_a_seed_of_its_own_and_the_first_the_runs() -> None:
    seeds = [item_seed(take_seed(2025, "id001/prompt1", take), "id001/prompt1", "video") for take in (1, 2, 3)]
    assert seeds[0] == item_seed(2025, "id001/prompt1", "video") and len(set(seeds)) == 3
