"""One shard of one stage, opened: what run.py and video_shard.py work on. Knows no scheduler and no models."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from ipt2v import hdf5
from ipt2v.config import RunConfig
from ipt2v.parallel import Group
from ipt2v.records import Item, Made, Provenance
from ipt2v.run_dir import WEIGHTS_DIR_VARIABLE, Environment, RunDir
from ipt2v.version import code_version, package_versions

RecordT = TypeVar("RecordT")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What a shard looks like after run_shard; the same on every rank."""

    done: int
    failed: int
    out_of_time: bool = False  # items were left because the scheduler would have ended the element before them


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A shard's items and settings."""

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

    def load(self, read: Callable[..., RecordT], stage: str, key: str, shard: int | None = None) -> RecordT:
        """What `read` makes of a record of this shard or another, wherever it lies: it may be sealed at this moment.

        Raises KeyError if there is none, UnreadableError if it is damaged, ValueError if another run made it.
        """
        place, digest = (stage, self.shard if shard is None else shard, key), self.environment.run_digest
        try:
            return read(self.run.record_path(*place), key, run_digest=digest)
        except FileNotFoundError:
            return read(self.run.record_path(*place), key, run_digest=digest)

    def recorded(self, stage: str, keys: Collection[str]) -> set[str]:
        """Which of the shard's keys have a record of this run in `stage`, each opened.

        A part that does not open is put aside, and so made again. Raises ValueError for a record of another run.
        """
        paths = self.run.record_paths(stage, self.shard, keys)
        good = set(paths)
        for key, path in paths.items():
            try:
                hdf5.load_provenance(path, key, run_digest=self.environment.run_digest)
            except FileNotFoundError:
                self.load(hdf5.load_provenance, stage, key)
            except hdf5.UnreadableError as error:
                if path != self.run.part_path(stage, key):
                    raise
                aside = path.with_name(f".{path.name}.broken")
                os.replace(path, aside)
                log.warning("%s; kept as %s, its item is made again", error, aside.name)
                good.remove(key)
        return good


def open_work(run: RunDir, stage: str, shard: int) -> Work:
    """Raises ValueError if the run folder has been changed since it was frozen, or has no such shard."""
    config = run.config()
    known = {item.key: item for item in run.manifest()}
    items, environment = run.shard(shard), run.environment()
    strangers = [item.key for item in items if known.get(item.key) != item]
    if strangers:
        raise ValueError(f"{run.shard_path(shard)}: {strangers[0]} is not as in manifest.jsonl; restore the frozen file")
    if code_version() != environment.code_version:
        log.warning("code is %s, the run was frozen with %s; records note it", code_version(), environment.code_version)
    return Work(run=run, config=config, environment=environment, stage=stage, shard=shard, items=items)
