"""`submit --rejected`: videos that are not good enough are put beside, so that what is submitted next makes others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from ipt2v.run_dir import RunDir
from ipt2v.takes import Rejected, make_room, rejected
from launch.evidence import find_shard


def reject(run: RunDir, busy: Collection[int]) -> list[str]:
    """Make room for another take of each rejected item that may have one; what was done, a line for each kind.

    `busy` are shards of which something waits or runs: their items are left alone. Raises ValueError for a run without rules.
    """
    scoring, found = run.scoring(), rejected(run)
    max_takes = 1 if scoring is None else scoring.config.accept.max_takes
    shards = {one.key: find_shard(run, one.key) for one in found}
    again = [one for one in found if one.num_takes < max_takes and shards[one.key] not in busy]
    for shard in sorted({shards[one.key] for one in again}):
        make_room(run, shard, [one.key for one in again if shards[one.key] == shard])
    lines = [f"{len(found)} videos are rejected, {len(again)} are made again with another seed", *reason_lines(found)]
    if used_up := sum(one.num_takes >= max_takes for one in found):
        lines.append(f"{used_up} have had {max_takes} takes (score.accept.max_takes): the best of them is delivered")
    if waiting := len(found) - len(again) - used_up:
        lines.append(f"{waiting} are in shards of which something waits or runs: submit again when that is over")
    return lines


def reason_lines(found: Collection[Rejected]) -> list[str]:
    """How many miss which rule."""
    counts = Counter(reason.split(" ")[0] for one in found for reason in one.reasons)
    return [f"  {metric}: {number}, for example {_example(found, metric)}" for metric, number in counts.most_common()]


def _example(found: Collection[Rejected], metric: str) -> str:
    return next(f"{one.key}: {reason}" for one in found for reason in one.reasons if reason.startswith(f"{metric} "))
