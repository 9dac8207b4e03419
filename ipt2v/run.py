"""Make one shard of one stage: the only place where stages, models and files meet. Knows no scheduler."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ipt2v import hdf5
from ipt2v.answers import answer_all
from ipt2v.atomic import write_text
from ipt2v.parallel import Group, group_from_environment
from ipt2v.records import Failure, FirstFrame, Item, Made
from ipt2v.run_dir import STAGES, VERIFY_SPLIT, WEIGHTS_DIR_VARIABLE, RunDir, seal_shard
from ipt2v.score_shard import make_scores
from ipt2v.video_shard import make_videos
from ipt2v.watch import beat, rest
from ipt2v.work import ShardResult, Work, open_work

log = logging.getLogger(__name__)


def run_shard(run_dir: str | Path, stage: str, shard: int) -> ShardResult:
    """Make what is missing of one shard of a stage, and seal it; what is finished is left alone. VERIFY_SPLIT makes a check.

    Called on every rank that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe. Items that cannot be made become failure
    records. Raises ValueError if the run folder, the stage, the shard or the number of ranks cannot be worked with.
    """
    if stage not in _STAGES:
        raise ValueError(f"stage {stage!r} unknown; known: {', '.join(_STAGES)}")
    work = open_work(RunDir(Path(run_dir)), stage, shard)
    beat()
    with group_from_environment() as group:
        if group.is_first and str(work.weights_dir) != work.environment.weights_dir:
            log.info(
                "weights are read from %s (%s), not %s", work.weights_dir, WEIGHTS_DIR_VARIABLE, work.environment.weights_dir
            )
        out_of_time = _STAGES[stage](work, group)
        result = ShardResult(done=0, failed=0, out_of_time=out_of_time)
        if group.is_first and stage in STAGES:
            count = work.run.count(stage, shard, work.keys)
            result = ShardResult(done=count.done, failed=count.failed, out_of_time=out_of_time)
            log.info("%s shard %d: %d done, %d failed", stage, shard, count.done, count.failed)
        result = group.from_first(result)
    rest()
    return result


def _make_first_frames(work: Work, group: Group) -> bool:
    todo = group.from_first(_first_frames_to_make(work) if group.is_first else ())
    if todo:
        _paint(work, group, todo)
    if group.is_first:
        seal_shard(work.run, work.stage, work.shard, work.keys)
    return False


def _paint(work: Work, group: Group, todo: tuple[Item, ...]) -> None:
    for made in _first_frames(work, group, todo):
        beat()
        if isinstance(made, Failure):
            work.run.save_failure(made)
            log.warning("first_frame %s failed: %s", made.key, made.reason)
        else:
            path = work.run.part_path("first_frame", made.record.key)
            hdf5.save_first_frame(path, made.record, work.provenance(made, group))
            log.info("first_frame %s %.1f s", made.record.key, made.seconds)
    group.meet()  # each rank writes the records of its own items: nobody seals before all are there


def _first_frames(work: Work, group: Group, todo: tuple[Item, ...]) -> Iterator[Made[FirstFrame] | Failure]:
    if work.config.rehearsal.enabled:
        from ipt2v.stages import rehearsal

        return rehearsal.make_first_frames(todo, work.config, group)
    from ipt2v.models.quiet import quiet_libraries
    from ipt2v.stages import first_frame

    quiet_libraries()
    remember = partial(answer_all, folder=work.run.answers_path, batch_size=work.config.decouple.batch_size)
    takes = {key: 1 + number for key, number in work.run.numbers_of_takes(work.keys).items()}
    return first_frame.make(todo, work.config, work.weights_dir, group, remember, takes)


def _verify_split(work: Work, group: Group) -> bool:
    paths = group.from_first(work.run.record_paths("first_frame", work.shard, work.keys) if group.is_first else {})
    key = next((key for key in work.keys if key in paths), None)
    if key is None:
        command = f"python -m ipt2v {work.run.root} first_frame {work.shard}"
        raise ValueError(f"shard {work.shard}: no first frame yet; run `{command}`")
    from ipt2v.models.quiet import quiet_libraries
    from ipt2v.stages.verify_split import check_split

    quiet_libraries()
    first_frame = hdf5.load_first_frame(paths[key], key, run_digest=work.environment.run_digest)
    check = check_split(first_frame, work.config, work.weights_dir, group)
    if check is not None:
        write_text(work.run.split_check_path(work.shard), json.dumps(asdict(check), indent=1) + "\n")
    return False


_STAGES = {"first_frame": _make_first_frames, "video": make_videos, "score": make_scores, VERIFY_SPLIT: _verify_split}


def _first_frames_to_make(work: Work) -> tuple[Item, ...]:
    finished = work.recorded("first_frame", work.keys) | work.run.failed("first_frame", work.keys)
    return tuple(item for item in work.items if item.key not in finished)
