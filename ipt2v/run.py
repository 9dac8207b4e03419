"""Make one shard of one stage: the only place where stages, models and files meet. Knows no scheduler."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipt2v import hdf5
from ipt2v.answers import answer_all
from ipt2v.atomic import write_text
from ipt2v.config import RunConfig
from ipt2v.delivery import Encoder, background_encoder, turns
from ipt2v.mp4 import write_mp4
from ipt2v.parallel import Group, group_from_environment
from ipt2v.records import Failure, Item, Made, Provenance, VideoLatents
from ipt2v.run_dir import STAGES, VERIFY_SPLIT, Environment, RunDir, seal_shard
from ipt2v.version import code_version, package_versions

if TYPE_CHECKING:
    from ipt2v.stages.video import VideoStage

log = logging.getLogger(__name__)

WEIGHTS_DIR_VARIABLE = "IPT2V_WEIGHTS_DIR"  # a folder with a copy of the run's weights, to be read instead of the frozen one


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What a shard looks like after run_shard; the same on every rank."""

    done: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """One shard of one stage, opened."""

    run: RunDir
    config: RunConfig
    environment: Environment
    stage: str
    shard: int
    items: tuple[Item, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(item.key for item in self.items)

    @property
    def weights_dir(self) -> Path:
        return Path(os.environ.get(WEIGHTS_DIR_VARIABLE) or self.environment.weights_dir)

    def provenance(self, made: Made[Any], group: Group) -> Provenance:
        return Provenance(
            run_digest=self.environment.run_digest,
            code_version=code_version(),
            weights=self.environment.weights,
            packages=package_versions(),
            seed=made.seed,
            seconds=made.seconds,
            device=str(group.device),
            num_ranks=group.world_size,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )


def run_shard(run_dir: str | Path, stage: str, shard: int) -> ShardResult:
    """Make what is missing of one shard of a stage, and seal it; what is finished is left alone. VERIFY_SPLIT makes a check.

    Called on every rank that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe. Items that cannot be made become failure
    records. Raises ValueError if the run folder, the stage, the shard or the number of ranks cannot be worked with.
    """
    if stage not in _STAGES:
        raise ValueError(f"stage {stage!r} unknown; known: {', '.join(_STAGES)}")
    work = _open(RunDir(Path(run_dir)), stage, shard)
    with group_from_environment() as group:
        if group.is_first and str(work.weights_dir) != work.environment.weights_dir:
            log.info(
                "weights are read from %s (%s), not %s", work.weights_dir, WEIGHTS_DIR_VARIABLE, work.environment.weights_dir
            )
        _STAGES[stage](work, group)
        result = ShardResult(done=0, failed=0)
        if group.is_first and stage in STAGES:
            seal_shard(work.run, stage, shard, work.keys)
            count = work.run.count(stage, shard, work.keys)
            result = ShardResult(done=count.done, failed=count.failed)
            log.info("%s shard %d: %d done, %d failed", stage, shard, count.done, count.failed)
        return group.from_first(result)


def _quiet_libraries() -> None:
    """No progress bars of loading: in a log file each is a line of carriage returns."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _open(run: RunDir, stage: str, shard: int) -> _Work:
    config = run.config()
    known = {item.key: item for item in run.manifest()}
    items, environment = run.shard(shard), run.environment()
    strangers = [item.key for item in items if known.get(item.key) != item]
    if strangers:
        raise ValueError(f"{run.shard_path(shard)}: {strangers[0]} is not as in manifest.jsonl; restore the frozen file")
    if code_version() != environment.code_version:
        log.warning("code is %s, the run was frozen with %s; records note it", code_version(), environment.code_version)
    return _Work(run=run, config=config, environment=environment, stage=stage, shard=shard, items=items)


def _make_first_frames(work: _Work, group: Group) -> None:
    todo = group.from_first(_first_frames_to_make(work) if group.is_first else ())
    if not todo:
        return
    from ipt2v.stages import first_frame

    _quiet_libraries()
    remember = partial(answer_all, folder=work.run.answers_path, batch_size=work.config.decouple.batch_size)
    for made in first_frame.make(todo, work.config, work.weights_dir, group, remember):
        if isinstance(made, Failure):
            work.run.save_failure(made)
            log.warning("first_frame %s failed: %s", made.key, made.reason)
        else:
            path = work.run.part_path("first_frame", made.record.key)
            hdf5.save_first_frame(path, made.record, work.provenance(made, group))
            log.info("first_frame %s %.1f s", made.record.key, made.seconds)
    group.meet()  # each rank writes the records of its own items: nobody seals before all are there


def _make_videos(work: _Work, group: Group) -> None:
    # Rank 0 decides what is left: another rank may already see the new file and skip it, and the group would hang.
    undecoded, todo = group.from_first(_videos_to_make(work) if group.is_first else ((), ()))
    if not undecoded and not todo:
        return
    from ipt2v.stages import video

    _quiet_libraries()
    with background_encoder(write_mp4, crf=work.config.video.crf) as encoder:
        stage = video.load(work.config, work.weights_dir, group)
        _deliver(_Delivery(work=work, group=group, stage=stage, encoder=encoder), undecoded, todo)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Delivery:
    """What turns first frames into latents and latents into MP4s, on one of the ranks."""

    work: _Work
    group: Group
    stage: VideoStage
    encoder: Encoder

    def own(self, batch: tuple[str, ...]) -> tuple[str, ...]:
        """The video of a batch that this rank decodes, if there is one for it."""
        return batch[self.group.rank : self.group.rank + 1]

    def deliver(self, records: Iterable[VideoLatents]) -> None:
        for latents in records:
            self.encoder.hand_over(self.stage.decode(latents), self.work.run.mp4_path(latents.key))


def _deliver(delivery: _Delivery, undecoded: tuple[str, ...], todo: tuple[str, ...]) -> None:
    _decode_lost(delivery, undecoded)
    _animate(delivery, todo)
    delivery.group.agree(delivery.encoder.drain, OSError)  # nobody seals before all MP4s are there


def _decode_lost(delivery: _Delivery, undecoded: tuple[str, ...]) -> None:
    """Deliver what an earlier run has denoised and no more."""
    work, batches = delivery.work, turns(undecoded, delivery.group.world_size).values()
    keys, digest = [key for batch in batches for key in delivery.own(batch)], work.environment.run_digest
    paths = work.run.record_paths("video", work.shard, keys)
    records = (hdf5.load_video_latents(paths[key], key, run_digest=digest) for key in keys)
    delivery.group.agree(partial(delivery.deliver, records), OSError)


def _animate(delivery: _Delivery, todo: tuple[str, ...]) -> None:
    """Make latents, one video after the other on all ranks; in between each rank decodes one of those that are finished.

    A record is written while the next video is denoised: its fsync may wait for a shared disk, and all ranks with it.
    """
    with ThreadPoolExecutor(1) as writer:
        _animate_and_save(delivery, todo, writer)


def _animate_and_save(delivery: _Delivery, todo: tuple[str, ...], writer: ThreadPoolExecutor) -> None:
    work, group = delivery.work, delivery.group
    paths, batches = work.run.record_paths("first_frame", work.shard, todo), turns(todo, group.world_size)
    first_frames = (hdf5.load_first_frame(paths[key], key, run_digest=work.environment.run_digest) for key in todo)
    finished: dict[str, VideoLatents] = {}
    saves: list[Future[None]] = []
    for made in delivery.stage.make(first_frames):
        key = made.record.key
        finished[key] = made.record
        if group.is_first:
            path = work.run.part_path("video", key)
            saves.append(writer.submit(hdf5.save_video_latents, path, made.record, work.provenance(made, group)))
            log.info("video %s %.1f s", key, made.seconds)
        if key in batches:
            group.agree(partial(_settle, saves), OSError)  # no MP4 before its latents are on the disk
            records = [finished[one] for one in delivery.own(batches[key])]
            group.agree(partial(delivery.deliver, records), OSError)
            finished.clear()


def _settle(saves: list[Future[None]]) -> None:
    """Wait for all of them. Raises what one has raised."""
    while saves:
        saves.pop(0).result()


def _verify_split(work: _Work, group: Group) -> None:
    paths = group.from_first(work.run.record_paths("first_frame", work.shard, work.keys) if group.is_first else {})
    key = next((key for key in work.keys if key in paths), None)
    if key is None:
        command = f"python -m ipt2v {work.run.root} first_frame {work.shard}"
        raise ValueError(f"shard {work.shard}: no first frame yet; run `{command}`")
    from ipt2v.stages.verify_split import check_split

    _quiet_libraries()
    first_frame = hdf5.load_first_frame(paths[key], key, run_digest=work.environment.run_digest)
    check = check_split(first_frame, work.config, work.weights_dir, group)
    if check is not None:
        write_text(work.run.split_check_path(work.shard), json.dumps(asdict(check), indent=1) + "\n")


_STAGES = {"first_frame": _make_first_frames, "video": _make_videos, VERIFY_SPLIT: _verify_split}


def _first_frames_to_make(work: _Work) -> tuple[Item, ...]:
    finished = _recorded(work, "first_frame") | work.run.failed("first_frame", work.keys)
    return tuple(item for item in work.items if item.key not in finished)


def _videos_to_make(work: _Work) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keys with latents but no MP4, keys without either). Raises ValueError if array 1 is not done with the shard."""
    keys = work.keys
    first_frames, failed = _recorded(work, "first_frame"), work.run.failed("first_frame", work.keys)
    early = [key for key in keys if key not in first_frames | failed]
    if early:
        raise ValueError(
            f"video shard {work.shard}: {len(early)} of {len(keys)} first frames are missing ({early[0]}, ...); "
            f"first run `python -m ipt2v {work.run.root} first_frame {work.shard}`"
        )
    recorded, delivered = _recorded(work, "video"), work.run.done("video", work.shard, keys)
    undecoded = tuple(key for key in keys if key in recorded - delivered)
    return undecoded, tuple(key for key in keys if key in first_frames - recorded)


def _recorded(work: _Work, stage: str) -> set[str]:
    """Keys with a record of this run, each opened. Raises ValueError for a record of another run, or one that does not open."""
    paths = work.run.record_paths(stage, work.shard, work.keys)
    for key, path in paths.items():
        hdf5.load_provenance(path, key, run_digest=work.environment.run_digest)
    return set(paths)
