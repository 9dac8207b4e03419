"""Scores of runs as a table: means with intervals, differences on equal items, and what the paper reports beside.

Knows no network. The paper is arXiv 2507.04705; its Table 1 is over the test set, Table 2 over 25 identities of it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ipt2v.config import Metric, RunConfig
from ipt2v.records import Score
from ipt2v.run_dir import RunDir
from ipt2v.takes import best_takes, rejected

LABELS: dict[Metric, str] = {
    "arc_sim": "Arc-Sim↑",
    "oc": "OC↑",
    "aq": "AQ↑",
    "iq": "IQ↑",
    "ms": "MS↑",
    "dd": "DD↑",
    "face_rate": "face frames↑",
    "motion_pixels": "motion, px",
    "face_arc": "Face-Arc↑",
    "face_cur": "Face-Cur↑",
    "face_distance": 'face "FID"↓',
    "clip_score": "CLIPScore↑",
    "first_frame_arc_sim": "first-frame Arc-Sim↑",
    "drift": "drift↑",
    "motion_amplitude": "amplitude, px",
}
PAPERS_SIX: tuple[Metric, ...] = ("arc_sim", "oc", "aq", "iq", "ms", "dd")
# VBench scripts/constant.py, NORMALIZE_DIC: least and greatest value; a normalised one is (x - least) / (greatest - least)
VBENCH_RANGES: dict[Metric, tuple[float, float]] = {
    "ms": (0.7060, 0.9975),
    "oc": (0.0, 0.364),
    "dd": (0.0, 1.0),
    "aq": (0.0, 1.0),
    "iq": (0.0, 1.0),
}
NUM_RESAMPLES, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRow:
    """A row of the paper's tables, its six in their order."""

    label: str
    is_14b: bool
    condition: str
    prompts: str | None  # the paper does not say how the baseline was prompted
    values: tuple[float, ...]


PAPER_ROWS = (
    PaperRow(
        label="paper, Table 1: R2V",
        is_14b=True,
        condition="reference",
        prompts=None,
        values=(0.238, 0.202, 0.583, 0.692, 0.984, 0.552),
    ),
    PaperRow(
        label="paper, Table 1: T2I→I2V",
        is_14b=True,
        condition="first_frame",
        prompts="refined",
        values=(0.262, 0.215, 0.588, 0.701, 0.979, 0.848),
    ),
    PaperRow(
        label="paper, Table 2: VACE-14B, raw",
        is_14b=True,
        condition="first_frame",
        prompts="raw",
        values=(0.208, 0.198, 0.579, 0.680, 0.976, 0.776),
    ),
    PaperRow(
        label="paper, Table 2: VACE-14B, refined",
        is_14b=True,
        condition="first_frame",
        prompts="refined",
        values=(0.246, 0.210, 0.586, 0.689, 0.976, 0.812),
    ),
    PaperRow(
        label="paper, Table 2: Wan-1.3B, raw",
        is_14b=False,
        condition="first_frame",
        prompts="raw",
        values=(0.166, 0.190, 0.520, 0.665, 0.964, 0.824),
    ),
    PaperRow(
        label="paper, Table 2: Wan-1.3B, refined",
        is_14b=False,
        condition="first_frame",
        prompts="refined",
        values=(0.198, 0.204, 0.535, 0.679, 0.968, 0.840),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One metric of one run, or of the difference of two."""

    metric: Metric
    mean: float | None  # each video counts the same
    low: float | None  # of the interval that holds the mean in 95 % of samples of identities; None for fewer than two
    high: float | None
    num_values: int
    num_nulls: int  # videos that have no such score


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of the table."""

    label: str
    kind: str  # "run", "difference" or "paper"
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A run's scores: metric -> key -> value, None where there is none."""

    name: str
    config: RunConfig
    values: Mapping[Metric, Mapping[str, float | None]]
    scorers: Mapping[Metric, str]  # digest of what measured
    num_missing: int = 0  # items without scores, yet or for good
    num_rejected: int = 0  # by the run's rules, if it has any
    num_used_up: int = 0  # of these, those that have had all takes that the rules allow


def scored(run: RunDir) -> Scored:
    """Every score of a run's delivered videos. Raises ValueError for a run that is not scored, or not yet."""
    scoring = run.scoring()
    if scoring is None:
        raise ValueError(f"{run.root}: this run is not scored; set score.metrics in its config, and submit again")
    rows, present = list[Score](), list[Score]()
    num_items, store = 0, run.scores()
    for shard in range(run.environment().num_shards):
        keys = run.shard_keys(shard)
        rows += [row for take in best_takes(run, shard, keys).values() for row in take.rows]
        present += [] if store is None else store.rows(shard, keys)
        num_items += len(keys)
    if not rows:
        raise ValueError(f"{run.root}: no scores yet; `ipt2v status {run.root}` says how far it is")
    values: dict[Metric, dict[str, float | None]] = {metric: {} for metric in scoring.config.metrics}
    scorers = _newest_scorers(rows) | _newest_scorers(present)
    for row in rows:
        if row.metric in values:  # an older take may have been measured in another way: its values are not to be compared
            values[row.metric][row.key] = row.value if row.scorer == scorers[row.metric] else None
    accept = scoring.config.accept
    bad = rejected(run) if accept.at_least or accept.at_most else []
    return Scored(
        name=run.root.name,
        config=run.config(),
        values=values,
        scorers=scorers,
        num_missing=num_items - len({row.key for row in rows}),
        num_rejected=len(bad),
        num_used_up=sum(one.num_takes >= accept.max_takes for one in bad),
    )


def _newest_scorers(rows: Iterable[Score]) -> dict[Metric, str]:
    """metric -> what measured it last."""
    return {row.metric: row.scorer for row in sorted(rows, key=lambda row: row.created)}  # type: ignore[misc]


def make_table(runs: Sequence[Scored], *, normalised: bool = False) -> list[Line]:
    """A line for each run, those of the paper that it repeats, and how the later ones differ from the first on equal items.

    `normalised`: VBench's leaderboard form of its five metrics. Columns are the metrics that any run has.
    """
    metrics = tuple(metric for metric in LABELS if any(metric in run.values for run in runs))
    lines = []
    for run in runs:
        values = {metric: _scaled(run.values.get(metric, {}), metric, normalised) for metric in metrics}
        cells = tuple(_cell(metric, values[metric]) for metric in metrics)
        lines.append(Line(label=run.name, kind="run", cells=cells))
        lines += [_paper_line(row, metrics, normalised) for row in PAPER_ROWS if _repeats(run.config, row)]
    for run in runs[1:]:
        cells = tuple(_difference(metric, runs[0], run, normalised) for metric in metrics)
        lines.append(Line(label=f"{run.name} − {runs[0].name}", kind="difference", cells=cells))
    return lines


def _cell(metric: Metric, values: Mapping[str, float | None]) -> Cell:
    known = {key: value for key, value in values.items() if value is not None}
    low, high = interval(known)
    mean = float(np.mean(list(known.values()))) if known else None
    return Cell(metric=metric, mean=mean, low=low, high=high, num_values=len(known), num_nulls=len(values) - len(known))


def _difference(metric: Metric, first: Scored, other: Scored, normalised: bool) -> Cell:
    before, after = (_scaled(run.values.get(metric, {}), metric, normalised) for run in (first, other))
    if first.scorers.get(metric) != other.scorers.get(metric):  # by other weights: a difference would say nothing
        return Cell(metric=metric, mean=None, low=None, high=None, num_values=0, num_nulls=0)
    shared: dict[str, float | None] = {}
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        shared[key] = None if a is None or b is None else b - a
    return _cell(metric, shared)


def _scaled(values: Mapping[str, float | None], metric: Metric, normalised: bool) -> dict[str, float | None]:
    least, greatest = VBENCH_RANGES.get(metric, (0.0, 1.0)) if normalised else (0.0, 1.0)
    return {key: None if value is None else (value - least) / (greatest - least) for key, value in values.items()}


def interval(values: Mapping[str, float]) -> tuple[float | None, float | None]:
    """Where the mean lies in 95 % of samples, drawn with replacement, of as many identities; (None, None) for fewer than two.

    Identities and not videos are drawn: videos of one person resemble each other (Efron & Tibshirani 1993, chapter 13).
    """
    people = sorted({key.partition("/")[0] for key in values})
    if len(people) < 2:
        return None, None
    number = {name: index for index, name in enumerate(people)}
    sums, sizes = np.zeros(len(people)), np.zeros(len(people))
    for key in sorted(values):
        sums[number[key.partition("/")[0]]] += values[key]
        sizes[number[key.partition("/")[0]]] += 1
    drawn_RP: NDArray[np.int64] = np.random.default_rng(0).integers(len(people), size=(NUM_RESAMPLES, len(people)))
    means_R = sums[drawn_RP].sum(1) / sizes[drawn_RP].sum(1)
    low, high = np.quantile(means_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _repeats(config: RunConfig, row: PaperRow) -> bool:
    video, is_14b = config.video, "14b" in config.video.model.lower()
    return (is_14b, video.condition) == (row.is_14b, row.condition) and row.prompts in (None, config.decouple.prompts)


def _paper_line(row: PaperRow, metrics: Iterable[Metric], normalised: bool) -> Line:
    values = dict(zip(PAPERS_SIX, row.values, strict=True))
    cells = []
    for metric in metrics:
        mean = _scaled({"": values.get(metric)}, metric, normalised)[""]
        cells.append(Cell(metric=metric, mean=mean, low=None, high=None, num_values=0, num_nulls=0))
    return Line(label=row.label, kind="paper", cells=tuple(cells))


def as_markdown(lines: Sequence[Line]) -> str:
    """A table in Markdown; under it what the numbers are."""
    header = ["", *(LABELS[cell.metric] for cell in lines[0].cells)]
    rows = [[line.label.replace("|", "\\|"), *(_text(cell, line.kind) for cell in line.cells)] for line in lines]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    text = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in [header, *rows]]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    note = "Mean over videos, in brackets the 95 % interval over identities; ∅: videos without such a score."
    return "\n".join([*text, "", note]) + "\n"


def _text(cell: Cell, kind: str) -> str:
    if cell.mean is None:
        return f"∅{cell.num_nulls}" if cell.num_nulls else ""
    sign = "+" if kind == "difference" else ""
    text = f"{cell.mean:{sign}.3f}"
    if cell.low is not None and cell.high is not None:
        text += f" [{cell.low:{sign}.3f}, {cell.high:{sign}.3f}]"
    return text + (f" ∅{cell.num_nulls}" if cell.num_nulls else "")


def as_csv(lines: Sequence[Line]) -> str:
    """A row for each cell."""
    text = io.StringIO()
    names = ("label", "kind", *Cell.__slots__)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerows({"label": line.label, "kind": line.kind} | asdict(cell) for cell in line.cells)
    return text.getvalue()


def as_json(lines: Sequence[Line]) -> str:
    return json.dumps([asdict(line) for line in lines], indent=1, ensure_ascii=False) + "\n"
