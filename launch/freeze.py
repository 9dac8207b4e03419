"""A config, a test set and weights -> a run folder that jobs can rely on. Written once; submitting again finds it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from ipt2v.atomic import write_text
from ipt2v.config import RunConfig, Scoring, dump_settings, run_digest
from ipt2v.manifest import dumps_manifest, manifest_digest, of_some_identities, shard_by_identity
from ipt2v.models.catalogue import check_weights, fingerprints, score_fingerprints
from ipt2v.prompts import read_template
from ipt2v.records import Item
from ipt2v.run_dir import STAGES, Environment, RunDir, StageCount
from ipt2v.testsets import detect_format, read_testset
from ipt2v.version import code_version, package_versions

DEFAULT_MAX_SHARDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run, decided but not yet written."""

    run: RunDir
    config: RunConfig
    environment: Environment
    shards: tuple[tuple[Item, ...], ...]
    scoring: Scoring | None

    def counts(self) -> list[StageCount]:
        """Progress of every stage of every shard; nothing is done where the run folder is not there."""
        keys = [[item.key for item in items] for items in self.shards]
        stages = STAGES if self.scoring else STAGES[:-1]
        return [self.run.count(stage, shard, mine, self.scoring) for stage in stages for shard, mine in enumerate(keys)]


def prepare(config: RunConfig, *, weights_dir: Path, runs_dir: Path, num_shards: int | None = None) -> Prepared:
    """Read test set and weights, and decide the run's folder and shards. Writes nothing.

    A run that is there keeps its shards, but follows weights that were moved. Raises ValueError if the test set or the weights
    are not whole, or the run is there with another number of shards than asked for.
    """
    config = _with_absolute_testset(with_templates(config))
    testset = Path(config.testset.path)
    items = of_some_identities(read_testset(testset, config.testset.format), config.testset.identities)
    check_weights(weights_dir, config)
    weights = fingerprints(weights_dir, config)
    digest = run_digest(config, manifest_digest=manifest_digest(items), weights=weights)
    run = RunDir(runs_dir.absolute() / run_name(config, digest))
    scoring = _scoring(weights_dir, config)
    if run.root.exists():
        _check_same(run, digest, num_shards)
        environment = run.environment()
        if not config.rehearsal.enabled:  # that reads no weights
            environment = replace(environment, weights_dir=str(weights_dir.absolute()))
        frozen = tuple(map(run.shard, range(environment.num_shards)))
        known = run.config().model_copy(update={"score": config.score})
        return Prepared(run=run, config=known, environment=environment, shards=frozen, scoring=scoring)
    shards = shard_by_identity(items, num_shards or default_num_shards(items))
    environment = Environment(
        run_digest=digest,
        manifest_digest=manifest_digest(items),
        weights_dir=str(weights_dir.absolute()),
        weights=weights,
        testset_format=detect_format(testset) if config.testset.format == "auto" else config.testset.format,
        num_shards=len(shards),
        code_version=code_version(),
        packages=package_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Prepared(run=run, config=config, environment=environment, shards=shards, scoring=scoring)


def _scoring(weights_dir: Path, config: RunConfig) -> Scoring | None:
    if not config.score.metrics:
        return None
    if "motion_amplitude" in config.score.metrics and find_spec("cv2") is None:
        raise ValueError("score.metrics: motion_amplitude needs OpenCV: pip install 'ipt2v[score]', or leave it out")
    return Scoring(config=config.score, weights=score_fingerprints(weights_dir, config))


def freeze(prepared: Prepared) -> RunDir:
    """The run folder, written now or found, and what is measured of it, which may have changed since."""
    run = _freeze_run(prepared)
    environment, weights_dir = run.environment(), prepared.environment.weights_dir
    if environment.weights_dir != weights_dir:  # moved since: the same by their fingerprints
        _write_environment(run, replace(environment, weights_dir=weights_dir))
    if prepared.scoring != run.scoring():
        config = run.config().model_copy(update={"score": prepared.config.score})
        write_text(run.config_path, dump_settings(config))
        if prepared.scoring is None:
            run.scoring_path.unlink()
        else:
            run.save_scoring(prepared.scoring)
    return run


def _freeze_run(prepared: Prepared) -> RunDir:
    """All files are made in a scratch folder that is renamed into place."""
    run = prepared.run
    if run.root.exists():
        return run
    run.root.parent.mkdir(parents=True, exist_ok=True)
    scratch = RunDir(Path(tempfile.mkdtemp(prefix=f".{run.root.name}.", dir=run.root.parent)))
    try:
        scratch.root.chmod(0o755)  # mkdtemp's 0700 would shut out the other users of a lab
        write_text(scratch.config_path, dump_settings(prepared.config))
        write_text(scratch.manifest_path, dumps_manifest(item for items in prepared.shards for item in items))
        for shard, items in enumerate(prepared.shards):
            write_text(scratch.shard_path(shard), dumps_manifest(items))
        _write_environment(scratch, prepared.environment)
        os.rename(scratch.root, run.root)
    except OSError:
        shutil.rmtree(scratch.root, ignore_errors=True)
        if not run.root.exists():  # else another submitter of the same run was first
            raise
        _check_same(run, prepared.environment.run_digest, len(prepared.shards))
    return run


def _write_environment(run: RunDir, environment: Environment) -> None:
    write_text(run.environment_path, json.dumps(asdict(environment), indent=1) + "\n")


def with_templates(config: RunConfig) -> RunConfig:
    """The config with its templates' text in place of their names, so that the digest covers what the LLM is told."""
    texts = {name: read_template(getattr(config.decouple, name)) for name in ("spatial_template", "temporal_template")}
    return config.model_copy(update={"decouple": config.decouple.model_copy(update=texts)})


def _with_absolute_testset(config: RunConfig) -> RunConfig:
    """The frozen settings are submitted again, from whatever folder."""
    path = str(Path(config.testset.path).absolute())
    return config.model_copy(update={"testset": config.testset.model_copy(update={"path": path})})


def run_name(config: RunConfig, digest: str) -> str:
    """The name of a run's folder, by which alone a submission finds it again."""
    name = f"{config.name}-rehearsal" if config.rehearsal.enabled else config.name
    return f"{name}-{digest[:8]}"


def default_num_shards(items: tuple[Item, ...]) -> int:
    return min(DEFAULT_MAX_SHARDS, len({item.identity for item in items}))


def _check_same(run: RunDir, digest: str, num_shards: int | None) -> None:
    environment = run.environment()
    if environment.run_digest != digest:
        raise ValueError(
            f"{run.root}: holds run {environment.run_digest[:12]}, expected {digest[:12]}; choose another name or runs folder"
        )
    if num_shards is not None and environment.num_shards != num_shards:
        raise ValueError(
            f"{run.root}: frozen with {environment.num_shards} shards, asked for {num_shards}; "
            "drop --shards to go on with it, or give another --runs folder"
        )
