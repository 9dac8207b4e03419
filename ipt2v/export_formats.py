"""Samples -> the files of a data set: WebDataset's tars, Parquet, or a folder; equal samples give equal bytes.

One sample, or one group of rows, is in memory at a time. Knows no runs; the libraries are imported where they are used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from ipt2v.export_sample import Facts, Sample
from ipt2v.records import Provenance

LISTING = "metadata.jsonl"  # as Hugging Face's videofolder wants it
MANIFEST = "manifest.json"
RESERVED = (LISTING, MANIFEST)
TAR_MEMBER_BYTES = 1024  # header, and padding to 512
TAR_END_BYTES = 11_264  # two blocks of zeros, and padding to 10,240
ROW_GROUP_BYTES = 32_000_000  # a reader has one group in memory
ID_COLUMNS = ["key", "identity", "prompt_id"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A file that is complete."""

    name: str  # below the folder
    num_items: int  # that begin in it; 0 of a file that says something of all


Files = Generator[Done, None, None]
# (folder, what the files are called, samples, bytes of a shard) -> files
Write = Callable[[Path, str, Iterable[Sample], int], Files]


@dataclass(frozen=True, slots=True)
class Format:
    """A way to share a data set."""

    write: Write
    library: str  # that it needs; "" for none


def write_webdataset(folder: Path, name: str, samples: Iterable[Sample], shard_bytes: int) -> Files:
    """NAME-000000.tar...: 000012.mp4, .png and .json of item 12; its true key, which may hold dots, is in the JSON."""
    from webdataset import TarWriter

    for shard, group in _shards(samples, shard_bytes - TAR_END_BYTES):
        path, num_items = f"{name}-{shard:06d}.tar", 0
        # not ShardWriter: it splits after a shard is too large, and takes a % in a folder's name for a number's place
        with (
            (folder / path).open("xb") as file,
            TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer,
        ):
            for sample in group:
                writer.write({"__key__": f"{sample.facts.number:06d}", **sample.members()})
                num_items += 1
        yield Done(name=path, num_items=num_items)


def write_parquet(folder: Path, name: str, samples: Iterable[Sample], shard_bytes: int) -> Files:
    """NAME-00000.parquet...: a row of typed columns for each item, in groups of a few."""
    import pyarrow.parquet

    schema = parquet_schema()
    # statistics of ids alone: they would hold the smallest and the largest video. H.264 and PNG do not compress
    options = {"compression": "none", "use_dictionary": False, "write_statistics": ID_COLUMNS}
    for shard, group in _shards(samples, shard_bytes):
        path, num_items = f"{name}-{shard:05d}.parquet", 0
        with pyarrow.parquet.ParquetWriter(str(folder / path), schema, **options) as writer:
            for _, rows in _shards(group, ROW_GROUP_BYTES):
                table = pyarrow.Table.from_pylist([_row(sample) for sample in rows], schema=schema)
                writer.write_table(table)
                num_items += len(table)
        yield Done(name=path, num_items=num_items)


def write_folder(folder: Path, name: str, samples: Iterable[Sample], shard_bytes: int) -> Files:
    """<identity>/<prompt_id>.mp4, .png and .json, and one listing of all. Raises ValueError if two would be one file."""
    with (folder / LISTING).open("x", encoding="ascii", newline="\n") as listing:
        for sample in samples:
            if sample.facts.identity.casefold() in RESERVED:
                raise ValueError(f"identity {sample.facts.identity!r}: a file of the export is called so; {_OTHERWISE}")
            (folder / sample.facts.identity).mkdir(exist_ok=True)
            for suffix, data in sample.members().items():
                path = f"{sample.facts.key}.{suffix}"
                try:
                    with (folder / path).open("xb") as file:
                        file.write(data)
                except FileExistsError:
                    raise ValueError(f"{path}: two items of the run would both be this file; {_OTHERWISE}") from None
                yield Done(name=path, num_items=int(suffix == "mp4"))
            listing.write(json.dumps(_listed(sample), allow_nan=False) + "\n")
    yield Done(name=LISTING, num_items=0)


_OTHERWISE = "use --to webdataset or --to parquet"

FORMATS = {
    "webdataset": Format(write_webdataset, "webdataset"),
    "parquet": Format(write_parquet, "pyarrow"),
    "folder": Format(write_folder, ""),
}


def _shards(samples: Iterable[Sample], max_bytes: int) -> Iterator[tuple[int, Iterator[Sample]]]:
    """(number, its samples): as many in their order as fit, but at least one. To be consumed in turn, none is held."""
    for shard, group in groupby(_numbered(samples, max_bytes), key=itemgetter(0)):
        yield shard, map(itemgetter(1), group)


def _numbered(samples: Iterable[Sample], max_bytes: int) -> Iterator[tuple[int, Sample]]:
    shard, num_bytes = 0, 0
    for sample in samples:
        more = sum(len(data) + TAR_MEMBER_BYTES for data in sample.members().values())
        if num_bytes and num_bytes + more > max_bytes:
            shard, num_bytes = shard + 1, 0
        num_bytes += more
        yield shard, sample


def parquet_schema() -> Any:
    """The columns of a row: pyarrow.Schema."""
    import pyarrow as pa

    text, integer, texts = pa.string(), pa.int32(), pa.map_(pa.string(), pa.string())
    provenance = pa.struct(
        {
            "run_digest": text,
            "code_version": text,
            "weights": texts,
            "packages": texts,
            "seed": pa.int64(),
            "seconds": pa.float64(),
            "device": text,
            "num_ranks": integer,
            "created": text,
        }
    )
    columns = {
        **{"number": integer, "key": text, "identity": text, "prompt_id": text},
        **dict.fromkeys(("prompt", "spatial_prompt", "temporal_prompt", "subject"), text),
        **{"take": integer, "seed": pa.int64(), "first_frame_seed": pa.int64(), "similarity": pa.float64()},
        **{"width": integer, "height": integer, "num_frames": integer, "fps": pa.float64()},
        **{"video_sha256": text, "reference_sha256": text},
        **{"scores": pa.map_(text, pa.float64()), "score_reasons": texts, "scorers": texts},
        **{"video": provenance, "first_frame": provenance},
        **{"mp4": pa.binary(), "png": pa.binary(), "reference_png": pa.binary()},
    }
    return pa.schema(columns)


def _row(sample: Sample) -> dict[str, Any]:
    facts = sample.facts
    return {
        **_plain(facts),
        "scores": [(metric, one.value) for metric, one in facts.scores.items()],
        "score_reasons": [(metric, one.reason) for metric, one in facts.scores.items() if one.reason is not None],
        "scorers": [(metric, one.scorer) for metric, one in facts.scores.items() if one.scorer is not None],
        "video": _provenance_row(facts.video),
        "first_frame": _provenance_row(facts.first_frame),
        **{"mp4": sample.mp4, "png": sample.png, "reference_png": sample.reference_png},
    }


def _provenance_row(provenance: Provenance) -> dict[str, Any]:
    maps = {"weights": list(provenance.weights.items()), "packages": list(provenance.packages.items())}
    return asdict(provenance) | maps


def _listed(sample: Sample) -> dict[str, Any]:
    """A line of the listing: the same columns of the same types in each, as Arrow reads it."""
    facts, first_frame = sample.facts, None if sample.png is None else f"{sample.facts.key}.png"
    scores = {metric: one.value for metric, one in facts.scores.items()}
    return {"file_name": f"{facts.key}.mp4", "first_frame_png": first_frame, **_plain(facts), "scores": scores}


def _plain(facts: Facts) -> dict[str, Any]:
    """The facts that are one value each."""
    return {name: value for name, value in asdict(facts).items() if not isinstance(value, dict)}
