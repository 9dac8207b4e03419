"""Claims about a run's folder: decided without a trace, written once and whole, and found again."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import demo_config, write_fake_weights, write_tree

from ipt2v.config import parse_settings
from ipt2v.prompts import FOLDER
from ipt2v.run_dir import WEIGHTS_DIR_VARIABLE, RunDir
from ipt2v.work import open_work
from launch.freeze import Prepared, freeze, prepare


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a test set of three identities, and weights."""
    write_tree(tmp_path / "testset", ("id001", "id002", "id010"))
    write_fake_weights(tmp_path / "weights")
    return tmp_path


def prepared(place: Path, *overrides: str, num_shards: int | None = None) -> Prepared:
    config = demo_config(place / "testset", *overrides)
    return prepare(config, weights_dir=place / "weights", runs_dir=place / "runs", num_shards=num_shards)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """name -> (time of change, inode) of every file and folder."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}


def error_of(place: Path, *overrides: str, num_shards: int | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        prepared(place, *overrides, num_shards=num_shards)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- deciding -----------------------------------------------------------------------------------------------------------


def test_preparing_writes_nothing(place: Path) -> None:
    before = snapshot(place)
    prepared(place)
    assert snapshot(place) == before


def test_a_run_is_named_by_its_settings_and_its_digest(place: Path) -> None:
    one = prepared(place)
    assert one.run.root == place / "runs" / f"demo-{one.environment.run_digest[:8]}"


def test_there_is_a_shard_for_each_identity_unless_said(place: Path) -> None:
    assert [len(items) for items in prepared(place).shards] == [2, 2, 2]
    assert [len(items) for items in prepared(place, num_shards=2).shards] == [4, 2]


def test_the_number_of_shards_does_not_name_another_run(place: Path) -> None:
    assert prepared(place, num_shards=1).run == prepared(place, num_shards=3).run


def test_changed_weights_are_another_run(place: Path) -> None:
    before = prepared(place).run
    (place / "weights" / "Qwen3-8B" / "model.safetensors").write_text("retrained")
    assert prepared(place).run != before


def test_a_changed_photo_is_another_run(place: Path) -> None:
    before = prepared(place).run
    (place / "testset" / "id001" / "image.png").write_bytes((place / "testset" / "id002" / "image.png").read_bytes())
    assert prepared(place).run != before


def test_a_moved_test_set_is_the_same_run(place: Path) -> None:
    before = prepared(place).run
    (place / "testset").rename(place / "moved")
    (place / "testset").symlink_to(place / "nowhere")
    assert prepared(place, f"testset.path={place / 'moved'}").run == before


def test_a_relative_test_set_is_the_same_run_and_is_frozen_absolute(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = prepared(place)
    monkeypatch.chdir(place)
    relative = prepared(place, "testset.path=testset")
    assert (relative.run, relative.environment.run_digest) == (absolute.run, absolute.environment.run_digest)
    run = freeze(relative)
    assert run.config().testset.path == str(place / "testset")
    monkeypatch.chdir("/")
    again = prepare(run.config(), weights_dir=place / "weights", runs_dir=place / "runs")
    assert again.run == run and freeze(again) == run


def test_a_run_that_was_frozen_with_a_relative_test_set_stays_valid(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = freeze(prepared(place))
    run.config_path.write_text(run.config_path.read_text().replace(str(place / "testset"), "testset"))
    assert run.config().testset.path == "testset"
    monkeypatch.chdir(place)
    for overrides in ((), ("testset.path=testset",)):
        again = prepared(place, *overrides)
        assert again.run == run and freeze(again) == run


def test_a_missing_weights_file_is_named_with_its_source(place: Path) -> None:
    missing = place / "weights" / "RealVisXL_V4.0" / "unet" / "diffusion_pytorch_model.safetensors"
    missing.unlink()
    text = error_of(place)
    assert text.startswith(f"first_frame.model: weights file {missing} is missing; ")
    assert "huggingface.co/SG161222/RealVisXL_V4.0" in text and "ipt2v weights toy" in text


def test_a_missing_shard_of_weights_is_named(place: Path) -> None:
    folder = place / "weights" / "Qwen3-8B"
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    )
    (folder / "model-1.safetensors").touch()
    assert f"weights file {folder / 'model-2.safetensors'} is missing" in error_of(place)


def test_weights_of_no_known_source_list_the_known_ones(place: Path) -> None:
    text = error_of(place, "video.model=MyVACE")
    assert "'MyVACE' is no folder that we know a source of" in text and "Wan2.1-VACE-14B-diffusers" in text


def test_a_missing_test_set_is_named(place: Path) -> None:
    assert str(place / "nowhere") in error_of(place, f"testset.path={place / 'nowhere'}")


@pytest.mark.parametrize("name", ["a/b", "/abs", "..", "../up", ".hidden", "", "a b", "x" * 65])
def test_a_name_that_is_no_folder_name_is_refused(place: Path, name: str) -> None:
    values = demo_config(place / "testset").model_dump()
    with pytest.raises(ValueError, match="name: found"):
        parse_settings(type(demo_config(place / "testset")), values | {"name": name}, where="settings")


# --- writing ------------------------------------------------------------------------------------------------------------


def test_a_frozen_run_holds_what_was_prepared(place: Path) -> None:
    one = prepared(place)
    run = freeze(one)
    assert (run.config(), run.environment()) == (one.config, one.environment)
    assert tuple(map(run.shard, range(3))) == one.shards
    assert run.manifest() == tuple(item for items in one.shards for item in items)


def test_a_frozen_run_has_the_prompt_templates_text(place: Path) -> None:
    template = place / "mine.txt"
    template.write_text("Look at {prompt}!\n")
    run = freeze(prepared(place, f"decouple.spatial_template={template}"))
    template.write_text("Something else: {prompt}")
    assert run.config().decouple.spatial_template == "Look at {prompt}!"
    assert run.config().decouple.temporal_template == (FOLDER / "temporal.txt").read_text(encoding="utf-8").strip()


def test_a_changed_template_is_another_run(place: Path) -> None:
    template = place / "mine.txt"
    template.write_text("Look at {prompt}!")
    before = prepared(place, f"decouple.spatial_template={template}").run
    template.write_text("See {prompt}!")
    assert prepared(place, f"decouple.spatial_template={template}").run != before


@pytest.mark.parametrize("text", ["no place for it", None])
def test_a_template_that_cannot_be_filled_is_refused(place: Path, text: str | None) -> None:
    if text is not None:
        (place / "mine.txt").write_text(text)
    assert f"{place / 'mine.txt'}" in error_of(place, f"decouple.spatial_template={place / 'mine.txt'}")


def test_freezing_again_gives_the_same_folder_and_touches_nothing(place: Path) -> None:
    run = freeze(prepared(place))
    before = snapshot(run.root)
    assert freeze(prepared(place)) == run
    assert snapshot(run.root) == before


def test_a_run_that_is_there_keeps_its_shards(place: Path) -> None:
    freeze(prepared(place, num_shards=2))
    assert len(prepared(place).shards) == 2


def test_a_run_follows_weights_that_were_moved(place: Path) -> None:
    run = freeze(prepared(place))
    before, files = run.environment(), snapshot(run.root)
    (place / "weights").rename(place / "moved")
    one = prepare(demo_config(place / "testset"), weights_dir=place / "moved", runs_dir=place / "runs")
    assert snapshot(run.root) == files, "preparing writes nothing"
    assert one.environment.weights_dir == str(place / "moved")
    assert freeze(one) == run
    assert run.environment() == replace(before, weights_dir=str(place / "moved"))
    after = snapshot(run.root)
    assert {name for name in after if after[name] != files.get(name)} == {str(run.root), str(run.environment_path)}


def test_weights_that_are_not_whole_are_not_followed(place: Path) -> None:
    run = freeze(prepared(place))
    with pytest.raises(ValueError, match="is missing"):
        prepare(demo_config(place / "testset"), weights_dir=place / "nowhere", runs_dir=place / "runs")
    assert run.environment().weights_dir == str(place / "weights")


def test_a_job_reads_and_scores_with_the_weights_where_they_are_now(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WEIGHTS_DIR_VARIABLE, raising=False)
    run = freeze(prepared(place))
    (place / "weights").rename(place / "moved")
    freeze(prepare(demo_config(place / "testset"), weights_dir=place / "moved", runs_dir=place / "runs"))
    for stage in ("first_frame", "video", "score"):
        assert open_work(run, stage, 0).weights_dir == place / "moved"


def test_a_rehearsal_follows_no_weights(place: Path) -> None:
    config = demo_config(place / "testset", "rehearsal.enabled=true")
    run = freeze(prepare(config, weights_dir=place / "none", runs_dir=place / "runs"))
    before = snapshot(run.root)
    freeze(prepare(config, weights_dir=place / "others", runs_dir=place / "runs"))
    assert snapshot(run.root) == before


def test_another_number_of_shards_is_refused(place: Path) -> None:
    run = freeze(prepared(place, num_shards=2))
    assert error_of(place, num_shards=3).startswith(f"{run.root}: frozen with 2 shards, asked for 3; ")


@pytest.mark.parametrize("num_shards", [4, -1])
def test_a_number_of_shards_that_cannot_be_is_refused(place: Path, num_shards: int) -> None:
    assert error_of(place, num_shards=num_shards).startswith(f"num_shards: {num_shards} for 3 identities; expected 1..3")


def test_other_users_of_a_lab_can_read_a_run(place: Path) -> None:
    assert freeze(prepared(place)).root.stat().st_mode & 0o777 == 0o755


def test_freezing_leaves_no_scratch(place: Path) -> None:
    run = freeze(prepared(place))
    assert list((place / "runs").iterdir()) == [run.root]
    assert [path for path in run.root.rglob("*") if path.name.startswith(".")] == []


def test_a_folder_in_the_way_that_is_no_run_is_named(place: Path) -> None:
    root = prepared(place).run.root
    root.mkdir(parents=True)
    (root / "notes.txt").touch()
    assert error_of(place).startswith(f"{root}: not a run folder")
    assert os.listdir(root) == ["notes.txt"]


def test_submitters_at_the_same_time_get_one_whole_folder(place: Path) -> None:
    for attempt in range(5):
        plans = [prepared(place, f"seed={attempt}") for _ in range(4)]
        start, runs = threading.Barrier(len(plans)), list[RunDir]()

        def submit(one: Prepared, start: threading.Barrier = start, runs: list[RunDir] = runs) -> None:
            start.wait()
            runs.append(freeze(one))

        threads = [threading.Thread(target=submit, args=(one,)) for one in plans]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert runs == [plans[0].run] * len(plans)
        assert runs[0].manifest() == tuple(item for shard in range(3) for item in runs[0].shard(shard))
    assert len(list((place / "runs").iterdir())) == 5
