"""Claims about settings: strict, one line for each error, and a digest over what may change a pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from ipt2v.config import RunConfig, Settings, dump_settings, load_settings, parse_settings, run_digest
from launch.cluster import Cluster, load_cluster

CLUSTERS = sorted((ROOT / "configs" / "cluster").glob("*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(CLUSTERS))
MINIMAL = "name: small\ntestset: {path: here}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def error_of(file: Path, *overrides: str, kind: type[Settings] = RunConfig) -> str:
    with pytest.raises(ValueError) as caught:
        load_settings(kind, file, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def leaves(kind: type[Settings], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """(path, type) of every field that holds a value."""
    found = []
    for name, field in kind.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            found += leaves(annotation, (*prefix, name))
        else:
            found.append(((*prefix, name), annotation))
    return found


def with_value(config: RunConfig, path: tuple[str, ...], value: Any) -> RunConfig:
    values = config.model_dump()
    block = values
    for name in path[:-1]:
        block = block[name]
    block[path[-1]] = value
    return parse_settings(RunConfig, values, where="test")


def value_at(config: RunConfig, path: tuple[str, ...]) -> Any:
    value: Any = config
    for name in path:
        value = getattr(value, name)
    return value


def another(value: Any, path: tuple[str, ...]) -> Any:
    """A legal value that is not `value`."""
    for name in (".".join(path), path[-1]):
        if name in CHOICES:
            return CHOICES[name]
    if path[-1] == "top_p":
        return value / 2
    if path[-1].endswith("dtype"):
        return "float32" if value != "float32" else "bfloat16"  # float16 is refused to the text encoder by zero3
    if isinstance(value, str):
        return value + "x"
    return value + {"width": 16, "height": 16, "num_frames": 4, "enough_similarity": -0.25}.get(path[-1], 1)


def digest(config: RunConfig, manifest: str = "m", weights: str = "w") -> str:
    return run_digest(config, manifest_digest=manifest, weights={"folder": weights})


# not the defaults
CHOICES = {
    "prompts": "raw",
    "spatial_source": "polished",
    "enabled": False,
    "rehearsal.enabled": True,
    "keep_text": False,
    "denoise": 0.4,
    "threshold": 0.6,
    "align_corners": True,
    "largest_component": True,
    "variant": "edit",
    "condition": "both",
    "compile": "default",
    "scheduler": "dpm++",
    "remove_background": False,
    "video.weights_sharding": "fsdp2",
    "decouple.weights_sharding": "tensor",
    "text_encoder.weights_sharding": "none",
    "cpu_offload": True,
    "metrics": ["dd", "oc"],
    "identities": 7,
    "at_least": {"dd": 1.0},
    "at_most": {"dd": 0.0},
}
# zero3: without it, cpu_offload has no other legal value
SMALL = parse_settings(
    RunConfig,
    {"name": "small", "testset": {"path": "here"}, "score": {"metrics": ["dd"]}}
    | {block: {"weights_sharding": "zero3"} for block in ("decouple", "text_encoder", "video")},
    where="test",
)
LEAVES = [path for path, _ in leaves(RunConfig)]
PIXELS = [path for path in LEAVES if path[0] not in ("name", "testset", "score")]


# --- files and overrides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_is_named_as_its_file(path: Path) -> None:
    assert load_settings(RunConfig, path).name == path.stem


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_every_shipped_cluster_file_loads(path: Path) -> None:
    assert load_cluster(path).first_frame.nodes == 1


def test_there_are_shipped_configs_and_cluster_files() -> None:
    assert CONFIGS and CLUSTERS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_dumped_settings_load_as_the_same_settings(path: Path, file: Path) -> None:
    config = load_settings(RunConfig, path, ("video.fps=24", "decouple.spatial_template='a: {prompt}\n# \"b\"'"))
    file.write_text(dump_settings(config), encoding="utf-8")
    assert load_settings(RunConfig, file) == config


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_survives_dump_and_load(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    config = with_value(SMALL, ("video", "negative_prompt"), text)
    file.write_text(dump_settings(config), encoding="utf-8")
    assert load_settings(RunConfig, file) == config


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("video.fps=24", ("video", "fps"), 24),
        ("video.guidance_scale=6", ("video", "guidance_scale"), 6.0),
        ("decouple.temperature=1e-1", ("decouple", "temperature"), 0.1),
        ("video.negative_prompt='a: b'", ("video", "negative_prompt"), "a: b"),
        ("video.negative_prompt=x=y", ("video", "negative_prompt"), "x=y"),
        ("video={fps: 8, crf: 1}", ("video", "crf"), 1),
        ("testset.path=/data/set", ("testset", "path"), "/data/set"),
    ],
)
def test_an_override_is_read_as_yaml(file: Path, override: str, path: tuple[str, ...], value: Any) -> None:
    file.write_text(MINIMAL)
    found = value_at(load_settings(RunConfig, file, (override,)), path)
    assert (found, type(found)) == (value, type(value))


def test_the_last_of_two_overrides_holds(file: Path) -> None:
    file.write_text(MINIMAL)
    assert load_settings(RunConfig, file, ("video.fps=8", "video.fps=24")).video.fps == 24


# --- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unknown", "near"),
    [
        ("sed: 1", "sed", "seed"),
        ("video: {num_frame: 81}", "video.num_frame", "video.num_frames"),
        ("first_frame: {num_inference_step: 9}", "first_frame.num_inference_step", "first_frame.num_inference_steps"),
        ("decoupel: {}", "decoupel", "decouple"),
        ("flow_shift: 5", "flow_shift", "video.flow_shift"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(file: Path, text: str, unknown: str, near: str) -> None:
    file.write_text(MINIMAL + text)
    assert error_of(file) == f"{file}: {unknown}: unknown key; nearest known key is {near}"


def test_an_unknown_key_like_no_other_lists_the_known_ones(file: Path) -> None:
    file.write_text(MINIMAL + "zzzzqq: 1")
    assert "zzzzqq: unknown key; known: name, seed, testset, testset.path" in error_of(file)


def test_an_unknown_key_in_an_override_names_the_nearest_known_one(file: Path) -> None:
    file.write_text(MINIMAL)
    assert error_of(file, "video.fsp=24") == f"{file}: video.fsp: unknown key; nearest known key is video.fps"


def test_an_unknown_key_in_a_cluster_file_names_the_nearest_known_one(file: Path) -> None:
    file.write_text("video: {gpu_per_node: 8}")
    assert error_of(file, kind=Cluster) == f"{file}: video.gpu_per_node: unknown key; nearest known key is video.gpus_per_node"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("video: {num_frames: 80}", "video.num_frames: 80 is not 4n+1; nearest are 77 and 81"),
        ("video: {width: 830}", "video.width: 830 is not a multiple of 16; nearest are 816 and 832"),
        ("first_frame: {height: 481}", "first_frame.height: 481 is not a multiple of 16; nearest are 480 and 496"),
    ],
)
def test_a_size_that_the_network_cannot_make_names_the_nearest_ones(file: Path, text: str, problem: str) -> None:
    file.write_text(MINIMAL + text)
    assert error_of(file) == f"{file}: {problem}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("video: {crf: 52}", ("video.crf", "52", "51")),
        ("video: {fps: fast}", ("video.fps", "'fast'", "integer")),
        ("video: {dtype: int8}", ("video.dtype", "'int8'", "bfloat16")),
        ("decouple: {top_p: 0}", ("decouple.top_p", "0")),
        ("video: 3", ("video", "3")),
        ("video:", ("video", "None")),
        ("1: 2", ("1: ", "string")),
        ("name: a/b", ("name", "'a/b'")),
        ("name: ../a", ("name", "'../a'")),
        ("name: ''", ("name", "''")),
    ],
)
def test_a_value_that_does_not_fit_names_file_key_and_value(file: Path, text: str, words: tuple[str, ...]) -> None:
    file.write_text(("testset: {path: here}\n" if text.startswith("name:") else MINIMAL) + text)
    found = error_of(file)
    assert [word for word in (str(file), *words) if word not in found] == []


@pytest.mark.parametrize(("block", "other"), [("video", "fsdp2"), ("decouple", "tensor"), ("text_encoder", "none")])
def test_offloading_is_refused_to_all_but_zero3(file: Path, block: str, other: str) -> None:
    file.write_text(MINIMAL + f"{block}: {{cpu_offload: true, weights_sharding: {other}}}")
    assert error_of(file).startswith(f"{file}: {block}: found cpu_offload with weights_sharding '{other}', expected 'zero3'")
    assert error_of(file, f"{block}.weights_sharding=zero2").startswith(f"{file}: {block}.weights_sharding: found 'zero2'")
    load_settings(RunConfig, file, (f"{block}.weights_sharding=zero3",))


def test_the_text_encoder_in_float16_is_refused_to_zero3(file: Path) -> None:
    file.write_text(MINIMAL + "text_encoder: {weights_sharding: zero3}\nvideo: {dtype: float16}")
    assert error_of(file).startswith(f"{file}: text_encoder.weights_sharding: found 'zero3' with video.dtype 'float16'")
    load_settings(RunConfig, file, ("video.dtype=bfloat16",))


def test_a_missing_key_says_so(file: Path) -> None:
    file.write_text("name: small")
    assert error_of(file) == f"{file}: testset: missing; add it"


def test_a_missing_file_says_so(file: Path) -> None:
    assert error_of(file) == f"{file}: no such settings file"


@pytest.mark.parametrize(("text", "found"), [("", "NoneType"), ("- a\n- b\n", "list"), ("a text", "str"), ("7", "int")])
def test_a_file_that_is_no_mapping_says_what_it_is(file: Path, text: str, found: str) -> None:
    file.write_text(text)
    assert error_of(file) == f"{file}: found {found}, expected a mapping of keys to values"


@pytest.mark.parametrize(
    "data", [b"video: {fps: [", b"a: b: c", b"\tname: x", b"name: \xff\xfe", b"name: a\0b", b"seed: 2025-13-45"]
)
def test_a_file_that_is_no_yaml_says_so(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    assert error_of(file).startswith(f"{file}: not readable as YAML: ")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("video: {fps: 24}\nseed: 7\nvideo: {crf: 20}\n", "line 5: found the key 'video' again, first in line 3; keep one"),
        ("video:\n  fps: 24\n  fps: 16\n", "line 5: found the key 'fps' again, first in line 4; keep one"),
        ("video: {fps: 24, 'fps': 16}\n", "line 3: found the key 'fps' again, first in line 3; keep one"),
    ],
)
def test_a_key_that_is_written_twice_is_refused_with_both_lines(file: Path, text: str, problem: str) -> None:
    file.write_text(MINIMAL + text)
    assert error_of(file) == f"{file}: not readable as YAML: {problem}"


def test_a_key_may_stand_again_in_another_block_or_over_a_merged_one(file: Path) -> None:
    file.write_text(MINIMAL + "first_frame: &size {width: 640, height: 320}\nvideo: {<<: *size, width: 320}\n")
    video = load_settings(RunConfig, file).video
    assert (video.width, video.height) == (320, 320)


def test_an_override_with_a_key_twice_is_refused(file: Path) -> None:
    file.write_text(MINIMAL)
    assert "found the key 'fps' again" in error_of(file, "video={fps: 24, fps: 16}")


def test_yaml_makes_no_python_objects(file: Path) -> None:
    file.write_text("name: !!python/object/apply:os.getcwd []\n")
    assert error_of(file).startswith(f"{file}: not readable as YAML: could not determine a constructor")


def test_brackets_without_end_are_not_readable(file: Path) -> None:
    file.write_text("name: " + "[" * 3000)
    assert error_of(file) == f"{file}: not readable as YAML: blocks or brackets are nested too deeply"
    file.write_text(MINIMAL)
    assert error_of(file, "name=" + "[" * 3000).endswith("not readable as YAML: blocks or brackets are nested too deeply")


@pytest.mark.parametrize(("name", "reason"), [("", "Is a directory"), ("x" * 300, "File name too long")])
@pytest.mark.parametrize("kind", [RunConfig, Cluster])
def test_a_path_that_can_be_no_settings_file_is_named(tmp_path: Path, kind: type[Settings], name: str, reason: str) -> None:
    path = tmp_path / name
    assert error_of(path, kind=kind) == f"{path}: cannot be read ({reason}); name a YAML file that you may read"


@pytest.mark.parametrize("override", ["video.fps", "=3", "", "video.fps=[", "video.fps.x=3", "name.x=3"])
def test_an_override_that_cannot_be_read_is_named(file: Path, override: str) -> None:
    file.write_text(MINIMAL + "video: {fps: 8}")
    assert f"override {override!r}: " in error_of(file, override)


def test_settings_cannot_be_changed_once_loaded() -> None:
    with pytest.raises(ValueError):
        SMALL.video.fps = 3  # type: ignore[misc]


def test_first_frames_on_two_nodes_are_refused_and_on_two_gpus_of_one_are_not(file: Path) -> None:
    file.write_text("first_frame: {nodes: 2, gpus_per_node: 1}")
    assert "first_frame: found 2 nodes per element, expected 1" in error_of(file, kind=Cluster)
    file.write_text("first_frame: {gpus_per_node: 2}")
    assert load_cluster(file).first_frame.num_tasks == 2


# --- the digest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PIXELS, ids=".".join)
def test_the_digest_changes_with_every_setting_that_may_change_a_pixel(path: tuple[str, ...]) -> None:
    changed = with_value(SMALL, path, another(value_at(SMALL, path), path))
    assert digest(changed) != digest(SMALL)


def test_the_digest_changes_with_the_test_set_and_the_weights() -> None:
    assert len({digest(SMALL), digest(SMALL, manifest="other"), digest(SMALL, weights="other")}) == 3


@pytest.mark.parametrize("path", [path for path in LEAVES if path not in PIXELS], ids=".".join)
def test_the_digest_does_not_change_with_a_name_or_a_place(path: tuple[str, ...]) -> None:
    changed = with_value(SMALL, path, another(value_at(SMALL, path), path))
    assert changed != SMALL
    assert digest(changed) == digest(SMALL)


def test_defaults_written_out_give_the_same_digest(file: Path) -> None:
    file.write_text(dump_settings(SMALL))
    assert digest(load_settings(RunConfig, file)) == digest(SMALL)
