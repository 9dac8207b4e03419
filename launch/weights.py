"""What `ipt2v weights` prints and takes: folders of weights as a table, words of the command line as folders."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ipt2v.config import Metric, RunConfig, TestsetConfig, load_settings
from ipt2v.models.catalogue import Problem, all_folders, files_to_check, find_problems, is_score, is_toy, loads
from ipt2v.models.published import PublishedFile, published_files
from ipt2v.models.score_weights import metrics_of
from ipt2v.models.sources import SOURCES, Source, source_of, where_from
from ipt2v.models.weight_files import TENSOR_SUFFIXES, readable_size

if TYPE_CHECKING:
    from ipt2v.models.fetch import Wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A folder of weights, as it is listed."""

    folder: str
    role: str
    stages: tuple[str, ...]  # that read it
    source: str
    licence: str
    non_commercial: bool
    metrics: tuple[Metric, ...]  # that need it; () of what a run reads
    files: tuple[PublishedFile, ...]  # that are known of

    def size(self) -> str:
        """Of all files together, to read."""
        known = readable_size(sum(file.size or 0 for file in self.files))
        if any(file.size is None for file in self.files if file.path.endswith(TENSOR_SUFFIXES)):
            return f"over {known}" if any(file.size for file in self.files) else "not known"
        return f"about {known}" if any(file.size is None or file.rounded for file in self.files) else known


def rows(config: RunConfig | None) -> list[Row]:
    """Every folder that we know, or those that a run reads, with the files that it loads."""
    if config is None:
        return [_row(source.role, source.folder, published_files(source.folder)) for source in SOURCES]
    return [
        _row(role, folder, tuple(file for file in published_files(folder) if loads(role, file.path, config)))
        for role, folder in all_folders(config).items()
    ]


def print_rows(listed: Sequence[Row], *, files: bool) -> None:
    """A block for each folder: what reads it and how large it is, where it comes from, its licence; its files.

    Those that scores read come last, below a line of their own.
    """
    heading = "\nfor scores; a run needs those of the metrics that its score.metrics names:\n"
    for row in listed:
        if row.metrics and heading:
            print(heading)
            heading = ""
        print(f"{row.folder:<28} {row.size():<14} {', '.join(row.stages)} ({row.role})")
        print(f"  from    {row.source}\n  licence {row.licence}{'  [NON-COMMERCIAL]' if row.non_commercial else ''}")
        if row.metrics:
            print(f"  for     {', '.join(row.metrics)}")
        for file in row.files if files else ():
            size = "?" if file.size is None else f"{'~' if file.rounded else ''}{file.size:,}"
            print(f"  {size:>15}  {file.sha256 or 'sha256 not known':<64}  {file.path}")


def dump_rows(listed: Sequence[Row]) -> str:
    """The rows as JSON."""
    return json.dumps([asdict(row) for row in listed], indent=1)


def wanted_folders(words: Sequence[str]) -> list[Wanted]:
    """What to fetch: of each folder named what the settings load by default, of a settings file all that its run loads.

    Words with = are settings on top, as everywhere. Raises ValueError if a word is none of this.
    """
    from ipt2v.models.fetch import Wanted

    overrides = tuple(word for word in words if "=" in word)
    wanted, known = [], {source.folder: source for source in SOURCES}
    for word in (word for word in words if "=" not in word):
        if word in known:
            config = RunConfig(name="defaults", testset=TestsetConfig(path="."))
            wanted.append(Wanted(source=known[word], role=known[word].role, config=config))
        elif Path(word).is_file() or word.endswith((".yaml", ".yml")):
            config = load_settings(RunConfig, Path(word), overrides)
            readers: dict[str, str] = {}  # a folder is fetched once
            for role, name in all_folders(config).items():
                readers.setdefault(name, role)
            wanted += [Wanted(source=source_of(name), role=role, config=config) for name, role in readers.items()]
        else:
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"nearest folder is {near[0]}" if near else f"known folders: {', '.join(known)}"
            raise ValueError(f"{word!r} is neither a settings file nor a folder of weights; {hint}")
    return wanted


def check(weights_dir: Path, config: RunConfig, *, hashes: bool) -> int:
    """Print the folders, or a line for each problem; the exit code."""
    problems = _hash_all(weights_dir, config) if hashes else find_problems(weights_dir, config)
    for problem in problems:
        print(problem.text, file=sys.stderr)
    for folder in dict.fromkeys(problem.folder for problem in problems):
        print(f"to do: {folder}: {where_from(folder, weights_dir)}", file=sys.stderr)
    if not problems:
        roles = all_folders(config)
        width = max([12, *map(len, roles)])
        for role, folder in roles.items():
            toy = "  (toy weights: random, only looked for)" if is_toy(weights_dir / folder) else ""
            print(f"{role:<{width}} {weights_dir / folder}{toy}")
    return 1 if problems else 0


def _hash_all(weights_dir: Path, config: RunConfig) -> list[Problem]:
    """The problems, hashes included, with a progress bar on a terminal; says which files have no hash to compare with."""
    from tqdm import tqdm

    num_bytes = 0
    seen: set[Path] = set()
    for role, folder in all_folders(config).items():
        checks = files_to_check(role, weights_dir / folder, config)
        files = [(path, expected) for path, expected in checks if path.is_file() and path not in seen]
        seen.update(path for path, _ in files)
        hashed = [path for path, expected in files if expected and (expected.sha256 or expected.git_sha1)]
        num_bytes += sum(path.stat().st_size for path in hashed)
        if is_toy(weights_dir / folder):
            print(f"{folder}: toy weights: no hash is known; only that each file is there, and not empty, is checked")
        elif len(hashed) < len(files):
            print(f"{folder}: {len(files) - len(hashed)} of {len(files)} files have no known hash: their size alone is checked")
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="hash", disable=None) as bar:
        return find_problems(weights_dir, config, bar.update)


def _row(role: str, folder: str, files: tuple[PublishedFile, ...]) -> Row:
    try:
        source = source_of(folder)
    except ValueError:  # somebody's own checkpoint
        source = Source(folder=folder, role=role, url="not known: put it there yourself", licence="not known")
    return Row(
        folder=folder,
        role=role,
        # array 1 embeds the video's prompt with the text encoder that is published with the video model
        stages=("score",) if is_score(role) else ("first_frame", "video") if role == "video" else ("first_frame",),
        source=source.url,
        licence=source.licence,
        non_commercial=source.non_commercial,
        metrics=metrics_of(role.rpartition(".")[2]) if is_score(role) else (),
        files=files,
    )
