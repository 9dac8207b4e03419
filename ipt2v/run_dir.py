"""Where everything of one run lies, and what of it is done. A file under its final name is complete; there is no other mark.

    config.yaml  manifest.jsonl  environment.json  shards/000.jsonl    frozen, but for where weights lie; jobs read only these
    first_frame/parts/<key>.h5 -> first_frame/000.h5                   one record, sealed when its shard is done
    first_frame/answers/                                               what the LLM said, once for each distinct question
    video/<key>.mp4  video/parts/<key>.h5 -> video/000.h5              the delivered file; latents and provenance beside it
    video/{leases,positions,crashes}/<key>...                          who is at work on it, how far it is, who fell over it
    failure/<stage>/<key>.json                                         an item that cannot be made, and why
    score.json  score/<digest>/parts/<key>.csv -> score/<digest>/000.csv   what is measured; all scores of one item
    takes/<key>/<number>/                                              a video that was rejected, its records and scores
    verify_split/000.json                                              one video on all ranks against one rank
    package/  jobs/<stage>/                                            the leaderboard's zip; submitit's pickles and logs

Knows nothing of torch, models or schedulers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ipt2v import hdf5
from ipt2v.atomic import write_text
from ipt2v.config import RunConfig, ScoreConfig, Scoring, load_settings, parse_settings, run_digest
from ipt2v.leases import free_leases
from ipt2v.listing import existing
from ipt2v.manifest import manifest_digest, read_manifest
from ipt2v.records import Failure, Item
from ipt2v.score_dir import ScoreDir

STAGES = ("first_frame", "video", "score")  # a run that is not scored has the first two
RECORDED_STAGES = ("first_frame", "video")  # those that make HDF5 records; scores are tables
VERIFY_SPLIT = "verify_split"  # a job like a stage's, which makes no items
WEIGHTS_DIR_VARIABLE = "IPT2V_WEIGHTS_DIR"  # a folder with a copy of the run's weights, to be read instead of the frozen one


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a run was frozen with and config.yaml does not say."""

    run_digest: str
    manifest_digest: str
    weights_dir: str
    weights: dict[str, str]  # folder name -> fingerprint
    testset_format: str
    num_shards: int
    code_version: str
    packages: dict[str, str]
    created: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCount:
    """Progress of one stage of one shard."""

    stage: str
    shard: int
    done: int
    failed: int
    missing: int


@dataclass(frozen=True, slots=True)
class RunDir:
    """One run folder: every path in it is a property or method of this class."""

    root: Path

    @property
    def config_path(self) -> Path:
        return self.root / "config.yaml"

    @property
    def manifest_path(self) -> Path:
        return self.root / "manifest.jsonl"

    @property
    def environment_path(self) -> Path:
        return self.root / "environment.json"

    def shard_path(self, shard: int) -> Path:
        return self.root / "shards" / f"{shard:03d}.jsonl"

    def part_path(self, stage: str, key: str) -> Path:
        return self.root / stage / "parts" / f"{key}.h5"

    def sealed_path(self, stage: str, shard: int) -> Path:
        return self.root / stage / f"{shard:03d}.h5"

    def mp4_path(self, key: str) -> Path:
        return self.root / "video" / f"{key}.mp4"

    @property
    def leases_path(self) -> Path:
        return self.root / "video" / "leases"

    def position_path(self, key: str) -> Path:
        return self.root / "video" / "positions" / f"{key}.safetensors"

    def crashes(self, key: str) -> list[str]:
        """Why elements have crashed while they made the video, oldest first."""
        return [path.read_text(encoding="utf-8").strip() for path in self.crash_paths(key)]

    def crash_paths(self, key: str) -> list[Path]:
        """The notes of these crashes, oldest first."""
        paths = (self.root / "video" / "crashes" / key).glob("*.txt")
        return sorted(paths, key=lambda path: path.stat().st_mtime_ns)

    def note_crash(self, key: str, life: str, reason: str) -> None:
        """One for each life of an element: what its first rank to say so has said."""
        path = self.root / "video" / "crashes" / key / f"{life}.txt"
        if not path.exists():
            write_text(path, reason + "\n")

    def split_check_path(self, shard: int) -> Path:
        return self.root / VERIFY_SPLIT / f"{shard:03d}.json"

    @property
    def scoring_path(self) -> Path:
        return self.root / "score.json"

    def takes_path(self, key: str) -> Path:
        """Where the rejected takes of an item are kept."""
        return self.root / "takes" / key

    def numbers_of_takes(self, keys: Collection[str]) -> dict[str, int]:
        """key -> how many takes were rejected, of those that had any."""
        if not (self.root / "takes").exists():
            return {}
        numbers = {key: [int(path.name) for path in self.takes_path(key).glob("[0-9]*")] for key in keys}
        return {key: max(found) for key, found in numbers.items() if found}

    def scoring(self) -> Scoring | None:
        """What is measured; None for a run that is not scored. Raises ValueError if the file is damaged."""
        try:
            found = json.loads(self.scoring_path.read_text(encoding="utf-8"))
            config = parse_settings(ScoreConfig, found["config"], where=str(self.scoring_path))
            return Scoring(config=config, weights=found["weights"]) if config.metrics else None
        except FileNotFoundError:
            return None
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.scoring_path}: {error!r}; delete it and submit again") from error

    def save_scoring(self, scoring: Scoring) -> None:
        """From now on this is measured; what was measured otherwise stays beside it."""
        found = {"config": scoring.config.model_dump(mode="json"), "weights": scoring.weights}
        write_text(self.scoring_path, json.dumps(found, indent=1) + "\n")

    def scores(self, scoring: Scoring | None = None) -> ScoreDir | None:
        """Where the scores lie, of this way of measuring or of the run's own; None for a run that is not scored."""
        scoring = scoring or self.scoring()
        return None if scoring is None else ScoreDir(self.root / "score" / scoring.digest)

    def all_scores(self) -> list[ScoreDir]:
        """Every way in which the run was ever scored."""
        return [ScoreDir(path) for path in sorted((self.root / "score").glob("*")) if path.is_dir()]

    def stages(self) -> tuple[str, ...]:
        """The stages of this run, in their order."""
        return STAGES[: -1 if self.scoring() is None else None]

    def failure_path(self, stage: str, key: str) -> Path:
        return self.root / "failure" / stage / f"{key}.json"

    def jobs_path(self, stage: str) -> Path:
        return self.root / "jobs" / stage

    @property
    def answers_path(self) -> Path:
        return self.root / "first_frame" / "answers"

    @property
    def package_path(self) -> Path:
        return self.root / "package"

    def environment(self) -> Environment:
        """What the run was frozen with. Raises ValueError if this is no run folder."""
        try:
            return Environment(**json.loads(self.environment_path.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{self.root}: not a run folder (no environment.json); `ipt2v submit CONFIG` makes one") from None
        except (ValueError, TypeError) as error:
            raise ValueError(_damaged(self.environment_path, error)) from None

    def config(self) -> RunConfig:
        """The frozen settings. Raises ValueError, naming both digests, if somebody has changed them since."""
        config, environment = load_settings(RunConfig, self.config_path), self.environment()
        found = run_digest(config, manifest_digest=environment.manifest_digest, weights=environment.weights)
        self._check_digest("config.yaml", found, environment.run_digest)
        return config

    def manifest(self) -> tuple[Item, ...]:
        """Every item of the run. Raises ValueError, naming both digests, if somebody has changed the list since."""
        environment, items = self.environment(), read_manifest(self.manifest_path)
        self._check_digest("manifest.jsonl", manifest_digest(items), environment.manifest_digest)
        return items

    def shard(self, shard: int) -> tuple[Item, ...]:
        """The items of one shard. Raises ValueError for a shard that the run does not have."""
        num_shards = self.environment().num_shards
        if not 0 <= shard < num_shards:
            raise ValueError(f"{self.root}: no shard {shard}; the run has {num_shards}: 0..{num_shards - 1}")
        return read_manifest(self.shard_path(shard))

    def shard_keys(self, shard: int) -> tuple[str, ...]:
        """The keys of one shard's items; for counting, which wants neither prompts nor checks."""
        path = self.shard_path(shard)
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
            items = json.loads(f"[{','.join(line for line in lines if line)}]")  # one call, a third of the time of one a line
            return tuple(f"{item['identity']}/{item['prompt_id']}" for item in items)
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise ValueError(_damaged(path, error)) from None

    def record_path(self, stage: str, shard: int, key: str) -> Path:
        """The file that holds record `key`: its part, or the sealed shard. Raises KeyError if neither does."""
        paths = self.record_paths(stage, shard, [key])
        if key not in paths:
            raise KeyError(f"{self.root}: no {stage} record of {key}")
        return paths[key]

    def made_path(self, stage: str, shard: int, key: str) -> Path:
        """The file that holds what a stage has made of an item; scores have tables instead of records."""
        scores = self.scores() if stage == "score" else None
        if scores is None:
            return self.record_path(stage, shard, key)
        part = scores.part_path(key)
        return part if part.exists() else scores.sealed_path(shard)

    def record_paths(self, stage: str, shard: int, keys: Collection[str]) -> dict[str, Path]:
        """key -> the file that holds its record, of a shard's keys that have one. Opens the sealed shard only, never a part."""
        sealed = self.sealed_path(stage, shard)
        in_shard = _sealed_of(sealed, keys)
        in_parts = existing(self.root / stage / "parts", set(keys) - in_shard, ".h5")
        if len(in_shard) + len(in_parts) < len(keys):  # parts that were sealed between the two looks are seen by neither
            in_shard = _sealed_of(sealed, keys)
            in_parts -= in_shard
        return dict.fromkeys(in_shard, sealed) | {key: self.part_path(stage, key) for key in in_parts}

    def recorded(self, stage: str, shard: int, keys: Collection[str]) -> set[str]:
        """Which of a shard's keys have a record in `stage`."""
        return set(self.record_paths(stage, shard, keys))

    def failed(self, stage: str, keys: Collection[str]) -> set[str]:
        """Which of the keys have a failure record in `stage`."""
        return existing(self.root / "failure" / stage, keys, ".json")

    def done(self, stage: str, shard: int, keys: Collection[str], scoring: Scoring | None = None) -> set[str]:
        """Which of a shard's keys `stage` has finished; a video counts when its MP4 is there too."""
        if stage == "score":
            scores = self.scores(scoring)
            return set() if scores is None else scores.done(shard, keys)
        recorded = self.recorded(stage, shard, keys)
        return existing(self.root / "video", recorded, ".mp4") if stage == "video" else recorded

    def count(self, stage: str, shard: int, keys: Collection[str], scoring: Scoring | None = None) -> StageCount:
        """Progress of a shard. An item that failed in an earlier stage has failed in the later ones."""
        left = set(keys) - self.done(stage, shard, keys, scoring)
        failed = set().union(*(self.failed(earlier, left) for earlier in STAGES[: STAGES.index(stage)]))
        here = self.failed(stage, left)
        if stage == "score" and here:  # who deletes a video to have it made anew wants it measured too
            here = existing(self.root / "video", here, ".mp4")
        failed |= here
        num_failed, num_missing = len(failed), len(left - failed)
        return StageCount(stage=stage, shard=shard, done=len(keys) - len(left), failed=num_failed, missing=num_missing)

    def save_failure(self, failure: Failure) -> None:
        write_text(self.failure_path(failure.stage, failure.key), json.dumps(asdict(failure), indent=1) + "\n")

    def failures(self) -> list[Failure]:
        """Every failure record of the run, in order of stage and key."""
        paths = [path for stage in STAGES for path in sorted((self.root / "failure" / stage).glob("*/*.json"))]
        return [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]

    def _check_digest(self, name: str, found: str, expected: str) -> None:
        if found != expected:
            raise ValueError(
                f"{self.root}/{name}: digest {found[:12]}, but the run was frozen as {expected[:12]}; "
                "restore the file, or submit the changed settings as a new run"
            )


def _damaged(path: Path, error: Exception) -> str:
    """One line on a frozen file that is not as it was written. It can be had again: another freeze writes the same."""
    found = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({type(error).__name__}: {error})"
    return f"{path}: {found}; restore it from a copy, or from what the same `ipt2v freeze` writes to other --runs"


def _sealed_of(sealed: Path, keys: Collection[str]) -> set[str]:
    return set(hdf5.sealed_keys(sealed)).intersection(keys) if sealed.exists() else set()


def seal_shard(run: RunDir, stage: str, shard: int, keys: Collection[str]) -> None:
    """Merge the parts of a shard into its sealed file and drop them; a shard without parts is left alone."""
    parts = existing(run.root / stage / "parts", keys, ".h5")
    if not parts:
        return
    paths = run.record_paths(stage, shard, keys)
    hdf5.seal(run.sealed_path(stage, shard), [(key, paths[key]) for key in keys if key in paths])
    for key in parts:
        run.part_path(stage, key).unlink(missing_ok=True)


def seal_leftovers(run: RunDir, counts: Iterable[StageCount], busy: Collection[str]) -> list[str]:
    """Seal each whole shard of the stages that are not `busy`; what could not be sealed, a line each.

    An element that was killed between its last item and its end has left it so, and no other comes for a shard that is whole.
    """
    problems = []
    for count in counts:
        if count.missing or count.stage in busy:
            continue
        keys, scores = run.shard_keys(count.shard), run.scores()
        try:
            if count.stage != "score":
                seal_shard(run, count.stage, count.shard, keys)
            elif scores is not None:
                scores.seal(count.shard, keys)
        except (ValueError, KeyError) as error:
            problems.append(f"{count.stage} shard {count.shard} is not sealed: {error}; `ipt2v verify {run.root}` says more")
    return problems


def owner_of(shard: int) -> str:
    """Who takes leases for the element that makes a shard."""
    return f"video element {shard}"


def free_leases_of_the_dead(run: RunDir, living: Collection[int]) -> None:
    """Free what elements hold that make none of the `living` shards; for who knows which elements there are."""
    free_leases(run.leases_path, {owner_of(shard) for shard in living})
