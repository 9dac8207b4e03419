"""What is known of one run or two -> one HTML page that needs nothing but itself and the videos beside it.

Identities, prompts and reasons are untrusted: in markup Jinja escapes them, in scripts `safe_json` does, and the page's own
script makes text of them, never markup. Knows neither run folders nor records.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ipt2v.records import reason_kind
from ipt2v.table import LABELS, Line

PICTURES_IN_A_BLOCK = 64  # the page's script opens a block when it first needs one of its pictures
NUM_BINS = 16
PLOT_WIDTH, PLOT_HEIGHT = 160, 44
METRIC_LABELS: dict[str, str] = {str(metric): label for metric, label in LABELS.items()}
STAGE_LABELS = {"first_frame": "first frame", "video": "video", "score": "score"}
NO_SCRIPT_ENDS_HERE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a run has of one item. Pictures are JPEG files, empty where there is none; so are texts."""

    prompt: str  # the test set's
    spatial_prompt: str = ""
    temporal_prompt: str = ""
    notes: tuple[str, ...] = ()
    reference: bytes = b""
    cutout: bytes = b""
    first_frame: bytes = b""
    still: bytes = b""
    video: str = ""  # URL, relative to the page
    failure: str = ""
    troubles: tuple[str, ...] = ()  # what there is, and cannot be read
    scores: Mapping[str, float | None] = field(default_factory=dict)
    no_score: Mapping[str, str] = field(default_factory=dict)  # metric -> why there is no value
    seconds: Mapping[str, float] = field(default_factory=dict)  # stage -> time that it took
    similarity: float | None = None  # of the first frame to the reference
    num_attempts: int = 0
    rejected: bool = False  # by the run's rules


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """How far a stage is, and what its records say that it took."""

    stage: str
    done: int
    failed: int
    missing: int
    seconds: float  # of all its items
    gpu_hours: float
    cpu_rank_hours: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What holds for all items of a run."""

    name: str
    digest: str
    code_version: str
    frozen: str  # UTC, ISO 8601
    last_record: str  # likewise; empty if there is none
    num_frames: int
    width: int
    height: int
    fps: int
    is_toy: bool
    is_rehearsal: bool
    stages: tuple[StageFacts, ...]
    problems: tuple[str, ...]  # files of the whole run that cannot be read


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A run on the page: key -> what it has of the item, in the order of the page."""

    facts: RunFacts
    cards: Mapping[str, Card]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """One run, or two to compare; and their scores as a table, empty if there are none."""

    runs: tuple[Shown, ...]
    table: tuple[Line, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Items that failed alike."""

    run: int
    stage: str
    reason: str  # of the first
    items: tuple[tuple[int, str], ...]  # place on the page, key


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar of a plot, in its own units."""

    run: int
    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A histogram; of two runs the bars stand side by side."""

    label: str
    low: str
    high: str
    medians: tuple[str, ...]  # of each run
    bars: tuple[Bar, ...]


def render(page: Page) -> str:
    """The page's text."""
    keys = all_keys(page.runs)
    pictures: dict[bytes, int] = {}
    items = [_item(key, [run.cards.get(key) for run in page.runs], pictures) for key in keys]
    metrics = _metrics(page.runs)
    data = {
        "runs": [{"name": one.facts.name, "width": one.facts.width, "height": one.facts.height} for one in page.runs],
        "metrics": [{"name": metric, "label": METRIC_LABELS.get(metric, metric)} for metric in metrics],
        "stages": [{"name": name, "label": label} for name, label in STAGE_LABELS.items() if _times(page.runs, name)],
        "items": items,
        "pictures_in_a_block": PICTURES_IN_A_BLOCK,
    }
    script, styles = _template("report.js"), _template("report.css")
    template = Environment(loader=PackageLoader("ipt2v"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return template.get_template("report.html").render(
        runs=[run.facts for run in page.runs],
        num_items=len(keys),
        num_shared=sum(all(key in run.cards for run in page.runs) for key in keys),
        table=page.table,
        labels=METRIC_LABELS,
        stage_labels=STAGE_LABELS,
        hours=_hours,
        plots=_plots(page.runs, metrics),
        groups=_groups(page.runs, {key: place for place, key in enumerate(keys)}),
        data=Markup(safe_json(data)),
        picture_blocks=[Markup(safe_json(block)) for block in _blocks(list(pictures))],
        styles=Markup(styles),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        plot_size=(PLOT_WIDTH, PLOT_HEIGHT),
    )


def safe_json(value: object) -> str:
    """JSON in ASCII that no HTML parser sees an end of script, a comment or an entity in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: NO_SCRIPT_ENDS_HERE[found[0]], text)


def all_keys(runs: Sequence[Shown]) -> list[str]:
    """Keys of the first run in their order, then those that only the second one has."""
    return list(dict.fromkeys(key for run in runs for key in run.cards))


def _template(name: str) -> str:
    return files("ipt2v").joinpath("templates", name).read_text(encoding="utf-8")


def _item(key: str, cards: Sequence[Card | None], pictures: dict[bytes, int]) -> dict[str, object]:
    """An item as the page's script reads it. Pictures are numbered, equal ones once: prompts of a person share the photo."""
    return {
        "key": key,
        "identity": key.partition("/")[0],
        "takes": [None if card is None else _card(card, pictures) for card in cards],
    }


def _card(card: Card, pictures: dict[bytes, int]) -> dict[str, object]:
    named = {name: getattr(card, name) for name in ("reference", "cutout", "first_frame", "still")}
    return {
        "prompt": card.prompt,
        "spatial": card.spatial_prompt,
        "temporal": card.temporal_prompt,
        "notes": card.notes,
        "pictures": {name: pictures.setdefault(data, len(pictures)) for name, data in named.items() if data},
        "video": card.video,
        "failure": card.failure,
        "troubles": card.troubles,
        "scores": {metric: _finite(value) for metric, value in card.scores.items()},
        "no_score": dict(card.no_score),
        "seconds": {stage: _finite(seconds) for stage, seconds in card.seconds.items()},
        "similarity": _finite(card.similarity),
        "attempts": card.num_attempts,
        "rejected": card.rejected,
    }


def _finite(value: float | None) -> float | None:
    """JSON has no word for the others."""
    return None if value is None or not math.isfinite(value) else round(value, 6)


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2g}"


def _blocks(pictures: Sequence[bytes]) -> Iterable[list[str]]:
    for first in range(0, len(pictures), PICTURES_IN_A_BLOCK):
        yield [base64.b64encode(data).decode() for data in pictures[first : first + PICTURES_IN_A_BLOCK]]


def _metrics(runs: Sequence[Shown]) -> list[str]:
    """The metrics that any item has a row of, in the order of the table; strangers last."""
    found = {metric for run in runs for card in run.cards.values() for metric in card.scores}
    known = [metric for metric in METRIC_LABELS if metric in found]
    return known + sorted(found.difference(known))


def _groups(runs: Sequence[Shown], places: Mapping[str, int]) -> list[Group]:
    """What failed, and what cannot be read, by run, stage and kind of reason; the largest groups first."""
    found: dict[tuple[int, str, str], list[tuple[str, str]]] = {}
    for number, run in enumerate(runs):
        for key, card in run.cards.items():
            stage, _, reason = card.failure.partition(": ")
            reasons = [(stage, reason)] if card.failure else []
            for where, why in [*reasons, *(("unreadable", trouble) for trouble in card.troubles)]:
                found.setdefault((number, where, reason_kind(why, key)), []).append((key, why))
    groups = [
        Group(run=number, stage=stage, reason=alike[0][1], items=tuple((places[key], key) for key, _ in alike))
        for (number, stage, _), alike in found.items()
    ]
    return sorted(groups, key=lambda group: (group.run, -len(group.items)))


def _plots(runs: Sequence[Shown], metrics: Sequence[str]) -> list[Plot]:
    scores = {METRIC_LABELS.get(metric, metric): _scores(runs, metric) for metric in metrics}
    times = {f"{label}, s": _times(runs, stage) for stage, label in STAGE_LABELS.items()}
    return [plot for label, values in (scores | times).items() if (plot := make_plot(label, values))]


def _scores(runs: Sequence[Shown], metric: str) -> list[list[float]]:
    found = [[_finite(card.scores.get(metric)) for card in run.cards.values()] for run in runs]
    return [[value for value in values if value is not None] for values in found]


def _times(runs: Sequence[Shown], stage: str) -> list[list[float]]:
    """Seconds of the items of each run; empty if no item of any run has them."""
    found = [[card.seconds[stage] for card in run.cards.values() if stage in card.seconds] for run in runs]
    return found if any(found) else []


def make_plot(label: str, values: Sequence[Sequence[float]]) -> Plot | None:
    """Histograms of each run's values over one axis; None if there are no values."""
    together = [value for mine in values for value in mine]
    if not together:
        return None
    low, high = min(together), max(together)
    margin = 0.0 if high > low else max(abs(high), 1.0) / 2
    counts_RB = [np.histogram(mine, bins=NUM_BINS, range=(low - margin, high + margin))[0] for mine in values]
    edges = np.linspace(low - margin, high + margin, NUM_BINS + 1)
    highest = max(int(counts_B.max()) for counts_B in counts_RB)
    step = PLOT_WIDTH / NUM_BINS
    width = (step - 1) / len(values)
    bars = [
        Bar(
            run=run,
            x=round(place * step + run * width, 2),
            y=round(PLOT_HEIGHT * (1 - count / highest), 2),
            width=round(width, 2),
            height=round(PLOT_HEIGHT * count / highest, 2),
            text=f"{count} from {edges[place]:.4g} to {edges[place + 1]:.4g}",
        )
        for run, counts_B in enumerate(counts_RB)
        for place, count in enumerate(counts_B.tolist())
        if count
    ]
    medians = tuple(f"{statistics.median(mine):.3g}" if mine else "" for mine in values)
    return Plot(label=label, low=f"{low:.3g}", high=f"{high:.3g}", medians=medians, bars=tuple(bars))
