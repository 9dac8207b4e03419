"""Published weights into a folder of weights, from Hugging Face or a plain URL. The only file that imports huggingface_hub.

All is asked and decided first: without network, without room, or onto toy weights nothing is written. Which files of a
repository are loaded is the catalogue's to say.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ipt2v.config import RunConfig
from ipt2v.models.catalogue import files_to_check, is_toy, loads, setting_of, top_folder
from ipt2v.models.download import host_of, one_line, resume, size_at, unpack, unreachable
from ipt2v.models.published import published_files
from ipt2v.models.sources import Download, Repository, Source
from ipt2v.models.toy import TOY_MARK
from ipt2v.models.weight_files import (
    Expected,
    Record,
    expected_files,
    hash_of,
    problem_of,
    read_record,
    readable_size,
    write_record,
)

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_MAX_WORKERS = 4  # files at once: the hub begins a file that was cut off anew at the next call, and they have 5 GB each

Tell = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A folder of weights, where it is published, what reads it and with which settings."""

    source: Source
    role: str
    config: RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file as the hub states it."""

    name: str  # in the repository
    path: str  # below the folder of weights
    expected: Expected


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What is wanted of one repository."""

    repository: Repository
    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainFile:
    """A file or an archive as its server states it."""

    url: str
    size: int | None
    sha256: str  # or how it begins; "" if none is published

    @property
    def name(self) -> str:
        return _name_in(self.url)

    @property
    def is_archive(self) -> bool:
        return self.name.endswith(".zip")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What there is to do for a folder: batches of a hub's files, and files at plain URLs."""

    wanted: Wanted
    folder: Path
    missing_bytes: int  # of the batches
    batches: tuple[Batch, ...]
    plain_files: tuple[PlainFile, ...]

    @property
    def num_bytes(self) -> int:
        """To be fetched, as far as it is known."""
        return self.missing_bytes + sum(file.size or 0 for file in self.plain_files)

    @property
    def room_bytes(self) -> int:
        """An archive and its files are there at the same time."""
        return self.num_bytes + sum(file.size or 0 for file in self.plain_files if file.is_archive)


def fetch(wanted: Sequence[Wanted], weights_dir: Path, *, endpoint: str | None = None, tell: Tell = print) -> None:
    """Fetch what is missing of each folder, and record what its files are for `weights check`.

    Raises ValueError, before anything is written, if a host cannot be reached, a repository is closed, there is no room, or a
    folder holds something else; OSError if a transfer ends early: the next call goes on.
    """
    plans = []
    for one in wanted:
        folder = weights_dir / one.source.folder
        if is_complete(one, folder):
            tell(f"{folder}: complete, nothing to fetch")
        else:
            plans.append(_plan(one, folder, endpoint))
    for plan in plans:
        source = plan.wanted.source
        tell(f"{plan.folder}: {readable_size(plan.num_bytes)} from {source.url}, licence: {source.licence}")
        if source.non_commercial:
            tell(f"  NON-COMMERCIAL: what you make with {source.folder} is bound by its licence")
    check_room(weights_dir, sum(plan.room_bytes for plan in plans))
    for plan in plans:
        if plan.batches:
            _fetch_batches(plan, endpoint, tell)
        for plain in plan.plain_files:
            _fetch_plain(plan, plain, tell)
        for path, expected in files_to_check(plan.wanted.role, plan.folder, plan.wanted.config):
            if problem := problem_of(path, expected):
                raise OSError(f"weights fetch: {path} {problem}, although all of {plan.wanted.source.url} is fetched")
        tell(f"{plan.folder}: complete")


def is_complete(one: Wanted, folder: Path) -> bool:
    """Whether nothing needs to be fetched. Raises ValueError if the folder holds toys."""
    if is_toy(folder):
        raise ValueError(
            f"weights fetch: {folder} holds toy weights ({TOY_MARK}), which real ones are never mixed with; "
            "give another --weights folder, or delete this one first"
        )
    if one.source.repositories and not read_record(folder).files:  # laid there by hand: the hub says whether it is its own
        return False
    return not any(problem_of(path, expected) for path, expected in files_to_check(one.role, folder, one.config))


def check_room(weights_dir: Path, num_bytes: int) -> None:
    """Raises ValueError if the file system has less room than that."""
    there = next(folder for folder in (weights_dir.absolute(), *weights_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise ValueError(
            f"weights fetch: {weights_dir} has room for {readable_size(free)}, {readable_size(num_bytes)} are to be fetched; "
            "free space, or give another --weights folder"
        )


def _plan(one: Wanted, folder: Path, endpoint: str | None) -> Plan:
    record = read_record(folder)
    batches = tuple(
        _ask_hub(repository, one, record.sources.get(repository.name), endpoint) for repository in one.source.repositories
    )
    missing = 0
    for file in (file for batch in batches for file in batch.files):
        path = folder / file.path
        if path.is_file() and problem_of(path, file.expected) and record.files.get(file.path) is None:
            raise ValueError(
                f"weights fetch: {path} is in the way: it {problem_of(path, file.expected)}, and was not fetched by ipt2v; "
                "move it away, or delete it to have the published one"
            )
        missing += 0 if path.is_file() else file.expected.size or 0
    plain_files = tuple(
        _ask_server(download, url, folder)
        for download in one.source.downloads
        if not _is_whole(url := download.url.format(file=one.config.cutout.file), folder)
    )
    return Plan(wanted=one, folder=folder, missing_bytes=missing, batches=batches, plain_files=plain_files)


# ---------------------------------------------------------------------------------------------------- Hugging Face


def _ask_hub(repository: Repository, one: Wanted, commit: str | None, endpoint: str | None) -> Batch:
    """What the hub has of what `one` loads, at the commit that was fetched before, or the newest."""
    from huggingface_hub import HfApi

    with _hub_errors(repository.name, endpoint, ValueError):
        info = HfApi(endpoint=endpoint).model_info(repository.name, revision=commit, files_metadata=True)
    files = []
    for sibling in info.siblings or ():
        path = str(PurePosixPath(repository.below) / sibling.rfilename)
        if ".." not in PurePosixPath(path).parts and loads(one.role, path, one.config):
            files.append(RemoteFile(name=sibling.rfilename, path=path, expected=_as_stated(sibling)))
    if not files or info.sha is None:
        raise ValueError(f"weights fetch: {repository.name} has no file that {setting_of(one.role)} loads; was it rearranged?")
    return Batch(repository=repository, commit=info.sha, files=tuple(files))


def _as_stated(sibling: RepoSibling) -> Expected:
    if sibling.lfs is not None:
        return Expected(size=sibling.lfs.size, sha256=sibling.lfs.sha256)
    return Expected(size=sibling.size, git_sha1=sibling.blob_id)


def _fetch_batches(plan: Plan, endpoint: str | None, tell: Tell) -> None:
    from huggingface_hub import snapshot_download

    record = read_record(plan.folder)
    for batch in plan.batches:
        for file in batch.files:
            path = plan.folder / file.path
            if path.is_file() and (problem := problem_of(path, file.expected)):  # the hub would take it for whole
                tell(f"{path} {problem}: it is fetched again")
                path.unlink()
        with _hub_errors(batch.repository.name, endpoint, OSError):
            snapshot_download(
                batch.repository.name,
                revision=batch.commit,
                local_dir=plan.folder / batch.repository.below,
                allow_patterns=[glob.escape(file.name) for file in batch.files],
                max_workers=_MAX_WORKERS,
                endpoint=endpoint,
            )
        record = Record(
            sources=record.sources | {batch.repository.name: batch.commit},
            files=record.files | {file.path: file.expected for file in batch.files},
        )
    write_record(plan.folder, record)


@contextmanager
def _hub_errors(repository: str, endpoint: str | None, kind: type[ValueError | OSError]) -> Iterator[None]:
    """What goes wrong between us and the hub as one error of this kind, in one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError

    where = f"{host_of(endpoint or constants.ENDPOINT)}/{repository}"
    try:
        yield
    except GatedRepoError:
        raise kind(f"weights fetch: {where} is gated: accept its terms there, then log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise kind(f"weights fetch: {where} is not there, or private: for a private one log in with `hf auth login`") from None
    except HfHubHTTPError as error:
        raise kind(f"weights fetch: {where} answers: {one_line(error)}; try again later") from None
    except (HTTPError, OSError) as error:  # HTTPError is the base of all errors of the hub's HTTP library
        if kind is ValueError:
            raise unreachable(host_of(endpoint or constants.ENDPOINT), error) from None
        raise OSError(f"weights fetch: {where} stopped ({one_line(error)}); run it again, whole files are kept") from None


# ---------------------------------------------------------------------------------------------------- plain URLs


def _ask_server(download: Download, url: str, folder: Path) -> PlainFile:
    published = {row.path: row.sha256 for row in published_files(folder.name)}
    return PlainFile(url=url, size=size_at(url), sha256=download.sha256 or published.get(_name_in(url)) or "")


def _is_whole(url: str, folder: Path) -> bool:
    """Whether the file itself is there already; an archive, which is not kept, never is."""
    name = _name_in(url)
    return (folder / name).is_file() and not problem_of(folder / name, expected_files(folder).get(name))


def _name_in(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name


def _fetch_plain(plan: Plan, file: PlainFile, tell: Tell) -> None:
    top = top_folder(plan.wanted.role, plan.folder)
    part = plan.folder / f"{file.name}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    resume(file.url, part, file.size)
    found = hash_of(part, "sha256")
    if not found.startswith(file.sha256):
        part.unlink()
        raise OSError(f"weights fetch: {file.url} has sha256 {found}, expected {file.sha256}; what came was deleted, try again")
    if file.is_archive:
        paths = unpack(part, top)
        part.unlink()
    else:
        os.replace(part, plan.folder / file.name)
        paths = [plan.folder / file.name]
        if not file.sha256:
            tell(f"{paths[0]}: sha256 {found}, recorded as found: none is published")
    files: dict[str, Expected | None] = {
        path.name: Expected(size=path.stat().st_size, sha256=hash_of(path, "sha256")) for path in paths
    }
    record = read_record(plan.folder)
    write_record(plan.folder, Record(sources=record.sources | {file.url: found}, files=record.files | files))
