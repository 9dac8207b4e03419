"""Claims about the weights that scores read: which metric needs which, what is checked, and that toys load as the real ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from helpers import demo_config, write_fake_weights, write_tree

from ipt2v.config import Metric, RunConfig, ScoreModelsConfig, run_digest
from ipt2v.models.catalogue import (
    all_folders,
    check_weights,
    find_problems,
    fingerprints,
    folders,
    score_fingerprints,
    score_folders,
    stage_files,
)
from ipt2v.models.faces import PACK_FILES
from ipt2v.models.score_weights import (
    METRIC_ROLES,
    SCORE_FILES,
    VOCABULARY,
    file_of,
    metrics_of,
    roles_of,
    vocabulary_of,
)
from ipt2v.models.sources import SOURCES
from launch.freeze import prepare

BUFFALO = {names[-1] for names in PACK_FILES.values()}
ALL = "score.metrics=all"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Every file that a demo run and all scores need, with nothing in them that a model could load."""
    folder = write_fake_weights(tmp_path / "weights")
    defaults = ScoreModelsConfig().model_dump()
    for role, files in SCORE_FILES.items():
        for name in files or BUFFALO:
            path = folder / defaults[role] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{role} {name}")
        (path.parent / "TOY.txt").touch()  # they are not as published
    return folder


def problems(weights: Path, config: RunConfig) -> list[str]:
    return [problem.text for problem in find_problems(weights, config)]


# --- the tables


def test_every_metric_says_which_networks_it_needs() -> None:
    assert set(METRIC_ROLES) == set(get_args(Metric))


def test_roles_are_the_fields_of_the_settings_and_each_is_needed_by_a_metric() -> None:
    assert list(SCORE_FILES) == list(ScoreModelsConfig.model_fields)
    assert all(metrics_of(role) for role in SCORE_FILES)
    assert roles_of(get_args(Metric)) == tuple(ScoreModelsConfig.model_fields)


def test_each_role_of_a_metric_comes_once_and_in_the_order_of_the_settings() -> None:
    assert roles_of(("aq", "face_cur", "arc_sim")) == ("faces", "curricular", "clip_l", "aesthetic")
    assert roles_of(("motion_amplitude",)) == roles_of(()) == ()


def test_every_default_folder_has_a_source_of_its_role() -> None:
    sources = {source.role: source.folder for source in SOURCES if source.role.startswith("score.")}
    assert sources == {f"score.models.{role}": folder for role, folder in ScoreModelsConfig().model_dump().items()}


def test_a_role_has_one_network_and_two_have_the_merges(tmp_path: Path) -> None:
    score = demo_config(tmp_path, "score.models.viclip=Mine").score
    assert file_of("viclip", tmp_path, score) == tmp_path / "Mine" / "ViClip-InternVid-10M-FLT.pth"
    assert vocabulary_of("clip_b", tmp_path, score) == tmp_path / "CLIP-ViT-B-32" / VOCABULARY


# --- the catalogue


def test_only_what_the_metrics_need_has_to_be_there(tmp_path: Path) -> None:
    assert score_folders(demo_config(tmp_path)) == {}
    assert score_folders(demo_config(tmp_path, "score.metrics=[oc, dd]")) == {"viclip": "ViCLIP", "raft": "RAFT-things"}
    assert set(score_folders(demo_config(tmp_path, ALL))) == set(SCORE_FILES)


def test_a_rehearsal_scores_with_no_network(tmp_path: Path) -> None:
    assert score_folders(demo_config(tmp_path, ALL, "rehearsal.enabled=true")) == {}


def test_scores_change_neither_the_runs_folders_nor_its_digest(weights: Path, tmp_path: Path) -> None:
    plain, scored = demo_config(tmp_path), demo_config(tmp_path, ALL, "score.models.raft=ViCLIP")
    assert folders(scored) == folders(plain)
    assert fingerprints(weights, scored) == fingerprints(weights, plain)
    digests = {run_digest(one, manifest_digest="m", weights=fingerprints(weights, one)) for one in (plain, scored)}
    assert len(digests) == 1


def test_a_run_has_the_same_digest_whatever_is_scored(weights: Path, tmp_path: Path) -> None:
    testset = write_tree(tmp_path / "testset")
    configs = [demo_config(testset), demo_config(testset, ALL)]
    prepared = [prepare(config, weights_dir=weights, runs_dir=tmp_path / "runs") for config in configs]
    assert len({one.environment.run_digest for one in prepared}) == 1
    assert prepared[0].environment.weights == prepared[1].environment.weights


def test_a_whole_folder_has_no_problem(weights: Path, tmp_path: Path) -> None:
    assert problems(weights, demo_config(tmp_path, ALL)) == []


@pytest.mark.parametrize(
    ("role", "name"), [("faces", "det_10g.onnx"), *((role, name) for role, names in SCORE_FILES.items() for name in names)]
)
def test_a_missing_file_is_named_with_its_score_role(weights: Path, tmp_path: Path, role: str, name: str) -> None:
    config = demo_config(tmp_path, ALL)
    path = weights / score_folders(config)[role] / name
    path.unlink()
    assert problems(weights, config) == [f"score.models.{role}: weights file {path} is missing"]
    with pytest.raises(ValueError, match=rf"^score\.models\.{role}: .*ipt2v weights fetch {path.parent.name} "):
        check_weights(weights, config)
    check_weights(weights, demo_config(tmp_path))


def test_of_a_pack_that_is_not_there_the_files_of_its_own_names_are_missing(tmp_path: Path) -> None:
    config = demo_config(tmp_path, "score.metrics=[arc_sim]")
    missing = {line.split()[3] for line in problems(tmp_path, config) if line.startswith("score.models.faces")}
    assert missing == {str(tmp_path / "buffalo_l" / name) for name in BUFFALO}


def test_a_damaged_file_of_a_score_is_noticed_by_its_size(weights: Path, tmp_path: Path) -> None:
    (weights / "RAFT-things" / "TOY.txt").unlink()
    [line] = problems(weights, demo_config(tmp_path, "score.metrics=[dd]"))
    assert line.startswith("score.models.raft: ") and "raft-things.pth has 20 bytes, expected 21,108,000" in line


def test_a_folder_of_two_roles_is_looked_at_once_and_both_are_named(weights: Path, tmp_path: Path) -> None:
    config = demo_config(tmp_path, "score.metrics=[arc_sim]", "score.models.faces=antelopev2")
    assert {role for role, folder in all_folders(config).items() if folder == "antelopev2"} == {"faces", "score.models.faces"}
    path = weights / "antelopev2" / "glintr100.onnx"
    path.unlink()
    assert problems(weights, config) == [f"faces.model, score.models.faces: weights file {path} is missing"]


def test_a_stage_has_its_own_files_and_the_scores_have_theirs(weights: Path, tmp_path: Path) -> None:
    plain, scored = demo_config(tmp_path), demo_config(tmp_path, ALL)
    for stage in ("first_frame", "video", "verify_split"):
        assert stage_files(stage, weights, scored) == stage_files(stage, weights, plain)
    assert stage_files("score", weights, plain) == []
    defaults = ScoreModelsConfig().model_dump()
    expected = {f"{defaults[role]}/{name}" for role, files in SCORE_FILES.items() for name in files or BUFFALO}
    marks = {f"{folder}/TOY.txt" for folder in defaults.values()}  # a text beside the files, like settings
    assert set(stage_files("score", weights, scored)) == expected | marks


def test_a_pack_of_both_is_copied_for_both(weights: Path, tmp_path: Path) -> None:
    config = demo_config(tmp_path, "score.metrics=[drift]", "score.models.faces=antelopev2")
    mine = [name for name in stage_files("first_frame", weights, config) if name.startswith("antelopev2/")]
    assert stage_files("score", weights, config) == mine != []


def test_other_weights_of_a_score_have_another_fingerprint(weights: Path, tmp_path: Path) -> None:
    config = demo_config(tmp_path, "score.metrics=[oc, aq]")
    before = score_fingerprints(weights, config)
    assert set(before) == {"ViCLIP", "CLIP-ViT-L-14", "LAION-aesthetic"}
    (weights / "ViCLIP" / VOCABULARY).write_text("other merges")
    after = score_fingerprints(weights, config)
    assert {folder for folder in before if after[folder] != before[folder]} == {"ViCLIP"}


def test_a_folder_of_two_scores_has_a_fingerprint_of_both_their_files(weights: Path, tmp_path: Path) -> None:
    os.link(weights / "CLIP-ViT-L-14" / "ViT-L-14.pt", weights / "CLIP-ViT-B-32" / "ViT-L-14.pt")
    metrics = ("clip_score", "aq", "clip_score, aq")
    configs = [demo_config(tmp_path, f"score.metrics=[{one}]", "score.models.clip_l=CLIP-ViT-B-32") for one in metrics]
    assert len({score_fingerprints(weights, config)["CLIP-ViT-B-32"] for config in configs}) == 3


# --- toys


def load_on_cpu(load: Callable[..., object]) -> Callable[[Path], object]:
    import torch

    return lambda path: load(path, device=torch.device("cpu"))


def loaders() -> dict[str, Callable[[Path], object]]:
    """role -> what loads its network."""
    from ipt2v.metrics.aesthetic import load_head
    from ipt2v.metrics.amt import load_amt
    from ipt2v.metrics.clip import load_clip
    from ipt2v.metrics.curricular import load_curricular
    from ipt2v.metrics.inception import load_inception
    from ipt2v.metrics.musiq import load_musiq
    from ipt2v.metrics.raft import load_raft
    from ipt2v.metrics.viclip import load_viclip

    plain = {"curricular": load_curricular, "inception": load_inception, "viclip": load_viclip, "clip_l": load_clip}
    plain |= {"clip_b": load_clip, "aesthetic": load_head, "musiq": load_musiq}
    return {**plain, "amt": load_on_cpu(load_amt), "raft": load_on_cpu(load_raft)}


@pytest.mark.slow
@pytest.mark.parametrize("role", [role for role in SCORE_FILES if role != "faces"])
def test_a_toy_network_loads_as_the_real_one(toy_weights: Path, tmp_path: Path, role: str) -> None:
    network = loaders()[role](file_of(role, toy_weights, demo_config(tmp_path).score))
    assert type(network).__module__.startswith("ipt2v.metrics.")


@pytest.mark.slow
def test_the_toy_pack_of_scores_finds_a_face_and_knows_it_otherwise_than_that_of_runs(toy_weights: Path) -> None:
    import numpy as np

    from ipt2v.models.faces import load_face_analysis, similarity

    image_HWC = np.random.default_rng(0).integers(1, 256, (240, 320, 3), dtype=np.uint8)
    [mine], [theirs] = (load_face_analysis(toy_weights / name)(image_HWC) for name in ("buffalo_l", "antelopev2"))
    assert np.array_equal(mine.box_xyxy, theirs.box_xyxy)
    assert similarity(mine.embedding, theirs.embedding) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("role", [role for role, files in SCORE_FILES.items() if VOCABULARY in files])
def test_the_toy_merges_are_those_of_their_network(toy_weights: Path, tmp_path: Path, role: str) -> None:
    from ipt2v.metrics.clip_tokens import load_vocabulary, token_ids
    from ipt2v.models.strict_load import read_tensors

    score = demo_config(tmp_path).score
    tensors = read_tensors(file_of(role, toy_weights, score))
    [embedding] = [tensor for key, tensor in tensors.items() if key.endswith("token_embedding.weight")]
    vocabulary = load_vocabulary(vocabulary_of(role, toy_weights, score))
    assert max(token_ids("the walks", vocabulary, context=32)) == vocabulary.end == len(embedding) - 1


@pytest.mark.slow
def test_the_toy_head_takes_what_the_toy_clip_gives(toy_weights: Path, tmp_path: Path) -> None:
    from ipt2v.models.strict_load import read_tensors

    score = demo_config(tmp_path).score
    head, clip = (read_tensors(file_of(role, toy_weights, score)) for role in ("aesthetic", "clip_l"))
    assert head["weight"].shape == (1, clip["visual.proj"].shape[1])


@pytest.mark.slow
def test_a_folder_of_toys_has_all_that_every_score_needs(toy_weights: Path, tmp_path: Path) -> None:
    assert problems(toy_weights, demo_config(tmp_path, ALL)) == []
