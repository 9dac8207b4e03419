"""Records <-> HDF5. One closed file per record, sealed into one file per shard; knows nothing of run folders or torch.

Layout of both kinds of file:
    /items/<identity>/<prompt_id>   group of one record; attributes hold its texts and `provenance` (JSON)
    /texts/<digest>                 one text embedding [L,D]; a sealed shard holds each distinct one once
    /references/<digest>            one cut-out reference photo [H,W,3]; likewise
    /keys                           sealed shards only: the keys inside, one a line, so that counting opens no group

HDF5 files that are appended to do not survive a kill, and files on shared disks must have one writer; hence closed parts,
renamed into place.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from ipt2v.atomic import replacing
from ipt2v.records import Attempt, FirstFrame, Provenance, TextEmbedding, VideoLatents

_SHARED = ("temporal_text", "negative_text", "reference")  # attributes that name what several records may share


class UnreadableError(ValueError):
    """A file that no HDF5 library opens: cut short, or damaged."""


def save_first_frame(path: Path, record: FirstFrame, provenance: Provenance) -> None:
    """Write one first frame with its prompts and text embeddings as a closed part."""
    with _new_file(path) as file:
        group = _item_group(file, record.key, provenance)
        for name in ("subject", "spatial_prompt", "temporal_prompt"):
            group.attrs[name] = getattr(record, name)
        group.attrs["notes"] = json.dumps(record.notes)
        group.attrs["attempts"] = json.dumps([asdict(attempt) for attempt in record.attempts])
        group.attrs["similarity"] = np.nan if record.similarity is None else record.similarity
        group.attrs["temporal_text"] = _save_text(file, record.temporal)
        group.attrs["negative_text"] = _save_text(file, record.negative)
        group.attrs["reference"] = _save_reference(file, record.reference_HWC)
        if record.image_HWC is not None:
            group.create_dataset("image", data=record.image_HWC, compression="gzip", shuffle=True)


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
        )


def save_video_latents(path: Path, record: VideoLatents, provenance: Provenance) -> None:
    """Write one video's latents, [C,T,H,W] float32, as a closed part."""
    with _new_file(path) as file:
        _item_group(file, record.key, provenance).create_dataset("latents", data=record.latents_CTHW)


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
        yield file, group


def _item_group(file: h5py.File, key: str, provenance: Provenance) -> h5py.Group:
    group = file.create_group(f"items/{key}")
    group.attrs["provenance"] = json.dumps(asdict(provenance))
    return group


def _save_text(file: h5py.File, text: TextEmbedding) -> str:
    place = f"texts/{text.digest}"
    if place not in file:
        file.create_dataset(place, data=text.embedding_LD).attrs["text"] = text.text
    return place


def _save_reference(file: h5py.File, image_HWC: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(repr(image_HWC.shape).encode() + image_HWC.tobytes()).hexdigest()[:32]
    file.create_dataset(f"references/{digest}", data=image_HWC, compression="gzip", shuffle=True)
    return f"references/{digest}"


def _load_text(file: h5py.File, place: str) -> TextEmbedding:
    dataset = file[place]
    return TextEmbedding(text=dataset.attrs["text"], embedding_LD=dataset[...])
