"""Where scores lie: rows (item, metric) in CSV files, one for each item until its shard is whole, then one for the shard.

A run may be scored anew with other metrics or other weights: each way has a folder of its own, named by a digest.
Knows no metric.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

from ipt2v.atomic import write_text
from ipt2v.listing import existing
from ipt2v.records import Score

_COLUMNS = tuple(field.name for field in fields(Score))
SHA256_DIGITS = 64


@dataclass(frozen=True, slots=True)
class ScoreDir:
    """The scores of a run in one way; every path below `folder` is a method of this class."""

    folder: Path

    def part_path(self, key: str) -> Path:
        """All scores of one item."""
        return self.folder / "parts" / f"{key}.csv"

    def begun_path(self, key: str) -> Path:
        """Some scores of one item, of an element that was interrupted or is at it."""
        return self.folder / "begun" / f"{key}.csv"

    def sealed_path(self, shard: int) -> Path:
        return self.folder / f"{shard:03d}.csv"

    def done(self, shard: int, keys: Collection[str]) -> set[str]:
        """Which of a shard's keys have all their scores."""
        sealed = scored_keys(self.sealed_path(shard)).intersection(keys)
        return sealed | existing(self.folder / "parts", set(keys) - sealed, ".csv")

    def rows(self, shard: int, keys: Collection[str]) -> list[Score]:
        """Every row of a shard's keys that have all their scores, in order of key and of what was measured first."""
        rows = [row for row in read_scores(self.sealed_path(shard)) if row.key in set(keys)]
        missing = set(keys) - {row.key for row in rows}
        for key in sorted(existing(self.folder / "parts", missing, ".csv")):
            rows += read_scores(self.part_path(key))
        return sorted(rows, key=lambda row: row.key)

    def finish(self, key: str, rows: Iterable[Score]) -> None:
        """These are all scores of an item."""
        write_scores(self.part_path(key), rows)
        self.begun_path(key).unlink(missing_ok=True)

    def seal(self, shard: int, keys: Collection[str]) -> None:
        """Merge the items' files of a shard into one and drop them; a shard without such files is left alone."""
        parts = existing(self.folder / "parts", keys, ".csv")
        if parts:
            write_scores(self.sealed_path(shard), self.rows(shard, keys))
        for key in parts:
            self.part_path(key).unlink(missing_ok=True)

    def forget(self, shard: int, keys: Collection[str]) -> None:
        """Drop the scores of videos that are not there any more."""
        rows = read_scores(self.sealed_path(shard))
        if left := [row for row in rows if row.key not in set(keys)]:
            write_scores(self.sealed_path(shard), left)
        elif rows:
            self.sealed_path(shard).unlink(missing_ok=True)
        for key in keys:
            self.part_path(key).unlink(missing_ok=True)
            self.begun_path(key).unlink(missing_ok=True)


def write_scores(path: Path, rows: Iterable[Score]) -> None:
    """A CSV file with a header; an empty value is one that does not exist, floats are read back as they were."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(asdict(row))
    write_text(path, text.getvalue())


def read_scores(path: Path) -> list[Score]:
    """The rows of a file; none if there is no file. Raises ValueError, naming it, if it is no table of scores."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    try:
        return [_score(row) for row in csv.DictReader(io.StringIO(text), strict=True)]
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no table of scores ({error!r}); delete it and submit again to score anew") from error


def scored_keys(path: Path) -> set[str]:
    """Whose scores a file has; none if there is no file. Only looks at the first column: status asks often."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {row[0] for row in islice(csv.reader(file), 1, None) if row}
    except FileNotFoundError:
        return set()


def _score(row: dict[str, str]) -> Score:
    if set(row) != set(_COLUMNS):
        raise ValueError(f"found columns {', '.join(map(str, row))}, expected {', '.join(_COLUMNS)}")
    value = float(row["value"]) if row["value"] else None
    texts = {name: row[name] for name in ("key", "metric", "device", "created", "video_sha256", "scorer")}
    if len(row["video_sha256"]) != SHA256_DIGITS:
        raise ValueError(f"found sha256 {row['video_sha256']!r}, expected {SHA256_DIGITS} hex digits")
    if value is not None and not math.isfinite(value):  # written before such values were refused
        return Score(**texts, value=None, reason=f"found {value}, expected a number", seconds=float(row["seconds"]))
    return Score(**texts, value=value, reason=row["reason"] or None, seconds=float(row["seconds"]))
