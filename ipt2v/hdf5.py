"""Records <-> HDF5. One closed file per record, sealed into one file per shard; knows nothing of run folders or torch.

Layout of both kinds of file:
    /items/<identity>/<prompt_id>   group of one record; attributes hold its texts and `provenance` (JSON)
    /texts/<digest>                 one text embedding [L,D]; a sealed shard holds each distinct one once
    /references/<digest>            one cut-out reference photo [H,W,3]; likewise
    /keys                           sealed shards only: the keys inside, one a line, so that counting opens no group
Each record, text and reference has an attribute `sha256` of its other attributes and its arrays (older files have none):
HDF5's own checksums leave out attributes, and only what compresses or has a filter for it is covered at all.

HDF5 files that are appended to do not survive a kill, and files on shared disks must have one writer; hence closed parts,
renamed into place.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ipt2v.atomic import replacing
from ipt2v.records import Attempt, FirstFrame, Provenance, TextEmbedding, VideoLatents

CHECKSUM = "sha256"
# What a disk or its server may say of a file with which nothing is wrong
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.EHOSTDOWN, errno.EACCES}
_TEXTS = ("subject", "spatial_prompt", "temporal_prompt")
_SHARED = ("temporal_text", "negative_text", "reference")  # attributes that name what several records may share


class UnreadableError(ValueError):
    """A file that no HDF5 library opens, or a record in it that none reads: cut short, or damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One record as check_file found it."""

    problem: str = ""  # empty: whole, and made by the run
    has_checksum: bool = False  # else only known to be readable
    is_listed: bool = True  # False: the shard's list of keys, by which everybody looks for records, leaves it out
    provenance: Provenance | None = None
    texts: dict[str, str] = field(default_factory=dict)  # prompts of a first frame


def save_first_frame(path: Path, record: FirstFrame, provenance: Provenance) -> None:
    """Write one first frame with its prompts and text embeddings as a closed part."""
    with _new_file(path) as file:
        group = file.create_group(f"items/{record.key}")
        attributes: dict[str, str | float] = {
            "provenance": json.dumps(asdict(provenance)),
            **{name: getattr(record, name) for name in _TEXTS},
            "notes": json.dumps(record.notes),
            "attempts": json.dumps([asdict(attempt) for attempt in record.attempts]),
            "similarity": float("nan") if record.similarity is None else float(record.similarity),
            "take": record.take,
            "temporal_text": _save_text(file, record.temporal),
            "negative_text": _save_text(file, record.negative),
            "reference": _save_reference(file, record.reference_HWC),
        }
        arrays: dict[str, NDArray[Any]] = {}
        if record.image_HWC is not None:
            arrays["image"] = record.image_HWC
            group.create_dataset("image", data=record.image_HWC, compression="gzip", shuffle=True)
        _set_attributes(group, attributes, arrays)


def load_first_frame(path: Path, key: str, *, run_digest: str) -> FirstFrame:
    """The first frame `key` of a part or sealed shard. Raises ValueError if another run made it, KeyError if not there."""
    with _item(path, key, run_digest) as (file, group):
        similarity = float(group.attrs["similarity"])
        return FirstFrame(
            key=key,
            subject=group.attrs["subject"],
            spatial_prompt=group.attrs["spatial_prompt"],
            temporal_prompt=group.attrs["temporal_prompt"],
            image_HWC=group["image"][...] if "image" in group else None,
            reference_HWC=file[group.attrs["reference"]][...],
            similarity=None if np.isnan(similarity) else similarity,
            attempts=tuple(Attempt(**attempt) for attempt in json.loads(group.attrs["attempts"])),
            notes=tuple(json.loads(group.attrs["notes"])),
            temporal=_load_text(file, group.attrs["temporal_text"]),
            negative=_load_text(file, group.attrs["negative_text"]),
            take=int(group.attrs.get("take", 1)),  # older files say none
        )


def save_video_latents(path: Path, record: VideoLatents, provenance: Provenance) -> None:
    """Write one video's latents, [C,T,H,W] float32, as a closed part."""
    with _new_file(path) as file:
        group = file.create_group(f"items/{record.key}")
        group.create_dataset("latents", data=record.latents_CTHW)
        _set_attributes(group, {"provenance": json.dumps(asdict(provenance))}, {"latents": record.latents_CTHW})


def load_video_latents(path: Path, key: str, *, run_digest: str) -> VideoLatents:
    """The latents of video `key`. Raises ValueError if another run made it, KeyError if not there."""
    with _item(path, key, run_digest) as (_, group):
        return VideoLatents(key=key, latents_CTHW=group["latents"][...])


def load_provenance(path: Path, key: str, *, run_digest: str) -> Provenance:
    """How record `key` came to be. Raises ValueError if another run made it, KeyError if it is not there."""
    with _item(path, key, run_digest) as (_, group):
        return Provenance(**json.loads(group.attrs["provenance"]))


def seal(shard: Path, parts: Iterable[tuple[str, Path]]) -> None:
    """Write the records (key, file that holds it) into one shard file; a source may be a part or the shard's older form."""
    with _new_file(shard) as target:
        keys = []
        for key, source in parts:
            with _open(source) as file:
                group = file[f"items/{key}"]
                file.copy(group, target.require_group(f"items/{key}".rpartition("/")[0]), name=key.rpartition("/")[2])
                for place in [group.attrs[name] for name in _SHARED if name in group.attrs]:
                    if place not in target:
                        file.copy(file[place], target.require_group(place.rpartition("/")[0]), name=place.rpartition("/")[2])
            keys.append(key)
        target.create_dataset("keys", data=np.frombuffer("\n".join(keys).encode() or b"\n", dtype=np.uint8))


def sealed_keys(shard: Path) -> tuple[str, ...]:
    """The keys in a sealed shard, in its order."""
    with _open(shard) as file:
        return tuple(key for key in file["keys"][...].tobytes().decode().split("\n") if key)


def check_file(path: Path, *, run_digest: str) -> dict[str, Found]:
    """Every record of a part or sealed shard, read whole; a record that is not whole has a problem that says why.

    Raises UnreadableError if the file does not open.
    """
    with _open(path) as file:
        found: dict[str, Found] = {}
        shared: dict[str, str] = {}
        listed, there = _listed_keys(file), _keys_of(file, path)
        for key in dict.fromkeys((*(listed or ()), *there)):
            try:
                found[key] = _check_record(file, key, run_digest, shared)
            except Exception as error:  # a damaged file makes HDF5 raise nearly anything
                found[key] = Found(problem=f"not readable ({type(error).__name__}: {_one_line(error)})")
            if listed is not None and key not in listed:
                found[key] = replace(found[key], is_listed=False)
        return found


def _listed_keys(file: h5py.File) -> set[str] | None:
    """What a sealed shard says that it holds; None for a part."""
    try:
        return set(file["keys"][...].tobytes().decode().split("\n")) - {""} if "keys" in file else None
    except Exception:  # as above; its records may be good
        return set()


def _keys_of(file: h5py.File, path: Path) -> list[str]:
    try:
        return [f"{identity}/{prompt_id}" for identity in file.get("items", ()) for prompt_id in file[f"items/{identity}"]]
    except Exception as error:
        text = f"{path}: not a readable HDF5 file ({_one_line(error)}); delete it and submit again to make it anew"
        raise UnreadableError(text) from error


def _check_record(file: h5py.File, key: str, run_digest: str, shared: dict[str, str]) -> Found:
    """`shared` holds the problem, or none, of each text and reference that was looked at, and grows."""
    group = file[f"items/{key}"]
    provenance = Provenance(**json.loads(group.attrs["provenance"]))
    problems = [_problem_of(group)]
    for place in [group.attrs[name] for name in _SHARED if name in group.attrs]:
        if place not in shared:
            shared[place] = _problem_of(file[place])
        problems.append(shared[place] and f"{place}: {shared[place]}")
    if provenance.run_digest != run_digest:
        problems.append(f"made by run {provenance.run_digest[:12]}, expected {run_digest[:12]}")
    return Found(
        problem="; ".join(filter(None, problems)),
        has_checksum=CHECKSUM in group.attrs,
        provenance=provenance,
        texts={name: group.attrs[name] for name in _TEXTS if name in group.attrs},
    )


def _problem_of(node: h5py.Group | h5py.Dataset) -> str:
    """What is wrong with a record's own values, or with something that records share; read to the last byte."""
    attributes = dict(node.attrs)
    expected = attributes.pop(CHECKSUM, None)
    members = node.items() if isinstance(node, h5py.Group) else [("", node)]
    found = _checksum(attributes, {name: dataset[...] for name, dataset in members})
    return "" if expected in (None, found) else f"damaged (checksum {found[:12]}, expected {str(expected)[:12]})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


@contextmanager
def _new_file(path: Path) -> Iterator[h5py.File]:
    with replacing(path) as scratch, scratch.open("w+b", buffering=0) as raw:
        disk = _Disk(raw)
        with h5py.File(disk, "w") as file:
            yield file
        if disk.error is not None:
            raise disk.error


class _Disk:
    """A file for HDF5 to write to, on which writing never fails; the first error is kept, for the caller to raise.

    Told of a full disk, HDF5 (2.0) cannot close its file any more, and the process dies of a segmentation fault when it ends.
    """

    def __init__(self, raw: io.FileIO) -> None:
        self.raw = raw
        self.error: OSError | None = None
        self.seek, self.tell, self.read, self.readinto = raw.seek, raw.tell, raw.read, raw.readinto

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest and self.error is None:
            try:
                rest = rest[self.raw.write(rest) :]
            except OSError as error:
                self.error = error
        return len(data)

    def truncate(self, size: int) -> None:
        try:
            self.raw.truncate(size)
        except OSError as error:
            self.error = self.error or error

    def flush(self) -> None:
        """Nothing is held back; what reaches the disk is the business of the fsync before the rename."""


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    try:
        # locking=False: the file is closed and never written again, and shared disks without flock refuse the lock
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in _PASSING:
            raise
        text = f"{path}: not a readable HDF5 file ({error}); delete it and submit again to make it anew"
        raise UnreadableError(text) from error
    with file:
        yield file


@contextmanager
def _item(path: Path, key: str, run_digest: str) -> Iterator[tuple[h5py.File, h5py.Group]]:
    with _open(path) as file:
        group = file[f"items/{key}"]
        found = json.loads(group.attrs["provenance"])["run_digest"]
        if found != run_digest:
            raise ValueError(
                f"{path}: record {key} was made by run {found[:12]}, expected {run_digest[:12]}; "
                "move it away, or use the run folder that it belongs to"
            )
        try:
            yield file, group
        except Exception as error:  # a damaged file makes HDF5 raise nearly anything
            if isinstance(error, OSError) and error.errno in _PASSING:
                raise
            text = f"{path}: record {key} is damaged ({type(error).__name__}: {_one_line(error)})"
            raise UnreadableError(f"{text}; `ipt2v verify RUN --repair` puts it aside, then submit again") from error


def _set_attributes(
    node: h5py.Group | h5py.Dataset, attributes: dict[str, str | float], arrays: dict[str, NDArray[Any]]
) -> None:
    """The attributes, and the checksum over them and over the node's arrays."""
    for name, value in attributes.items():
        node.attrs[name] = value
    node.attrs[CHECKSUM] = _checksum(attributes, arrays)


def _checksum(attributes: Mapping[str, str | float], arrays: Mapping[str, NDArray[Any]]) -> str:
    """64 hex digits; of values as they are read back, so that it does not depend on how HDF5 lays them out."""
    hasher = hashlib.sha256()
    for name, value in sorted(attributes.items()):
        text = value if isinstance(value, str) else float(value).hex()
        hasher.update(json.dumps([name, text]).encode())
    for name, array in sorted(arrays.items()):
        hasher.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


def _save_text(file: h5py.File, text: TextEmbedding) -> str:
    place = f"texts/{text.digest}"
    if place not in file:
        dataset = file.create_dataset(place, data=text.embedding_LD)
        _set_attributes(dataset, {"text": text.text}, {"": np.asarray(text.embedding_LD)})
    return place


def _save_reference(file: h5py.File, image_HWC: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(repr(image_HWC.shape).encode() + image_HWC.tobytes()).hexdigest()[:32]
    dataset = file.create_dataset(f"references/{digest}", data=image_HWC, compression="gzip", shuffle=True)
    _set_attributes(dataset, {}, {"": image_HWC})
    return f"references/{digest}"


def _load_text(file: h5py.File, place: str) -> TextEmbedding:
    dataset = file[place]
    return TextEmbedding(text=dataset.attrs["text"], embedding_LD=dataset[...])
