"""Claims about `ipt2v weights list | fetch | check`: the real huggingface_hub against a hub on this machine."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_hub import COMMIT, FakeHub, running_hub
from helpers import ROOT, demo_config, run_command, run_python, write_fake_weights
from safetensors.numpy import save
from typer.testing import CliRunner, Result

from ipt2v.config import RunConfig
from ipt2v.models.catalogue import check_weights, find_problems, folders, loads, needed_files, transformer_sizes
from ipt2v.models.download import unpack
from ipt2v.models.faces import PACK_FILES
from ipt2v.models.fetch import Wanted, fetch
from ipt2v.models.published import published_files
from ipt2v.models.score_weights import SCORE_FILES
from ipt2v.models.sources import SOURCES, Download, Repository, Source, source_of
from ipt2v.models.toy import TOY_MARK
from ipt2v.models.weight_files import RECORD, Expected, problem_of, readable_size
from launch import cli
from launch.weights import wanted_folders

pytestmark = pytest.mark.slow

CONFIG = str(ROOT / "configs" / "demo.yaml")
NOBODY = "http://127.0.0.1:9"  # the discard port, where nothing listens


def safetensors(num_bytes: int, seed: int = 0) -> bytes:
    """A whole file with one tensor of so many bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([seed]) * num_bytes


SHARDS = {f"model-0000{number}-of-00002.safetensors": safetensors(50_000 + number, number) for number in (1, 2)}
LOADED = SHARDS | {
    "config.json": b'{"num_hidden_layers": 1}',
    "tokenizer_config.json": b"{}",
    "merges.txt": b"a b\n",
    "model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode(),
}
OTHER_FORMS = dict.fromkeys(("model.fp16.safetensors", "pytorch_model.bin", "onnx/model.onnx", "README.md"), b"another form")
TINY = Source(folder="Tiny", role="decouple", url="hub/acme/tiny", licence="MIT", repositories=(Repository(name="acme/tiny"),))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        hub.repositories["acme/tiny"] = LOADED | OTHER_FORMS
        yield hub


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Where all that a demo run needs is, but for the language model, which it calls Tiny."""
    return write_fake_weights(tmp_path / "weights")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return demo_config(tmp_path, "decouple.model=Tiny")


Fetch = Callable[[Source], list[str]]


@pytest.fixture
def fetched(hub: FakeHub, weights: Path, config: RunConfig) -> Fetch:
    """Fetches a source into the weights folder; the lines that were told."""

    def run(source: Source) -> list[str]:
        lines: list[str] = []
        hub.log.clear()
        fetch([Wanted(source=source, role=source.role, config=config)], weights, endpoint=hub.url, tell=lines.append)
        return lines

    return run


def problems(weights: Path, config: RunConfig, *, hashes: bool = False) -> list[str]:
    return [problem.text for problem in find_problems(weights, config, (lambda num_bytes: None) if hashes else None)]


def files_in(folder: Path) -> dict[str, bytes]:
    """path -> content, without what the hub keeps for itself."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


# --- fetch, from a hub --------------------------------------------------------------------------------------------------


def test_what_a_run_loads_is_fetched_and_no_other_form_of_it(fetched: Fetch, weights: Path, config: RunConfig) -> None:
    lines = fetched(TINY)
    found = files_in(weights / "Tiny")
    assert {name: content for name, content in found.items() if name != RECORD} == LOADED
    assert lines == [f"{weights / 'Tiny'}: 100 kB from hub/acme/tiny, licence: MIT", f"{weights / 'Tiny'}: complete"]
    assert problems(weights, config, hashes=True) == []


def test_the_record_holds_what_the_hub_states(fetched: Fetch, weights: Path) -> None:
    fetched(TINY)
    record = json.loads((weights / "Tiny" / RECORD).read_text())
    assert record["sources"] == {"acme/tiny": COMMIT}
    assert set(record["files"]) == set(LOADED)
    for name, content in LOADED.items():
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        stated = {"sha256": hashlib.sha256(content).hexdigest()} if name in SHARDS else {"git_sha1": blob}
        assert record["files"][name] == {"size": len(content)} | stated


def test_a_second_fetch_asks_nobody(fetched: Fetch, hub: FakeHub, weights: Path) -> None:
    fetched(TINY)
    assert fetched(TINY) == [f"{weights / 'Tiny'}: complete, nothing to fetch"]
    assert hub.log == []


def test_a_file_that_is_cut_off_is_resumed(fetched: Fetch, hub: FakeHub, weights: Path, config: RunConfig) -> None:
    name = "model-00001-of-00002.safetensors"
    path, chunk_bytes = f"/acme/tiny/resolve/{COMMIT}/{name}", 10 << 20  # the hub writes, and goes on, by whole chunks
    hub.repositories["acme/tiny"] = LOADED | {name: safetensors(chunk_bytes + 2000)}
    hub.cut_once[path] = chunk_bytes + 1000
    fetched(TINY)
    assert [asked for method, file, asked in hub.log if file == path and asked] == [f"bytes={chunk_bytes}-"]
    assert problems(weights, config, hashes=True) == []


def test_after_a_fetch_that_failed_only_the_rest_is_fetched(fetched: Fetch, hub: FakeHub, weights: Path) -> None:
    path = f"/acme/tiny/resolve/{COMMIT}/model-00002-of-00002.safetensors"
    hub.answers[path] = (403, "")
    with pytest.raises(OSError, match=r"^weights fetch: 127\.0\.0\.1:\d+/acme/tiny "):
        fetched(TINY)
    whole = set(files_in(weights / "Tiny"))  # and not yet a record
    assert whole <= set(LOADED) - {"model-00002-of-00002.safetensors"}
    hub.answers.clear()
    fetched(TINY)
    assert set(hub.downloads()) == set(LOADED) - whole


def test_a_damaged_file_is_fetched_again_at_the_commit_of_the_others(fetched: Fetch, hub: FakeHub, weights: Path) -> None:
    fetched(TINY)
    shard = weights / "Tiny" / "model-00002-of-00002.safetensors"
    os.truncate(shard, 100)
    lines = fetched(TINY)
    assert f"{shard} has 100 bytes, expected {len(SHARDS[shard.name]):,}: it is fetched again" in lines
    assert shard.read_bytes() == SHARDS[shard.name]
    assert hub.downloads() == [shard.name]
    asked = [path for _, path, _ in hub.log if path.startswith("/api")]
    assert asked == [f"/api/models/acme/tiny/revision/{COMMIT}"]


def test_whole_files_that_were_laid_there_by_hand_are_recorded_not_fetched(fetched: Fetch, hub: FakeHub, weights: Path) -> None:
    (weights / "Tiny").mkdir()
    for name, content in SHARDS.items():
        (weights / "Tiny" / name).write_bytes(content)
    fetched(TINY)
    assert set(hub.downloads()) == set(LOADED) - set(SHARDS)
    assert set(json.loads((weights / "Tiny" / RECORD).read_text())["files"]) == set(LOADED)


def test_somebodys_other_checkpoint_is_left_alone(fetched: Fetch, weights: Path) -> None:
    mine = weights / "Tiny" / "model-00001-of-00002.safetensors"
    mine.parent.mkdir()
    mine.write_bytes(safetensors(10))
    with pytest.raises(ValueError, match=r"is in the way: .* move it away, or delete it"):
        fetched(TINY)
    assert files_in(weights / "Tiny") == {mine.name: safetensors(10)}


def test_each_repository_of_a_folder_goes_where_it_belongs(
    fetched: Fetch, hub: FakeHub, weights: Path, config: RunConfig
) -> None:
    variant = "sdxl_hyper_id_lora_v1_fidelity"
    names = ("hyper_lora_modules.json", "hyper_lora_modules.safetensors", "id_projector.safetensors", "resampler.safetensors")
    lora = {f"{variant}/{name}": safetensors(9) if name.endswith("s") else b"{}" for name in names}
    clip = {
        "config.json": b"{}",
        "preprocessor_config.json": b"{ }",
        "model.safetensors": safetensors(8),
        "vocab.json": b"[]",
    }
    hub.repositories |= {"bytedance-research/HyperLoRA": lora | {"assets/x.jpg": b"x"}, "openai/clip-vit-large-patch14": clip}
    (weights / "HyperLoRA").rename(weights / "fake")
    fetched(source_of("HyperLoRA"))
    found = files_in(weights / "HyperLoRA")
    assert {path for path in found if path != RECORD} == {
        path.relative_to(weights / "HyperLoRA").as_posix() for path in needed_files("hyperlora", weights / "HyperLoRA", config)
    }
    assert found["hyper_lora/clip_processor/clip_vit_large_14_processor/preprocessor_config.json"] == b"{ }"
    assert "vocab.json" not in hub.downloads() and "x.jpg" not in hub.downloads()


# --- fetch, from a URL --------------------------------------------------------------------------------------------------


def archive(*more: str) -> bytes:
    """A zip as insightface's: a folder with ONNX files and others."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as content:
        for names in PACK_FILES.values():
            content.writestr(f"antelopev2/{names[0]}", f"weights of {names[0]}" * 1000)
        for name in ("antelopev2/1k3d68.onnx", "antelopev2/README.txt", *more):
            content.writestr(name, name)
    return out.getvalue()


@pytest.fixture
def pack(hub: FakeHub) -> Source:
    """A face pack at a URL of the fake hub."""
    hub.plain["/pack.zip"] = archive()
    return Source(
        folder="Pack",
        role="faces",
        url="github.com/faces",
        licence="for research",
        non_commercial=True,
        downloads=(Download(url=f"{hub.url}/pack.zip", sha256=hashlib.sha256(archive()).hexdigest()),),
    )


ONNX = {names[0] for names in PACK_FILES.values()} | {"1k3d68.onnx"}


def test_an_archive_is_fetched_verified_and_unpacked_flat(fetched: Fetch, pack: Source, weights: Path) -> None:
    lines = fetched(pack)
    assert set(files_in(weights / "Pack")) == ONNX | {RECORD}
    assert [line for line in lines if "NON-COMMERCIAL" in line] != []
    assert fetched(pack) == [f"{weights / 'Pack'}: complete, nothing to fetch"]


def test_a_face_pack_that_is_damaged_later_is_noticed(fetched: Fetch, pack: Source, weights: Path, tmp_path: Path) -> None:
    fetched(pack)
    flip_last_byte(weights / "Pack" / "glintr100.onnx")
    mine = demo_config(tmp_path, "faces.model=Pack")
    assert problems(weights, mine) == []
    [line] = problems(weights, mine, hashes=True)
    assert "glintr100.onnx has sha256" in line


def test_a_download_goes_on_where_it_stopped(fetched: Fetch, pack: Source, hub: FakeHub, weights: Path) -> None:
    hub.cut_once["/pack.zip"] = 300
    with pytest.raises(OSError, match=r"stopped after 300 of .* it goes on from there"):
        fetched(pack)
    fetched(pack)
    assert [asked for method, _, asked in hub.log if method == "GET"] == ["bytes=300-"]
    assert set(files_in(weights / "Pack")) == ONNX | {RECORD}


def test_an_archive_of_another_hash_is_refused(fetched: Fetch, pack: Source, hub: FakeHub, weights: Path) -> None:
    hub.plain["/pack.zip"] = archive("antelopev2/more.onnx")
    with pytest.raises(OSError, match=r"has sha256 .* expected .* what came was deleted"):
        fetched(pack)
    assert files_in(weights / "Pack") == {}


@pytest.mark.parametrize("name", ["../evil.onnx", "/evil.onnx", "a/../../evil.onnx", "..\\evil.onnx"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.zip").write_bytes(archive(name))
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="leads out"):
        unpack(tmp_path / "x.zip", tmp_path / "in")
    assert list(tmp_path.rglob("*.onnx")) == []


def test_a_file_without_a_known_hash_is_recorded_as_found(fetched: Fetch, hub: FakeHub, weights: Path, tmp_path: Path) -> None:
    hub.plain["/release/hrnet_lip_5583_torch04.pth"] = b"a network"
    release = Download(url=f"{hub.url}/release/{{file}}")
    source = Source(folder="Cutter", role="cutout", url="here", licence="MIT", downloads=(release,))
    fetched(source)
    mine = demo_config(tmp_path, "cutout.model=Cutter")
    assert problems(weights, mine, hashes=True) == []
    flip_last_byte(weights / "Cutter" / "hrnet_lip_5583_torch04.pth")
    [line] = problems(weights, mine, hashes=True)
    assert f"expected {hashlib.sha256(b'a network').hexdigest()[:16]}" in line


def test_an_archive_of_buffalo_l_is_a_face_pack_as_well(fetched: Fetch, hub: FakeHub, weights: Path, tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as content:
        for names in PACK_FILES.values():
            content.writestr(names[-1], names[-1])
    hub.plain["/buffalo.zip"] = out.getvalue()
    release = Download(url=f"{hub.url}/buffalo.zip")
    fetched(Source(folder="Buffalo", role="score.models.faces", url="x", licence="x", downloads=(release,)))
    assert set(files_in(weights / "Buffalo")) == {names[-1] for names in PACK_FILES.values()} | {RECORD}
    assert problems(weights, demo_config(tmp_path, "score.metrics=[arc_sim]", "score.models.faces=Buffalo"), hashes=True) == []


def test_a_folder_of_a_repository_and_a_url_has_the_needed_files_of_both(
    fetched: Fetch, hub: FakeHub, weights: Path, tmp_path: Path
) -> None:
    network, merges = SCORE_FILES["viclip"]
    hub.repositories["acme/used"] = {network: b"a network", "another.pth": b"another"}
    hub.plain[f"/raw/{merges}"] = b"merges"
    source = Source(
        folder="Video",
        role="score.models.viclip",
        url="x",
        licence="MIT",
        repositories=(Repository(name="acme/used"),),
        downloads=(Download(url=f"{hub.url}/raw/{merges}"),),
    )
    fetched(source)
    assert files_in(weights / "Video").keys() == {network, merges, RECORD}
    mine = demo_config(tmp_path, "score.metrics=[oc]", "score.models.viclip=Video")
    assert problems(weights, mine, hashes=True) == []
    (weights / "Video" / merges).unlink()
    assert problems(weights, mine) == [f"score.models.viclip: weights file {weights / 'Video' / merges} is missing"]
    fetched(source)
    assert [path for method, path, _ in hub.log if method == "GET" and not path.startswith("/api")] == [f"/raw/{merges}"]


def test_of_several_urls_those_whose_files_are_there_are_not_fetched(fetched: Fetch, hub: FakeHub, weights: Path) -> None:
    network, merges = SCORE_FILES["clip_b"]
    hub.plain |= {f"/{network}": b"a network", f"/{merges}": b"merges"}
    source = Source(
        folder="Text",
        role="score.models.clip_b",
        url="x",
        licence="MIT",
        downloads=(Download(url=f"{hub.url}/{network}"), Download(url=f"{hub.url}/{merges}")),
    )
    fetched(source)
    (weights / "Text" / network).unlink()
    fetched(source)
    assert [path for method, path, _ in hub.log if method == "GET"] == [f"/{network}"]


def test_a_file_is_compared_with_its_published_hash_or_how_that_begins(fetched: Fetch, hub: FakeHub, weights: Path) -> None:
    [head], [network] = SCORE_FILES["aesthetic"], SCORE_FILES["inception"]
    hub.plain |= {f"/{head}": b"?" * 4071, f"/{network}": b"a network"}
    begins = hashlib.sha256(b"a network").hexdigest()[:8]
    for folder, name, sha256, expected in (
        ("LAION-aesthetic", head, None, "2cd4e60f4f24ae3b"),
        ("Mine", network, "0cc3c7bd", "0cc3c7bd;"),
    ):
        role = "score.models.aesthetic" if name == head else "score.models.inception"
        release = Download(url=f"{hub.url}/{name}", sha256=sha256)
        with pytest.raises(OSError, match=f"has sha256 .* expected {expected}.* what came was deleted"):
            fetched(Source(folder=folder, role=role, url="x", licence="x", downloads=(release,)))
        assert files_in(weights / folder) == {}
    release = Download(url=f"{hub.url}/{network}", sha256=begins)
    fetched(Source(folder="Mine", role="score.models.inception", url="x", licence="x", downloads=(release,)))
    assert files_in(weights / "Mine").keys() == {network, RECORD}


# --- fetch, refused: one line, and nothing is written -------------------------------------------------------------------


def refusal(config: RunConfig, weights: Path, source: Source, endpoint: str) -> str:
    before = sorted(weights.rglob("*")) if weights.exists() else None
    with pytest.raises(ValueError) as caught:
        fetch([Wanted(source=source, role=source.role, config=config)], weights, endpoint=endpoint, tell=lambda line: None)
    assert (sorted(weights.rglob("*")) if weights.exists() else None) == before
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_without_network_there_is_one_clear_line(config: RunConfig, tmp_path: Path) -> None:
    line = refusal(config, tmp_path / "new", TINY, NOBODY)
    assert line.startswith("weights fetch: 127.0.0.1:9 cannot be reached (")
    assert line.endswith("; run it on a login node with network, or copy the folder and run `ipt2v weights check`")
    url = Source(folder="P", role="faces", url="x", licence="x", downloads=(Download(url=f"{NOBODY}/x.zip"),))
    assert refusal(config, tmp_path / "new", url, "").startswith("weights fetch: 127.0.0.1:9 cannot be reached (")


def test_the_command_without_network_ends_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    ended = run_command(
        str(Path(sys.executable).parent / "ipt2v"), "weights", "fetch", "Qwen3-8B", "--weights", str(tmp_path / "w"), expect=2
    )
    assert ended.stderr.startswith("error: weights fetch: 127.0.0.1:9 cannot be reached (")
    assert (ended.stderr.count("\n"), ended.stdout, (tmp_path / "w").exists()) == (1, "", False)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", "is gated: accept its terms"),
        (404, "RepoNotFound", "is not there, or private"),
        (500, "", "answers: "),
    ],
)
def test_a_closed_repository_is_told_apart(
    hub: FakeHub, config: RunConfig, tmp_path: Path, status: int, code: str, words: str
) -> None:
    hub.answers["/api/models/acme/tiny"] = (status, code)
    assert f"/acme/tiny {words}" in refusal(config, tmp_path / "new", TINY, hub.url)


def test_a_full_disk_is_told_beforehand(hub: FakeHub, config: RunConfig, tmp_path: Path) -> None:
    hub.sizes["model-00001-of-00002.safetensors"] = 10**18
    line = refusal(config, tmp_path / "new", TINY, hub.url)
    assert "has room for " in line and "1000000000 GB are to be fetched" in line


def test_real_weights_are_never_mixed_with_toys(hub: FakeHub, config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "Tiny").mkdir()
    (tmp_path / "Tiny" / TOY_MARK).touch()
    assert "holds toy weights (TOY.txt)" in refusal(config, tmp_path, TINY, hub.url)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["Qwen3-8b"], "'Qwen3-8b' is neither a settings file nor a folder of weights; nearest folder is Qwen3-8B"),
        (["no.yaml"], "no.yaml: no such settings file"),
        ([CONFIG, "video.model=Mine"], "'Mine' is no folder that we know a source of"),
    ],
)
def test_what_cannot_be_fetched_is_named(words: list[str], problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        wanted_folders(words)
    assert problem in str(caught.value)


def test_a_settings_file_stands_for_all_that_its_run_loads() -> None:
    wanted = wanted_folders([CONFIG, "hyperlora.enabled=false", "video.model=Wan2.1-VACE-1.3B-diffusers"])
    assert {(one.role, one.source.folder) for one in wanted} == {
        ("faces", "antelopev2"),
        ("decouple", "Qwen3-8B"),
        ("cutout", "HRNetV2-W48"),
        ("first_frame", "RealVisXL_V4.0"),
        ("video", "Wan2.1-VACE-1.3B-diffusers"),
    }


def test_what_the_scores_of_a_settings_file_load_is_fetched_too_and_a_folder_once() -> None:
    wanted = wanted_folders([CONFIG, "score.metrics=[face_cur, dd]", "score.models.faces=antelopev2"])
    folders_of_scores = {one.source.folder: one.role for one in wanted if one.role.startswith("score")}
    assert folders_of_scores == {"CurricularFace": "score.models.curricular", "RAFT-things": "score.models.raft"}
    assert [one.role for one in wanted if one.source.folder == "antelopev2"] == ["faces"]


# --- which files a run loads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.folder)
def test_each_published_file_is_loaded_by_somebody(source: Source, tmp_path: Path) -> None:
    variants = [demo_config(tmp_path, f"hyperlora.variant={variant}") for variant in ("fidelity", "edit")]
    for file in published_files(source.folder):
        assert any(loads(source.role, file.path, config) for config in variants), file.path


@pytest.mark.parametrize(
    "name",
    [
        *("unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.onnx", "RealVisXL_V4.0.safetensors"),
        *("unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "text_encoder/model.fp16.safetensors.index.json"),
        *("text_encoder/pytorch_model.bin", "text_encoder/flax_model.msgpack", "vae_1_0/config.json", "README.md"),
    ],
)
def test_no_other_form_of_the_published_tensors_is_loaded(name: str, tmp_path: Path) -> None:
    assert not loads("first_frame", name, demo_config(tmp_path))


def test_what_a_run_needs_it_loads(weights: Path, tmp_path: Path) -> None:
    config = demo_config(tmp_path)
    for role, folder in folders(config).items():
        for path in needed_files(role, weights / folder, config):
            assert loads(role, path.relative_to(weights / folder).as_posix(), config), path


# --- check --------------------------------------------------------------------------------------------------------------


def test_every_missing_file_is_named(fetched: Fetch, weights: Path, config: RunConfig) -> None:
    fetched(TINY)
    lost = [weights / "Tiny" / "merges.txt", *(weights / "Tiny" / name for name in SHARDS)]
    for path in lost:
        path.unlink()
    assert sorted(problems(weights, config)) == sorted(f"decouple.model: weights file {path} is missing" for path in lost)
    with pytest.raises(ValueError, match=r"is missing; 'Tiny' is no folder .* \(2 more: `ipt2v weights check` lists them\)"):
        check_weights(weights, config)


def test_a_truncated_file_is_found_by_its_size_and_a_flipped_byte_by_its_hash(
    fetched: Fetch, weights: Path, config: RunConfig
) -> None:
    fetched(TINY)
    flip_last_byte(weights / "Tiny" / "model-00001-of-00002.safetensors")
    assert problems(weights, config) == []
    os.truncate(weights / "Tiny" / "config.json", 5)
    truncated = f"decouple.model: weights file {weights / 'Tiny' / 'config.json'} has 5 bytes, expected 24"
    assert problems(weights, config) == [truncated]
    first, second = problems(weights, config, hashes=True)
    assert first == truncated and "model-00001-of-00002.safetensors has sha256" in second


def test_a_flipped_byte_of_a_small_file_is_found_by_gits_hash(fetched: Fetch, weights: Path, config: RunConfig) -> None:
    fetched(TINY)
    flip_last_byte(weights / "Tiny" / "config.json")
    [line] = problems(weights, config, hashes=True)
    assert "config.json has git_sha1" in line and "delete it and fetch it again" in line


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (safetensors(100)[:-1], "its safetensors header says"),
        (safetensors(100) + b"x", "its safetensors header says"),
        (safetensors(100)[:20], "is cut off: 20 bytes end within its header"),
        (b"", "is no safetensors file: 0 bytes"),
        (b"PK\x03\x04 something else", "is no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
        ((9).to_bytes(8, "little") + b"not json!", "damaged safetensors header"),
        ((2).to_bytes(8, "little") + b"[]", "damaged safetensors header"),
    ],
)
def test_a_safetensors_file_that_is_not_whole_is_noticed_by_its_header(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert problem in (problem_of(path, Expected()) or "")


def test_whole_safetensors_files_pass(tmp_path: Path) -> None:
    written = save({"a": np.zeros((2, 3), np.float16), "b": np.ones(5)}, metadata={"format": "pt"})
    for content in (written, save({}), safetensors(0), safetensors(7)):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert problem_of(tmp_path / "model.safetensors", Expected()) is None


def test_published_sizes_hold_where_nothing_was_recorded(weights: Path, tmp_path: Path) -> None:
    (weights / "antelopev2" / RECORD).unlink()
    lines = problems(weights, demo_config(tmp_path))
    assert len(lines) == 4
    size = (weights / "antelopev2" / "glintr100.onnx").stat().st_size
    expected = f"glintr100.onnx has {size} bytes, expected 260,665,334; if it is another checkpoint on purpose, give"
    assert expected in " ".join(lines)


def test_anything_passes_for_a_file_of_ones_own_and_it_is_not_fetched_over(
    fetched: Fetch, hub: FakeHub, weights: Path, config: RunConfig
) -> None:
    fetched(TINY)
    record, mine = weights / "Tiny" / RECORD, weights / "Tiny" / "model-00001-of-00002.safetensors"
    values = json.loads(record.read_text())
    values["files"][mine.name] = None
    record.write_text(json.dumps(values))
    mine.write_bytes(b"mine")
    assert problems(weights, config, hashes=True) == []
    (weights / "Tiny" / "merges.txt").unlink()
    with pytest.raises(ValueError, match="is in the way"):
        fetched(TINY)
    assert mine.read_bytes() == b"mine"


def test_a_damaged_index_is_a_problem_like_others(fetched: Fetch, weights: Path, config: RunConfig) -> None:
    fetched(TINY)
    (weights / "Tiny" / "model.safetensors.index.json").write_text("{")
    [line] = problems(weights, config)
    assert "model.safetensors.index.json is no index of tensors" in line


# --- the commands -------------------------------------------------------------------------------------------------------


def ipt2v(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["weights", *words])


def test_weights_are_checked_by_hand_as_before_a_run(weights: Path) -> None:
    words = ("check", CONFIG, "--weights", str(weights))
    answer = ipt2v(*words)
    assert answer.exit_code == 0
    assert f"decouple     {weights / 'Qwen3-8B'}" in answer.stdout
    lost = [weights / "antelopev2" / "genderage.onnx", weights / "Qwen3-8B" / "config.json"]
    for path in lost:
        path.unlink()
    answer = ipt2v(*words, "--hash")
    assert answer.exit_code == 1
    first, second, *hints = answer.stderr.splitlines()
    assert (first, second) == tuple(
        f"{role}.model: weights file {path} is missing" for role, path in zip(("faces", "decouple"), lost, strict=True)
    )
    assert ["ipt2v weights fetch antelopev2" in hints[0], "ipt2v weights fetch Qwen3-8B" in hints[1]] == [True, True]


def toys(weights: Path, config: RunConfig) -> None:
    for name in folders(config).values():
        (weights / name / TOY_MARK).touch()


@pytest.mark.parametrize("is_toy", [False, True])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"not JSON", "is no JSON object (Expecting value: line 1 column 1 (char 0))"),
        (b"\xff", "is no JSON object ("),
        (b"[]", "is no JSON object (a list)"),
    ],
)
def test_a_config_that_is_empty_or_no_json_is_a_problem_of_toys_too(
    weights: Path, tmp_path: Path, is_toy: bool, content: bytes, problem: str
) -> None:
    config = demo_config(tmp_path)
    if is_toy:
        toys(weights, config)
    damaged = weights / config.video.model / "transformer" / "config.json"
    assert transformer_sizes(weights, config)["num_attention_heads"] > 0
    damaged.write_bytes(content)
    answer = ipt2v("check", CONFIG, "--weights", str(weights))
    assert answer.exit_code == 1
    assert answer.stderr.startswith(f"video.model: weights file {damaged} {problem}")
    with pytest.raises(ValueError, match=r"is no JSON object .*; `ipt2v weights check` says where it comes from") as caught:
        transformer_sizes(weights, config)
    assert str(damaged) in str(caught.value)


def test_an_empty_file_of_any_kind_is_a_problem_of_toys_too(weights: Path, tmp_path: Path) -> None:
    config = demo_config(tmp_path)
    toys(weights, config)
    empty = weights / config.faces.model / "genderage.onnx"
    empty.write_bytes(b"")
    assert problems(weights, config) == [f"faces.model: weights file {empty} is empty"]


def test_of_toys_it_is_said_that_they_are_only_looked_for(weights: Path, tmp_path: Path) -> None:
    config = demo_config(tmp_path)
    toys(weights, config)
    told = ipt2v("check", CONFIG, "--weights", str(weights), "--hash").stdout
    assert "size alone" not in told
    for name in folders(config).values():
        assert f"{name}: toy weights: no hash is known; only that each file is there, and not empty, is checked\n" in told
        assert f"{weights / name}  (toy weights: random, only looked for)\n" in told


def test_weights_are_listed_with_reader_source_and_licence() -> None:
    lines = ipt2v("list").stdout.replace("\n  ", " ").splitlines()
    blocks = {line.split()[0]: line for line in lines if line and not line.startswith("for scores")}
    assert set(blocks) == {source.folder for source in SOURCES}
    assert "first_frame (decouple)" in blocks["Qwen3-8B"] and "16.4 GB" in blocks["Qwen3-8B"]
    assert "huggingface.co/Qwen/Qwen3-8B" in blocks["Qwen3-8B"] and "Apache-2.0" in blocks["Qwen3-8B"]
    assert {name for name, block in blocks.items() if "[NON-COMMERCIAL]" in block} == {
        *("antelopev2", "HyperLoRA"),
        *("buffalo_l", "CurricularFace", "MUSIQ-SPAQ", "AMT-S"),
    }


def test_the_folders_of_scores_are_listed_below_a_line_of_their_own() -> None:
    lines = ipt2v("list").stdout.splitlines()
    [heading] = [index for index, line in enumerate(lines) if line.startswith("for scores")]
    starts = [(index, line) for index, line in enumerate(lines) if index != heading and line and not line.startswith(" ")]
    assert all((index > heading) == ("score (score.models." in line) for index, line in starts)
    assert "  for     dd, motion_pixels" in lines[heading:]
    assert max(map(len, lines)) <= 120


def test_the_list_of_a_run_has_what_it_reads_alone() -> None:
    answer = ipt2v("list", CONFIG, "hyperlora.enabled=false", "video.model=Mine", "--json")
    rows = {row["folder"]: row for row in json.loads(answer.stdout)}
    assert set(rows) == {"antelopev2", "Qwen3-8B", "HRNetV2-W48", "RealVisXL_V4.0", "Mine"}
    assert rows["Mine"]["licence"] == "not known" and rows["Mine"]["stages"] == ["first_frame", "video"]


def test_the_list_of_a_run_has_what_its_metrics_need() -> None:
    answer = ipt2v("list", CONFIG, "score.metrics=[aq, ms]", "score.models.amt=Mine", "--json")
    rows = {row["folder"]: row for row in json.loads(answer.stdout) if row["stages"] == ["score"]}
    assert {name: row["metrics"] for name, row in rows.items()} == {
        "CLIP-ViT-L-14": ["aq"],
        "LAION-aesthetic": ["aq"],
        "Mine": ["ms"],
    }
    assert [file["path"] for file in rows["CLIP-ViT-L-14"]["files"]] == ["ViT-L-14.pt"]


def test_files_are_listed_with_what_is_known_of_them() -> None:
    text = ipt2v("list", "--files").stdout
    assert "3,996,250,744  31d6a825ae35f11fb85b195b4c42c146c051e446433125a215336abdf95cbf5f  model-00001-of-00005" in text
    assert "?  sha256 not known" in text and "~2,970,000,000" in text


def test_listing_and_checking_need_neither_torch_nor_the_hub() -> None:
    heavy = "{'torch', 'transformers', 'diffusers', 'huggingface_hub'} & sys.modules.keys()"
    assert run_python(f"import launch.weights, ipt2v.models.fetch, sys; print({heavy})").strip() == "set()"


def test_one_file_alone_imports_the_hub() -> None:
    sources = [*(ROOT / "ipt2v").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    importers = [
        path.name for path in sources if re.search(r"^\s*(import|from) huggingface_hub", path.read_text(), re.MULTILINE)
    ]
    assert importers == ["fetch.py"]


def test_sizes_are_written_as_the_hub_writes_them() -> None:
    assert [readable_size(size) for size in (5, 18_378, 360_662_982, 4_867_114_424)] == ["5 B", "18.4 kB", "361 MB", "4.9 GB"]
