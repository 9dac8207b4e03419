"""Array 3: delivered videos in, scores out; networks are loaded when the first video needs them, once in a process."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from ipt2v.config import Metric, Scoring
from ipt2v.metrics.delivered import Delivered
from ipt2v.metrics.measures import FAMILIES, Family, Measure
from ipt2v.metrics.undefined import Undefined
from ipt2v.models.score_weights import METRIC_ROLES, folder_of
from ipt2v.records import Score

VERSION = 1  # of all formulas: what older ones have measured is measured again

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreStage:
    """What the run measures, and the networks that were needed so far."""

    scoring: Scoring
    weights_dir: Path
    device: torch.device
    families: tuple[Family, ...] = FAMILIES
    _loaded: dict[Family, Measure] = field(default_factory=dict)

    def score(self, key: str, sha256: str, video: Delivered, wanted: Collection[Metric]) -> Iterator[list[Score]]:
        """The wanted scores of a video, as they come, those that are computed together in one list."""
        for family in self.families:
            mine = [metric for metric in wanted if metric in family.metrics]
            if not mine:
                continue
            measure = self._measure(family)
            start = time.monotonic()
            values = measure(video, mine)
            seconds = (time.monotonic() - start) / len(mine)
            yield [self._row(key, sha256, metric, values[metric], seconds) for metric in mine]

    def _measure(self, family: Family) -> Measure:
        if family not in self._loaded:
            start = time.monotonic()
            self._loaded[family] = family.load(self.scoring.config, self.weights_dir, self.device)
            log.info("%s loaded in %.1f s", ", ".join(sorted(family.metrics)), time.monotonic() - start)
        return self._loaded[family]

    def _row(self, key: str, sha256: str, metric: Metric, value: float | Undefined, seconds: float) -> Score:
        if not isinstance(value, Undefined) and not math.isfinite(value):
            value = Undefined(reason=f"found {value}, expected a number")
        return Score(
            key=key,
            metric=metric,
            value=None if isinstance(value, Undefined) else value,
            reason=value.reason if isinstance(value, Undefined) else None,
            seconds=round(seconds, 4),
            device=str(self.device),
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            video_sha256=sha256,
            scorer=scorer_of(metric, self.scoring),
        )


def scorer_of(metric: Metric, scoring: Scoring) -> str:
    """12 hex digits of what a metric is measured by; equal for equal scores of equal videos."""
    weights = {role: scoring.weights.get(folder_of(role, scoring.config)) for role in METRIC_ROLES[metric]}  # a rehearsal: none
    text = json.dumps({"metric": metric, "weights": weights, "version": VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
