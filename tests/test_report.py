"""Claims about the page to look at a run: it shows what is there, why the rest is not, and runs nothing that a prompt says."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import Call
from helpers import first_frame, frozen_run, keys_of, noise_frames, provenance, video_latents, write_tree
from PIL import Image
from report_reader import Page as Read
from report_reader import facts, made_up

from ipt2v import hdf5
from ipt2v.effort import effort_of
from ipt2v.mp4 import middle_frame, read_mp4, write_mp4
from ipt2v.records import Failure, Score, reason_kind
from ipt2v.report import MAX_THUMBNAIL_BYTES, shared_keys, thumbnail, write_report
from ipt2v.report_page import Card, Page, Shown, make_plot, render, safe_json
from ipt2v.run_dir import RunDir, Scoring, seal_shard

EVIL = "</script><script>alert('1')</script><!-- & \"quotes\" {{ 7 * 7 }} \u2028 \u2029 ]]>"
KEY = "id001/prompt1"


def read(run: RunDir, other: RunDir | None = None) -> Read:
    return Read(write_report(run, other).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return frozen_run(tmp_path)


def make(run: RunDir, key: str, *, seconds: float = 1.5, num_ranks: int = 1, device: str = "cpu", **fields: str) -> None:
    """One finished item."""
    made = replace(provenance(run.environment().run_digest), seconds=seconds, num_ranks=num_ranks, device=device)
    hdf5.save_first_frame(run.part_path("first_frame", key), first_frame(key, **fields), made)
    hdf5.save_video_latents(run.part_path("video", key), video_latents(key), made)
    write_mp4(run.mp4_path(key), noise_frames(5), fps=16, crf=18)


def save_scores(run: RunDir, values: dict[str, dict[str, float | None]]) -> None:
    """key -> metric -> value, as the third array leaves them."""
    config = run.config().score.model_copy(update={"metrics": ("arc_sim", "aq")})
    run.save_scoring(Scoring(config=config, weights={}))
    store = run.scores()
    assert store is not None
    common = {
        "seconds": 0.5,
        "device": "cuda:0",
        "created": "2025-01-01T01:00:00.000+00:00",
        "video_sha256": "0" * 64,
        "scorer": "",
    }
    for key, mine in values.items():
        rows = [
            Score(key=key, metric=metric, value=value, reason="no face" if value is None else None, **common)  # type: ignore[arg-type]
            for metric, value in mine.items()
        ]
        store.finish(key, rows)


def evil_run(tmp_path: Path, identity: str) -> RunDir:
    """A run of one identity with a name and a prompt that try to leave the page."""
    write_tree(tmp_path / "testset", (identity,), num_prompts=1)
    (tmp_path / "testset" / identity / "prompt1.txt").write_text(EVIL, encoding="utf-8")
    return frozen_run(tmp_path)


def test_a_page_of_nothing_made_lists_every_item_with_its_photo(run: RunDir) -> None:
    page = read(run)
    assert list(page.items()) == keys_of(run.manifest())
    for item in run.manifest():
        take = page.take(item.key)
        assert (take["prompt"], list(take["pictures"]), take["video"]) == (item.prompt, ["reference"], "")
    assert len(page.pictures) == 2  # two people, two prompts each: a photo is in the page once


def test_a_page_shows_what_is_made(run: RunDir) -> None:
    make(run, "id001/prompt2", spatial_prompt="a green hat")
    take = read(run).take("id001/prompt2")
    assert (take["spatial"], take["temporal"]) == ("a green hat", "She walks as id001/prompt2.")
    assert set(take["pictures"]) == {"reference", "cutout", "first_frame", "still"}
    assert (take["attempts"], take["similarity"], take["rejected"]) == (2, 0.5, False)
    assert run.root / take["video"] == run.mp4_path("id001/prompt2")
    assert take["seconds"] == {"first_frame": 1.5, "video": 1.5}


def test_a_page_of_a_sealed_shard_is_the_same(run: RunDir) -> None:
    make(run, KEY)
    before = write_report(run).read_bytes()
    for stage in ("first_frame", "video"):
        seal_shard(run, stage, 0, run.shard_keys(0))
    assert write_report(run).read_bytes() == before


def test_every_picture_is_a_small_jpeg_in_the_page_itself(run: RunDir) -> None:
    make(run, KEY)
    page = read(run)
    assert [Image.open(io.BytesIO(picture)).format for picture in page.pictures] == ["JPEG"] * len(page.pictures)
    assert not re.search(r"https?://", page.source.partition("</style>")[2].replace("http://www.w3.org", ""))
    assert not {"link", "iframe", "object", "img"} & page.names()


@pytest.mark.parametrize("shape", [(480, 832, 3), (1200, 900, 3), (16, 16, 3)])
def test_a_thumbnail_of_anything_is_small(shape: tuple[int, ...]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert len(thumbnail(noise)) <= MAX_THUMBNAIL_BYTES
    flat = Image.open(io.BytesIO(thumbnail(np.full(shape, 90, np.uint8))))
    assert max(flat.size) == min(240, max(shape))


def test_failures_stand_together_by_reason(run: RunDir) -> None:
    for key, pixels in (("id001/prompt1", 63), ("id002/prompt1", 12)):
        run.save_failure(Failure(key=key, stage="first_frame", reason=f"{key}: face of {pixels} px <b>"))
    run.save_failure(Failure(key="id002/prompt2", stage="video", reason="out of memory"))
    page = read(run)
    assert page.take("id001/prompt1")["failure"] == "first_frame: id001/prompt1: face of 63 px <b>"
    failures = " ".join(page.text.partition("What failed, by reason")[2].partition("Items")[0].split())
    assert failures == (
        "2 first frame id001/prompt1: face of 63 px <b> id001/prompt1 id002/prompt1 1 video out of memory id002/prompt2"
    )


def test_reasons_are_of_one_kind_whatever_the_item_its_numbers_and_paths() -> None:
    one = reason_kind("id1/p1: face of 63 px in /data/id1/a.png, 'x'", "id1/p1")
    assert one == reason_kind("id2/p9: face of 1.5 px in /data/id2/b.png, 'yy'", "id2/p9")
    assert one != reason_kind("id1/p1: no face", "id1/p1")


def test_a_photo_that_is_gone_is_told_on_each_of_its_items(run: RunDir) -> None:
    photo = Path(run.manifest()[0].reference)
    photo.unlink()
    page = read(run)
    for key in ("id001/prompt1", "id001/prompt2"):
        [trouble] = page.take(key)["troubles"]
        assert trouble.startswith(f"reference {photo} cannot be read")
    assert page.take("id002/prompt1")["troubles"] == []


def test_a_video_that_does_not_decode_is_told_and_stops_no_page(run: RunDir) -> None:
    make(run, KEY)
    make(run, "id001/prompt2")
    whole = run.mp4_path(KEY).read_bytes()
    run.mp4_path(KEY).write_bytes(whole[: len(whole) // 3])
    page = read(run)
    [trouble] = page.take(KEY)["troubles"]
    assert str(run.mp4_path(KEY)) in trouble and "submit again" in trouble
    assert page.take(KEY)["video"] == ""
    assert page.take("id001/prompt2")["video"] != ""


@pytest.mark.parametrize("stage", ["first_frame", "video"])
def test_a_record_that_does_not_open_is_told_on_its_card(run: RunDir, stage: str) -> None:
    make(run, KEY)
    run.part_path(stage, KEY).write_bytes(b"no HDF5")
    page = read(run)
    [trouble] = page.take(KEY)["troubles"]
    assert trouble.startswith(f"{run.part_path(stage, KEY)}: not a readable HDF5 file")
    assert page.take(KEY)["video"] != ""
    assert "unreadable" in page.text


def test_a_record_with_any_byte_changed_stops_no_page(run: RunDir) -> None:
    make(run, KEY)
    part = run.part_path("first_frame", KEY)
    whole = part.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        assert KEY in read(run).items()


def test_a_sealed_shard_that_does_not_open_is_told_at_the_top(run: RunDir) -> None:
    run.sealed_path("video", 0).parent.mkdir(parents=True)
    run.sealed_path("video", 0).write_bytes(b"no HDF5")
    page = read(run)
    assert page.text.count("not a readable HDF5 file") == 1
    assert len(page.items()) == 4


def test_identities_and_prompts_are_text_never_markup(tmp_path: Path) -> None:
    identity = '"><img src=x onerror=alert(2)><'
    run = evil_run(tmp_path, identity)
    key = f"{identity}/prompt1"
    make(run, key, spatial_prompt=EVIL)
    run.save_failure(Failure(key=key, stage="video", reason=f"{key}: {EVIL}"))
    harmless, page = read(frozen_run(tmp_path / "other")), read(run)
    assert "img" not in page.names()
    assert len([attributes for attributes, _ in page.scripts if "type" not in attributes]) == 1
    assert {name for _, attributes in page.tags for name in attributes if name.startswith("on")} == set()
    assert page.take(key)["prompt"] == EVIL.strip() and page.take(key)["spatial"] == EVIL
    assert identity in page.text and EVIL in page.text  # among the failures
    assert page.source.count("<script") == harmless.source.count("<script")
    assert "\u2028" not in page.source.partition('id="data">')[2]


def test_json_in_a_page_ends_no_script() -> None:
    value = {"<!--": [EVIL, "\ud800", "名前", 1.5, None]}
    text = safe_json(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text) and text.isascii()


def test_a_name_of_a_run_and_a_metric_are_text_too() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    take = Card(prompt=hostile, scores={hostile: 1.0}, failure=f"{hostile}: {hostile}", troubles=(hostile,))
    shown = Shown(facts=replace(facts(hostile), problems=(hostile,), code_version=hostile), cards={f"{hostile}/1": take})
    page = Read(render(Page(runs=(shown, shown))))
    assert "img" not in page.names()
    assert hostile in page.text


def test_the_page_lets_its_own_script_run_and_no_other(run: RunDir) -> None:
    page = read(run)
    [policy] = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes and tag == "meta"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    [script] = [body for attributes, body in page.scripts if not attributes]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert "innerHTML" not in script and "insertAdjacent" not in script and "document.write" not in script


@pytest.mark.parametrize("identity", ["a#b", "a?b", "100%41", "with blank", "anna & bob", "名前", "a:b"])
def test_the_link_to_a_video_leads_to_its_file(tmp_path: Path, identity: str) -> None:
    run = evil_run(tmp_path, identity)
    make(run, f"{identity}/prompt1")
    url = read(run).take(f"{identity}/prompt1")["video"]
    assert re.fullmatch(r"[A-Za-z0-9_.~%/-]+", url)
    assert run.root / unquote(url) == run.mp4_path(f"{identity}/prompt1")


def test_toy_weights_are_announced(run: RunDir) -> None:
    assert "Toy weights" not in read(run).text
    (Path(run.environment().weights_dir) / "Qwen3-8B" / "TOY.txt").touch()
    assert "Toy weights" in read(run).text


def test_the_summary_counts_stages_and_hours(run: RunDir) -> None:
    make(run, KEY, seconds=3600.0, num_ranks=8, device="cuda:0")
    make(run, "id001/prompt2", seconds=1800.0, num_ranks=8, device="cuda:0")
    run.save_failure(Failure(key="id002/prompt1", stage="first_frame", reason="no face"))
    text = " ".join(read(run).text.split())
    assert "96×64, 16 fps" in text and run.environment().run_digest[:12] in text
    assert "GPU-hours first frame 2 1 1 2700.0 5,400 1.5 video 2 1 1 2700.0 5,400 12.0" in text


def test_hours_on_a_cpu_are_no_gpu_hours(run: RunDir) -> None:
    make(run, KEY, seconds=3600.0, num_ranks=2)
    text = " ".join(read(run).text.split())
    assert "CPU rank-hours first frame 1 0 3 3600.0 3,600 1 video 1 0 3 3600.0 3,600 2" in text
    assert "GPU-hours" not in text


@pytest.mark.parametrize(("stage", "hours"), [("first_frame", 1.5), ("video", 6.0)])
def test_a_video_is_made_by_all_ranks_a_first_frame_by_one(stage: str, hours: float) -> None:
    made = replace(provenance("0"), seconds=5400.0, num_ranks=4, device="cuda:1")
    assert effort_of(made, stage).rank_seconds == hours * 3600


def test_scores_are_in_the_table_on_the_cards_and_in_plots(run: RunDir) -> None:
    make(run, KEY)
    make(run, "id001/prompt2")
    save_scores(run, {KEY: {"arc_sim": None, "aq": 0.5}, "id001/prompt2": {"arc_sim": 0.25, "aq": 0.75}})
    page = read(run)
    text = " ".join(page.text.split())
    assert f"{run.root.name} 0.250 ∅1 0.625" in text
    assert "paper, Table 1" in text
    assert [metric["name"] for metric in page.data["metrics"]] == ["arc_sim", "aq"]
    assert page.take(KEY)["scores"] == {"arc_sim": None, "aq": 0.5}
    assert page.take(KEY)["no_score"] == {"arc_sim": "no face"}
    assert page.take(KEY)["seconds"]["score"] == 1.0
    plots = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert "histogram of AQ↑, from 0.5 to 0.75" in plots


def test_a_table_of_scores_that_is_damaged_is_told_and_the_rest_is_shown(run: RunDir) -> None:
    save_scores(run, {KEY: {"arc_sim": 0.5, "aq": 0.5}})
    store = run.scores()
    assert store is not None
    store.part_path(KEY).write_text("what is this\n1\n")
    assert "no table of scores" in read(run).text
    run.scoring_path.write_text("{}")
    page = read(run)
    assert "delete it and submit again" in page.text and len(page.items()) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_none(value: float) -> None:
    shown = Shown(
        facts=facts(), cards={"a/1": Card(prompt="", scores={"aq": value}), "a/2": Card(prompt="", scores={"aq": 0.5})}
    )
    assert Read(render(Page(runs=(shown,)))).take("a/1")["scores"] == {"aq": None}


def test_a_plot_holds_every_value_once() -> None:
    plot = make_plot("AQ", [[0.0, 0.1, 1.0], [0.5]])
    assert plot is not None
    counts = [(bar.run, int(bar.text.split()[0])) for bar in plot.bars]
    assert sum(count for run, count in counts if run == 0) == 3
    assert sum(count for run, count in counts if run == 1) == 1
    assert (plot.low, plot.high, plot.medians) == ("0", "1", ("0.1", "0.5"))
    assert make_plot("AQ", [[], []]) is None
    assert make_plot("AQ", [[3.0, 3.0]]) is not None


def test_two_runs_stand_side_by_side_matched_by_key(tmp_path: Path) -> None:
    run = frozen_run(tmp_path)
    write_tree(tmp_path / "else" / "testset", ("id002", "id003"))
    other = frozen_run(tmp_path / "else")
    make(run, "id002/prompt1")
    make(other, "id002/prompt1")
    for one, value in ((run, 0.25), (other, 0.75)):
        save_scores(one, {"id002/prompt1": {"arc_sim": value, "aq": 0.5}})
    page = read(run, other)
    assert {key: [take is not None for take in takes] for key, takes in page.items().items()} == {
        **{f"id001/prompt{number}": [True, False] for number in (1, 2)},
        **{f"id002/prompt{number}": [True, True] for number in (1, 2)},
        **{f"id003/prompt{number}": [False, True] for number in (1, 2)},
    }
    assert shared_keys(run, other) == ["id002/prompt1", "id002/prompt2"]
    mine, theirs = page.items()["id002/prompt1"]
    assert (run.root / unquote(theirs["video"])).resolve() == other.mp4_path("id002/prompt1").resolve()
    assert (mine["scores"]["arc_sim"], theirs["scores"]["arc_sim"]) == (0.25, 0.75)
    assert f"{other.root.name} − {run.root.name} +0.500" in " ".join(page.text.split())


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    run, other = frozen_run(tmp_path / "a"), frozen_run(tmp_path / "b")
    assert run.root.name == other.root.name
    assert [one["name"] for one in read(run, other).data["runs"]] == [str(run.root), str(other.root)]


def test_a_page_of_a_thousand_items_is_of_bounded_size() -> None:
    text = render(Page(runs=(made_up("big", 1000, ["v.mp4"]),)))
    assert len(Read(text).items()) == 1000
    assert len(text) < 35_000_000


@pytest.mark.parametrize("num_frames", [1, 2, 5, 17, 300])
def test_the_middle_frame_is_that_of_the_whole_video(tmp_path: Path, num_frames: int) -> None:
    path = tmp_path / "video.mp4"
    write_mp4(path, noise_frames(num_frames, height=32, width=48), fps=24, crf=18)
    np.testing.assert_array_equal(middle_frame(path), read_mp4(path)[num_frames // 2])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_a_video_cut_before_its_middle_has_no_middle_frame(tmp_path: Path, share: float) -> None:
    path = tmp_path / "video.mp4"
    write_mp4(path, noise_frames(17), fps=16, crf=18)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        middle_frame(path)


def test_the_command_tells_where_the_page_is_and_how_much_both_runs_share(ipt2v: Call, tmp_path: Path) -> None:
    run, other = frozen_run(tmp_path / "a"), frozen_run(tmp_path / "b", "seed=7")
    answer = ipt2v("report", run.root)
    assert (answer.code, answer.out) == (0, f"{run.root / 'report.html'}\n")
    assert ipt2v("report", run.root, other.root).out.splitlines()[1] == "4 items are in both runs"
    assert len(Read((run.root / "report.html").read_text(encoding="utf-8")).data["runs"]) == 2
    assert ipt2v("report", tmp_path).code == 2
