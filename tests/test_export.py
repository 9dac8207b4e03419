"""Claims about a shared run: each format's own library reads back what was made, and nothing is there before all is."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import Call
from helpers import first_frame, frozen_run, noise_frames, provenance, video_latents
from PIL import Image

from ipt2v import hdf5
from ipt2v.atomic import write_text
from ipt2v.config import AcceptConfig, ScoreConfig, Scoring, run_digest
from ipt2v.export import ExportOptions, write_export
from ipt2v.export_formats import FORMATS
from ipt2v.manifest import dumps_manifest, manifest_digest
from ipt2v.mp4 import write_mp4
from ipt2v.records import Failure, Score
from ipt2v.references import load_reference
from ipt2v.run_dir import RunDir, seal_shard
from ipt2v.takes import make_room
from launch.cli_delivery import ExportFormat

SCORING = Scoring(
    config=ScoreConfig(metrics=("arc_sim", "dd"), accept=AcceptConfig(at_least={"arc_sim": 0.3}, max_takes=2)), weights={}
)
KEYS = ["id001/prompt1", "id001/prompt2", "id002/prompt1", "id002/prompt2"]
VIDEO_SEED, FRAME_SEED = 2**63 - 1, 8
WIDTH, HEIGHT = 96, 64


def deliver(run: RunDir, key: str, *, arc_sim: float = 0.5, seed: int = 0) -> bytes:
    """A first frame, latents, an MP4 and scores of one item, one of them without a value; the MP4's bytes."""
    digest, store = run.environment().run_digest, run.scores()
    assert store is not None
    made = replace(provenance(digest), seed=FRAME_SEED)
    hdf5.save_first_frame(run.part_path("first_frame", key), first_frame(key), made)
    hdf5.save_video_latents(run.part_path("video", key), video_latents(key), replace(made, seed=VIDEO_SEED))
    write_mp4(run.mp4_path(key), noise_frames(5, HEIGHT, WIDTH, seed=seed), fps=16, crf=30)
    mp4 = run.mp4_path(key).read_bytes()
    about = {"key": key, "seconds": 1.0, "device": "cpu", "created": "2026-01-01", "scorer": "0123456789ab"}
    about["video_sha256"] = hashlib.sha256(mp4).hexdigest()
    rows = [Score(metric="arc_sim", value=arc_sim, reason=None, **about), Score(metric="dd", value=None, reason="no", **about)]
    store.finish(key, rows)
    return mp4


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Two identities of two prompts, all delivered; the records of the first shard are sealed."""
    run = frozen_run(tmp_path, num_shards=2)
    run.save_scoring(SCORING)
    for number, key in enumerate(KEYS):
        deliver(run, key, seed=number)
    for stage in ("first_frame", "video"):
        seal_shard(run, stage, 0, run.shard_keys(0))
    return run


class Shared(NamedTuple):
    """One item, as a format's library has read it."""

    facts: dict[str, Any]
    mp4: bytes
    png: bytes
    reference_png: bytes | None


def read_webdataset(folder: Path) -> Iterator[Shared]:
    from webdataset import WebDataset

    for one in WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False):
        facts = json.loads(one["json"])
        assert one["__key__"] == f"{facts['number']:06d}"
        yield Shared(facts, one["mp4"], one["png"], one.get("reference.png"))


def read_parquet(folder: Path) -> Iterator[Shared]:
    import pyarrow.parquet

    for path in sorted(folder.glob("*.parquet")):
        for row in pyarrow.parquet.read_table(path).to_pylist(maps_as_pydicts="strict"):
            pictures = (row.pop("mp4"), row.pop("png"), row.pop("reference_png"))
            reasons, scorers = row.pop("score_reasons"), row.pop("scorers")
            row["scores"] = {
                metric: {"value": value, "reason": reasons.get(metric), "scorer": scorers.get(metric)}
                for metric, value in row["scores"].items()
            }
            yield Shared(row, *pictures)


def read_folder(folder: Path) -> Iterator[Shared]:
    for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        mp4 = folder / row["file_name"]
        facts = json.loads(mp4.with_suffix(".json").read_text())
        assert {name: facts[name] for name in row.keys() & facts.keys() - {"scores"}} == {
            name: value for name, value in row.items() if name in facts and name != "scores"
        }
        assert row["scores"] == {metric: one["value"] for metric, one in facts["scores"].items()}
        reference = mp4.with_suffix(".reference.png")
        png = (folder / row["first_frame_png"]).read_bytes()
        yield Shared(facts, mp4.read_bytes(), png, reference.read_bytes() if reference.exists() else None)


READERS = {"webdataset": read_webdataset, "parquet": read_parquet, "folder": read_folder}
every_format = pytest.mark.parametrize("to", READERS)


def shared(run: RunDir, out: Path, to: str, **options: Any) -> dict[str, Shared]:
    """Key -> what a reader of the export finds."""
    write_export(run, out, ExportOptions(to=to, **options))
    return {one.facts["key"]: one for one in READERS[to](out)}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())  # type: ignore[no-any-return]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png), formats=["PNG"]))


# --- what is shared -----------------------------------------------------------------------------------------------------


@every_format
def test_each_formats_own_library_reads_back_what_was_made(run: RunDir, tmp_path: Path, to: str) -> None:
    found = shared(run, tmp_path / "out", to)
    assert list(found) == KEYS
    items = {item.key: item for item in run.manifest()}
    for number, (key, one) in enumerate(found.items()):
        frame, mp4 = first_frame(key), run.mp4_path(key).read_bytes()
        made = replace(provenance(run.environment().run_digest), seed=FRAME_SEED)
        assert one.mp4 == mp4
        assert np.array_equal(pixels(one.png), frame.image_HWC)
        assert one.reference_png is None
        assert one.facts == {
            "number": number,
            "key": key,
            "identity": items[key].identity,
            "prompt_id": items[key].prompt_id,
            "prompt": items[key].prompt,
            "spatial_prompt": frame.spatial_prompt,
            "temporal_prompt": frame.temporal_prompt,
            "subject": frame.subject,
            "take": 1,
            "seed": VIDEO_SEED,
            "first_frame_seed": FRAME_SEED,
            "similarity": 0.5,
            "width": WIDTH,
            "height": HEIGHT,
            "num_frames": 5,
            "fps": 16.0,
            "video_sha256": hashlib.sha256(mp4).hexdigest(),
            "reference_sha256": items[key].reference_sha256,
            "scores": {
                "arc_sim": {"value": 0.5, "reason": None, "scorer": "0123456789ab"},
                "dd": {"value": None, "reason": "no", "scorer": "0123456789ab"},
            },
            "video": asdict(replace(made, seed=VIDEO_SEED)),
            "first_frame": asdict(made),
        }


@every_format
def test_two_exports_are_the_same_to_the_byte(run: RunDir, tmp_path: Path, to: str) -> None:
    shared(run, tmp_path / "one", to)
    shared(run, tmp_path / "two", to)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_tars_say_nothing_of_who_wrote_them_and_when(run: RunDir, tmp_path: Path) -> None:
    shared(run, tmp_path / "out", "webdataset")
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:3]] == ["000000.json", "000000.mp4", "000000.png"]
    assert {(one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) for one in members} == {(0, 0, 0, "", "", 0o644)}


@every_format
def test_the_manifest_has_every_file_with_its_checksum(run: RunDir, tmp_path: Path, to: str) -> None:
    shared(run, tmp_path / "out", to)
    manifest, files = manifest_of(tmp_path / "out"), bytes_of(tmp_path / "out")
    del files["manifest.json"]
    expected = {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
    assert {name: (file["sha256"], file["bytes"]) for name, file in manifest["files"].items()} == expected
    assert (manifest["num_items"], sum(file["items"] for file in manifest["files"].values())) == (4, 4)
    assert (manifest["run_digest"], manifest["left_out"]) == (run.environment().run_digest, [])


@every_format
def test_nothing_that_is_shared_tells_where_it_was_made(run: RunDir, tmp_path: Path, to: str) -> None:
    shared(run, tmp_path / "out", to, with_references=True)
    assert [name for name, data in bytes_of(tmp_path / "out").items() if str(tmp_path).encode() in data] == []


@every_format
def test_photos_of_the_test_set_are_shared_only_if_asked_for(run: RunDir, tmp_path: Path, to: str) -> None:
    found = shared(run, tmp_path / "out", to, with_references=True)
    for item in run.manifest():
        png = found[item.key].reference_png
        assert png is not None and np.array_equal(pixels(png), load_reference(item))


@every_format
def test_a_kept_take_is_shared_with_its_own_records_when_it_is_the_better_one(run: RunDir, tmp_path: Path, to: str) -> None:
    key = KEYS[1]
    kept = deliver(run, key, arc_sim=0.25, seed=10)
    make_room(run, 0, [key])
    deliver(run, key, arc_sim=0.125, seed=11)
    one = shared(run, tmp_path / "out", to)[key]
    assert (one.mp4, one.facts["take"], one.facts["scores"]["arc_sim"]["value"]) == (kept, 1, 0.25)
    for stage in ("first_frame", "video"):  # the later take's are damaged, which does not matter
        run.part_path(stage, key).write_bytes(b"")
    assert shared(run, tmp_path / "out", to)[key].mp4 == kept
    deliver(run, key, arc_sim=0.375, seed=12)
    assert shared(run, tmp_path / "out", to)[key].facts["take"] == 2


def test_a_score_of_another_file_is_none_of_this_video(run: RunDir, tmp_path: Path) -> None:
    write_mp4(run.mp4_path(KEYS[0]), noise_frames(5, HEIGHT, WIDTH, seed=99), fps=16, crf=30)
    scores = shared(run, tmp_path / "out", "folder")[KEYS[0]].facts["scores"]
    assert {(one["value"], one["reason"]) for one in scores.values()} == {
        (None, "was measured of another file than this video")
    }


@every_format
def test_what_is_not_measured_yet_has_no_value_and_the_same_columns(run: RunDir, tmp_path: Path, to: str) -> None:
    store = run.scores()
    assert store is not None
    store.forget(0, KEYS[:1])
    found = shared(run, tmp_path / "out", to)
    assert [list(one.facts["scores"]) for one in found.values()] == [["arc_sim", "dd"]] * 4
    unknown = {"value": None, "reason": "not measured yet", "scorer": None}
    assert list(found[KEYS[0]].facts["scores"].values()) == [unknown] * 2


@every_format
def test_a_video_that_started_from_the_photo_alone_has_no_first_frame(run: RunDir, tmp_path: Path, to: str) -> None:
    made, record = provenance(run.environment().run_digest), replace(first_frame(KEYS[2]), image_HWC=None)
    hdf5.save_first_frame(run.part_path("first_frame", KEYS[2]), record, made)
    write_export(run, tmp_path / "out", ExportOptions(to=to))
    assert manifest_of(tmp_path / "out")["num_items"] == 4
    if to == "folder":
        assert not (tmp_path / "out" / f"{KEYS[2]}.png").exists()


@every_format
def test_ids_with_dots_and_blanks_and_prompts_of_any_script_come_through(tmp_path: Path, to: str) -> None:
    run = hostile_run(tmp_path, identity="a.b c%d", prompt_id="p.png", prompt="雨 \u2028 {a..b} \x1b[1m")
    (one,) = shared(run, tmp_path / "out", to).values()
    assert (one.facts["key"], one.facts["prompt"]) == ("a.b c%d/p.png", "雨 \u2028 {a..b} \x1b[1m")


# --- shards -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("to", "suffix"), [("webdataset", ".tar"), ("parquet", ".parquet")])
def test_shards_are_no_larger_than_asked_for_and_hold_every_item_once(
    run: RunDir, tmp_path: Path, to: str, suffix: str
) -> None:
    for key in KEYS:  # 0.4 MB each: two of them fit
        with run.mp4_path(key).open("ab") as file:
            file.write(np.random.default_rng(0).bytes(400_000))
    assert list(shared(run, tmp_path / "out", to, shard_mb=1)) == KEYS
    files = sorted((tmp_path / "out").glob(f"*{suffix}"))
    assert [file["items"] for file in manifest_of(tmp_path / "out")["files"].values()] == [2, 2]
    digits = {"webdataset": 6, "parquet": 5}[to]
    assert [path.name for path in files] == [f"{run.root.name}-{number:0{digits}d}{suffix}" for number in (0, 1)]
    assert max(path.stat().st_size for path in files) <= 1_000_000


def test_an_item_larger_than_a_shard_has_one_of_its_own(run: RunDir, tmp_path: Path) -> None:
    with run.mp4_path(KEYS[1]).open("ab") as file:
        file.write(bytes(2_000_000))
    shared(run, tmp_path / "out", "webdataset", shard_mb=1)
    assert [file["items"] for file in manifest_of(tmp_path / "out")["files"].values()] == [1, 1, 2]


def test_row_groups_are_small(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    monkeypatch.setattr("ipt2v.export_formats.ROW_GROUP_BYTES", 100_000)
    shared(run, tmp_path / "out", "parquet")
    (path,) = (tmp_path / "out").glob("*.parquet")
    metadata = pyarrow.parquet.ParquetFile(path).metadata
    assert metadata.num_row_groups > 1
    assert all(metadata.row_group(group).total_byte_size < 150_000 for group in range(metadata.num_row_groups))


# --- what is left out, and refused --------------------------------------------------------------------------------------


@every_format
def test_what_has_no_video_is_left_out_named_and_counted(run: RunDir, tmp_path: Path, to: str) -> None:
    for key in KEYS[:3]:
        run.mp4_path(key).unlink()
    run.save_failure(Failure(key=KEYS[1], stage="first_frame", reason="no face"))
    deliver(run, KEYS[2])
    run.part_path("first_frame", KEYS[2]).unlink()
    found = shared(run, tmp_path / "out", to)
    assert [(key, one.facts["number"]) for key, one in found.items()] == [(KEYS[3], 3)]
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["num_items"], manifest["num_left_out"]) == (1, 3)
    assert manifest["left_out"] == [
        {"key": KEYS[0], "reason": "no video yet"},
        {"key": KEYS[1], "reason": "failed in first_frame: no face"},
        {"key": KEYS[2], "reason": "no first_frame record says how the video was made"},
    ]


def test_a_file_that_is_no_video_and_a_damaged_record_are_left_out(run: RunDir, tmp_path: Path) -> None:
    run.mp4_path(KEYS[2]).write_bytes(b"not an MP4")
    run.part_path("video", KEYS[3]).write_bytes(b"not HDF5")
    assert list(shared(run, tmp_path / "out", "folder")) == KEYS[:2]
    reasons = [one["reason"] for one in manifest_of(tmp_path / "out")["left_out"]]
    assert ["not a readable MP4" in reasons[0], "not a readable HDF5 file" in reasons[1]] == [True, True]


def test_a_run_without_videos_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to export: id001/prompt1: no video yet"):
        write_export(frozen_run(tmp_path), tmp_path / "out", ExportOptions(to="folder"))
    assert not (tmp_path / "out").exists()


def hostile_run(tmp_path: Path, *, identity: str = "id001", prompt_id: str = "prompt1", prompt: str = "p") -> RunDir:
    """A run of one item whose frozen files agree with each other, but which no reader of test sets has seen."""
    made = frozen_run(tmp_path, num_shards=1)
    run = RunDir(tmp_path / "hostile run")
    shutil.copytree(made.root, run.root)
    run.save_scoring(SCORING)
    item = replace(run.manifest()[0], identity=identity, prompt_id=prompt_id, prompt=prompt)
    environment, config = run.environment(), run.config()
    digest = manifest_digest([item])
    for path in (run.manifest_path, run.shard_path(0)):
        write_text(path, dumps_manifest([item]))
    run_digest_ = run_digest(config, manifest_digest=digest, weights=environment.weights)
    changed = replace(environment, manifest_digest=digest, run_digest=run_digest_)
    write_text(run.environment_path, json.dumps(asdict(changed)))
    if not set("/\\") & set(identity + prompt_id) and ".." not in (identity, prompt_id):
        deliver(run, item.key)
    return run


@every_format
@pytest.mark.parametrize("names", [{"identity": ".."}, {"prompt_id": "../../evil"}, {"identity": "/tmp"}, {"identity": ".x"}])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, to: str, names: dict[str, str]) -> None:
    run = hostile_run(tmp_path, **names)
    with pytest.raises(ValueError, match=r"manifest\.jsonl: (identity|prompt_id) .* expected 1\.\.100 characters"):
        write_export(run, tmp_path / "out", ExportOptions(to=to))
    assert not (tmp_path / "out").exists()


def test_an_identity_called_as_a_file_of_the_export_is_refused_where_it_would_be_one(tmp_path: Path) -> None:
    run = hostile_run(tmp_path, identity="manifest.json")
    with pytest.raises(ValueError, match="a file of the export is called so; use --to webdataset"):
        write_export(run, tmp_path / "out", ExportOptions(to="folder"))
    assert list(shared(run, tmp_path / "out", "webdataset")) == ["manifest.json/prompt1"]


@pytest.mark.parametrize(("to", "library"), [("webdataset", "webdataset"), ("parquet", "pyarrow")])
def test_a_missing_library_is_named_with_the_line_that_installs_it(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"--to {to} needs {library}, .* pip install 'ipt2v\[export\]'"):
        write_export(run, tmp_path / "out", ExportOptions(to=to))
    assert len(shared(run, tmp_path / "out", "folder")) == 4, "plain files need neither"


def test_a_disk_that_is_too_small_is_told_first(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"out: the export takes up to 0\.\d\d GB, but its disk has 0\.00 GB free"):
        write_export(run, tmp_path / "out", ExportOptions(to="folder"))


# --- whole or not there -------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """As Ctrl-C."""


def stop_at(number: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done == number:
            raise Stopped

    return progress


@every_format
@pytest.mark.parametrize("there_before", [False, True])
def test_an_interrupted_export_leaves_what_was_there(run: RunDir, tmp_path: Path, to: str, there_before: bool) -> None:
    place = tmp_path / "place"
    if there_before:
        write_export(run, place / "out", ExportOptions(to="folder"))
    before = bytes_of(place)
    with pytest.raises(Stopped):
        write_export(run, place / "out", ExportOptions(to=to), progress=stop_at(3))
    assert bytes_of(place) == before
    assert [path.name for path in place.iterdir()] == ["out"] * there_before


def test_an_earlier_export_of_the_run_is_replaced(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "place" / "out").mkdir(parents=True)
    for to in ("folder", "webdataset", "folder"):
        shared(run, tmp_path / "place" / "out", to)
    shared(run, tmp_path / "other", "folder")
    assert bytes_of(tmp_path / "place" / "out") == bytes_of(tmp_path / "other")
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]


@pytest.mark.parametrize("whose", ["somebody's", "a package's", "another run's", "ours and somebody's", "a file"])
def test_a_folder_with_anything_else_in_it_is_refused_and_left_alone(run: RunDir, tmp_path: Path, whose: str) -> None:
    out = tmp_path / "out"
    if whose == "a file":
        out.write_text("mine")
    elif whose in ("another run's", "ours and somebody's"):
        shared(run, out, "folder")
    else:
        out.mkdir()
    if whose == "another run's":
        write_text(out / "manifest.json", json.dumps(manifest_of(out) | {"run_digest": "0" * 64}))
    elif whose == "a package's":
        write_text(out / "manifest.json", json.dumps({"videos": []}))
    elif whose != "a file":
        (out / "id001").mkdir(exist_ok=True)
        (out / "id001" / "notes.txt").write_text("mine")
    before = bytes_of(tmp_path)
    with pytest.raises(ValueError, match=r"name (a|another) folder"):
        write_export(run, out, ExportOptions(to="folder"))
    assert bytes_of(tmp_path) == before


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_knows_every_format() -> None:
    assert [one.value for one in ExportFormat] == list(FORMATS)


def test_the_command_says_a_line_a_shard_and_what_was_left_out(run: RunDir, tmp_path: Path, ipt2v: Call) -> None:
    out = tmp_path / "out"
    answer = ipt2v("export", run.root, "--to", "parquet", "--out", out)
    assert answer.code == 0
    assert answer.out.splitlines()[0].startswith(f"{run.root.name}-00000.parquet  4 videos, ")
    assert answer.out.splitlines()[1].startswith(f"{out}  4 videos, 1 files, ")
    run.mp4_path(KEYS[0]).unlink()
    answer = ipt2v("export", run.root, "--to", "webdataset", "--out", out)
    assert answer.code == 1
    assert answer.err == f"left out: {KEYS[0]}: no video yet\n"
    assert f"{out}  3 videos, 1 left out, 1 files, " in answer.out


def test_the_command_refuses_in_one_line(run: RunDir, tmp_path: Path, ipt2v: Call) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    answer = ipt2v("export", run.root, "--to", "folder", "--out", tmp_path / "full")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert ipt2v("export", run.root, "--to", "zip", "--out", tmp_path / "new").code == 2
    assert ipt2v("export", tmp_path, "--to", "folder", "--out", tmp_path / "new").code == 2
    assert not (tmp_path / "new").exists()
