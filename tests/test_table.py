"""Claims about the table of scores: means, intervals, differences, the paper's rows."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Call
from helpers import ROOT, frozen_run

from ipt2v.atomic import write_text
from ipt2v.config import AcceptConfig, RunConfig, ScoreConfig, Scoring, load_settings
from ipt2v.records import Score
from ipt2v.score_dir import write_scores
from ipt2v.table import PAPER_ROWS, Line, Scored, as_csv, as_json, as_markdown, interval, make_table, scored

CONFIGS = ROOT / "configs"


def run_of(name: str, config: str, **values: dict[str, float | None]) -> Scored:
    settings = load_settings(RunConfig, CONFIGS / config)
    scorers = dict.fromkeys(values, "0123456789ab")
    return Scored(name=name, config=settings, values=values, scorers=scorers)  # type: ignore[arg-type]


def line_of(lines: list[Line], label: str) -> dict[str, float | None]:
    return {cell.metric: cell.mean for line in lines if line.label == label for cell in line.cells}


def test_a_mean_counts_each_video_the_same_and_leaves_out_what_has_no_score() -> None:
    run = run_of("one", "table1/r2v.yaml", arc_sim={"a/1": 0.5, "a/2": 0.1, "b/1": 0.3, "b/2": None})
    (cell,) = make_table([run])[0].cells
    assert (cell.mean, cell.num_values, cell.num_nulls) == (pytest.approx(0.3), 3, 1)


def test_a_difference_is_of_the_items_that_both_have() -> None:
    first = run_of("one", "table1/r2v.yaml", oc={"a/1": 0.5, "a/2": 0.1, "b/1": 0.9, "c/1": None})
    other = run_of("two", "table1/t2i_i2v.yaml", oc={"a/1": 0.75, "a/2": 0.25, "c/1": 0.3, "d/1": 0.0})
    (cell,) = make_table([first, other])[-1].cells
    assert (cell.mean, cell.num_values, cell.num_nulls) == (pytest.approx(0.2), 2, 1)


def test_there_is_no_difference_between_what_other_weights_have_measured() -> None:
    first, other = (run_of(name, "table1/r2v.yaml", oc={"a/1": 0.5}) for name in ("one", "two"))
    other = replace(other, scorers={"oc": "another"})
    assert make_table([first, other])[-1].cells[0].mean is None


def row_of(key: str, metric: str, value: float, scorer: str, created: str) -> Score:
    values = {"key": key, "metric": metric, "value": value, "scorer": scorer, "created": created}
    return Score(**values, reason=None, seconds=1.0, device="cpu", video_sha256="0" * 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("kept_key", ["id001/prompt1", "id002/prompt2"])  # the first row, or the last
def test_what_an_older_scorer_has_measured_of_a_kept_take_is_no_value(tmp_path: Path, kept_key: str) -> None:
    run = frozen_run(tmp_path)
    run.save_scoring(Scoring(config=ScoreConfig(metrics=("dd",), accept=AcceptConfig(at_least={"dd": 0.9})), weights={}))
    store, take = run.scores(), run.takes_path(kept_key) / "1"
    assert store is not None
    write_scores(take / "scores.csv", [row_of(kept_key, "dd", 0.5, "old", "2025")])
    for item in run.manifest():
        write_text(run.mp4_path(item.key), "a video")
        store.finish(item.key, [row_of(item.key, "dd", 0.25, "new", "2026")])
    found = scored(run)
    assert found.scorers == {"dd": "new"}
    assert found.values["dd"] == {item.key: None if item.key == kept_key else 0.25 for item in run.manifest()}


def test_a_run_that_has_kept_takes_alone_has_their_scores(tmp_path: Path) -> None:
    run = frozen_run(tmp_path)
    run.save_scoring(Scoring(config=ScoreConfig(metrics=("dd",)), weights={}))
    for key, scorer, year in (("id001/prompt1", "new", "2026"), ("id002/prompt1", "old", "2025")):
        write_scores(run.takes_path(key) / "1" / "scores.csv", [row_of(key, "dd", 0.5, scorer, year)])
    found = scored(run)
    assert (found.scorers, found.values["dd"]) == ({"dd": "new"}, {"id001/prompt1": 0.5, "id002/prompt1": None})


def test_what_has_had_all_its_takes_is_not_said_to_be_made_again(tmp_path: Path, ipt2v: Call) -> None:
    run, rules = frozen_run(tmp_path), AcceptConfig(at_least={"dd": 0.9}, max_takes=2)
    run.save_scoring(Scoring(config=ScoreConfig(metrics=("dd",), accept=rules), weights={}))
    store, used_up = run.scores(), "id001/prompt1"
    assert store is not None
    for item in run.manifest()[:2]:
        write_text(run.mp4_path(item.key), "a video")
        store.finish(item.key, [row_of(item.key, "dd", 0.25, "new", "2026")])
    write_scores(run.takes_path(used_up) / "1" / "scores.csv", [row_of(used_up, "dd", 0.5, "new", "2025")])
    found = scored(run)
    assert (found.num_rejected, found.num_used_up) == (2, 1)
    text = ipt2v("table", run.root).out
    assert f"{run.root.name}: 1 videos are rejected; `ipt2v submit CONFIG --rejected` makes them again\n" in text
    told = "1 videos are rejected and have had all takes (score.accept.max_takes): the best of them is delivered"
    assert f"{run.root.name}: {told}\n" in text
    run.save_scoring(Scoring(config=ScoreConfig(metrics=("dd",), accept=rules.model_copy(update={"max_takes": 1})), weights={}))
    assert "makes them again" not in ipt2v("table", run.root).out


def test_an_interval_is_over_people() -> None:
    """A hundred videos of each of two people say no more about people than one of each does."""
    few = {"a/1": 0.0, "b/1": 1.0}
    many = {f"{person}/{number}": value for person, value in (("a", 0.0), ("b", 1.0)) for number in range(100)}
    assert interval(few) == interval(many) == (0.0, 1.0)
    assert interval({"a/1": 0.0, "a/2": 1.0}) == (None, None)


def test_an_interval_of_many_people_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(0.25, 0.1, 400)
    low, high = interval({f"p{index}/1": float(value) for index, value in enumerate(values)})
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("table1/r2v.yaml", {"paper, Table 1: R2V": 0.238}),
        ("table1/t2i_i2v.yaml", {"paper, Table 1: T2I→I2V": 0.262, "paper, Table 2: VACE-14B, refined": 0.246}),
        ("table2/vace_14b_raw.yaml", {"paper, Table 2: VACE-14B, raw": 0.208}),
        ("table2/vace_1.3b_raw.yaml", {"paper, Table 2: Wan-1.3B, raw": 0.166}),
        ("table2/vace_1.3b_refined.yaml", {"paper, Table 2: Wan-1.3B, refined": 0.198}),
    ],
)
def test_beside_a_run_stands_what_the_paper_has_for_it(config: str, expected: dict[str, float]) -> None:
    lines = make_table([run_of("one", config, arc_sim={"a/1": 0.5})])
    assert {line.label: line.cells[0].mean for line in lines if line.kind == "paper"} == expected


def test_the_papers_baseline_gains_what_the_paper_says() -> None:
    """Section 4.3: Arc-Sim 10.1 % and dynamic degree 53.6 % above reference-to-video's."""
    r2v, ours = PAPER_ROWS[:2]
    assert ours.values[0] / r2v.values[0] == pytest.approx(1.101, abs=5e-4)
    assert ours.values[5] / r2v.values[5] == pytest.approx(1.536, abs=5e-4)


def test_vbenchs_normalised_columns_are_scaled_in_every_line() -> None:
    first = run_of("one", "table1/r2v.yaml", ms={"a/1": 0.9975, "b/1": 0.7060}, arc_sim={"a/1": 0.4})
    other = run_of("two", "table1/t2i_i2v.yaml", ms={"a/1": 0.7060, "b/1": 0.7060})
    lines = make_table([first, other], normalised=True)
    assert line_of(lines, "one") == {"ms": pytest.approx(0.5), "arc_sim": 0.4}
    assert line_of(lines, "two − one")["ms"] == pytest.approx(-0.5)
    assert line_of(lines, "paper, Table 1: R2V")["ms"] == pytest.approx((0.984 - 0.706) / 0.2915)


def test_markdown_is_a_table_that_names_what_is_missing() -> None:
    run = run_of("a|b", "table1/r2v.yaml", arc_sim={"a/1": 0.25, "b/1": None}, dd={"a/1": None})
    header, rule, first, paper, *_ = as_markdown(make_table([run])).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["", "Arc-Sim↑", "DD↑"]
    assert set(rule) == {"|", "-"} and len(rule) == len(header)
    assert first.replace(" ", "") == "|a\\|b|0.250∅1|∅1|"
    assert paper.replace(" ", "") == "|paper,Table1:R2V|0.238|0.552|"


def test_csv_and_json_hold_every_cell() -> None:
    lines = make_table([run_of("one", "table1/r2v.yaml", arc_sim={"a/1": 0.1 + 0.2, "b/1": None})])
    rows = list(csv.DictReader(io.StringIO(as_csv(lines))))
    assert [(row["label"], row["metric"], float(row["mean"]), row["num_nulls"]) for row in rows] == [
        ("one", "arc_sim", 0.1 + 0.2, "1"),
        ("paper, Table 1: R2V", "arc_sim", 0.238, "0"),
    ]
    assert json.loads(as_json(lines))[0]["cells"][0]["mean"] == 0.1 + 0.2


def test_the_shipped_tables_differ_in_what_they_compare_alone() -> None:
    raw, refined, small_raw, small_refined = (
        load_settings(RunConfig, CONFIGS / "table2" / f"vace_{model}_{prompts}.yaml").model_dump()
        for model in ("14b", "1.3b")
        for prompts in ("raw", "refined")
    )
    for one, other, model in ((raw, refined, "14B"), (small_raw, small_refined, "1.3B")):
        assert (one["decouple"].pop("prompts"), other["decouple"].pop("prompts")) == ("raw", "refined")
        assert one["video"]["model"] == other["video"]["model"] == f"Wan2.1-VACE-{model}-diffusers"
        assert {one.pop("name"), other.pop("name")} and one == other
    for one in (raw, small_raw):
        del one["video"]["model"]
    assert raw == small_raw


def test_table_one_compares_pipelines_and_scores_the_papers_six(tmp_path: Path) -> None:
    r2v, ours = (load_settings(RunConfig, CONFIGS / "table1" / name) for name in ("r2v.yaml", "t2i_i2v.yaml"))
    assert (r2v.video.condition, ours.video.condition) == ("reference", "first_frame")
    assert r2v.video.model_copy(update={"condition": "first_frame"}) == ours.video
    assert set(ours.score.metrics) == set(r2v.score.metrics) >= {"arc_sim", "oc", "aq", "iq", "ms", "dd"}
