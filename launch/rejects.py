"""`submit --rejected`: videos that are not good enough are put beside, so that what is submitted next makes others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from ipt2v.run_dir import RECORDED_STAGES, STAGES, RunDir
from ipt2v.takes import Rejected, half_forgotten, make_room, rejected

AGAIN = "again"
_LEFT_ALONE = {  # fate of a rejected item -> what is said of how many
    "failed": "have failed in their newest take: `ipt2v retry {run} --failed` lets the next submission make it again",
    "unmade": "have another take that is not made yet",
    "unscored": "have another take that waits for its scores",
    "used up": "have had {max_takes} takes (score.accept.max_takes): the best of them is delivered",
    "busy": "are in shards of which something waits or runs: submit again when that is over",
    "no record": "have lost a record of how they were made: submitting makes it anew, reject them after that",
}


def reject(run: RunDir, busy: Collection[int]) -> list[str]:
    """Make room for another take of each rejected item that may have one; what was done, a line for each kind.

    `busy` are shards of which something waits or runs: their items are left alone. Raises ValueError for a run without rules.
    """
    scoring, found = run.scoring(), rejected(run)
    max_takes = 1 if scoring is None else scoring.config.accept.max_takes
    counts: Counter[str] = Counter()
    for shard in sorted({one.shard for one in found}):
        fates = _fates(run, [one for one in found if one.shard == shard], max_takes, shard in busy)
        if again := [key for key, fate in fates.items() if fate == AGAIN]:
            make_room(run, shard, again)
        counts.update(fates.values())
    lines = [f"{len(found)} videos are rejected, {counts[AGAIN]} are made again with another seed", *reason_lines(found)]
    said = {fate: text.format(run=run.root, max_takes=max_takes) for fate, text in _LEFT_ALONE.items()}
    return [*lines, *(f"{counts[fate]} {text}" for fate, text in said.items() if counts[fate])]


def _fates(run: RunDir, found: Sequence[Rejected], max_takes: int, is_busy: bool) -> dict[str, str]:
    """key -> AGAIN, or why the item is left alone; of one shard's items."""
    keys, shard = [one.key for one in found], found[0].shard
    failed = set().union(*(run.failed(stage, keys) for stage in STAGES))
    recorded = set(keys).intersection(*(run.recorded(stage, shard, keys) for stage in RECORDED_STAGES))
    begun = half_forgotten(run, shard, [one.key for one in found if one.present is None])
    fates = {}
    for one in found:
        if one.key in failed:
            fate = "failed"
        elif one.present is None and one.key not in begun:
            fate = "unmade"
        elif one.present is not None and not one.present.rows:
            fate = "unscored"
        elif one.num_takes >= max_takes:
            fate = "used up"
        elif is_busy:
            fate = "busy"
        elif one.key not in recorded | begun:
            fate = "no record"
        else:
            fate = AGAIN
        fates[one.key] = fate
    return fates


def reason_lines(found: Collection[Rejected]) -> list[str]:
    """How many miss which rule."""
    counts = Counter(reason.split(" ")[0] for one in found for reason in one.reasons)
    return [f"  {metric}: {number}, for example {_example(found, metric)}" for metric, number in counts.most_common()]


def _example(found: Collection[Rejected], metric: str) -> str:
    return next(f"{one.key}: {reason}" for one in found for reason in one.reasons if reason.startswith(f"{metric} "))
