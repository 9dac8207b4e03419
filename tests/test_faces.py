"""Claims about the analysis of faces; on tiny random models it is compared with the insightface package."""

from __future__ import annotations

import contextlib
import io
import itertools
import socket
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run_python
from hypothesis import given
from hypothesis import strategies as st

from ipt2v.models import faces
from ipt2v.models.faces import (
    DETECTION_SIZES,
    PACK_FILES,
    Analyse,
    Detection,
    Face,
    align,
    best_of_overlapping,
    box_to_crop,
    detect_at_first_size,
    largest,
    load_face_analysis,
    pack_files,
    similarity,
    subject_of,
)

REFERENCE_POINTS = np.array(  # where ArcFace was trained to have eyes, nose and mouth, in a crop of 112 x 112
    [38.2946 + 51.6963j, 73.5318 + 51.5014j, 56.0252 + 71.7366j, 41.5493 + 92.3655j, 70.7299 + 92.2041j]
)
PHOTO_HWC = np.zeros((8, 8, 3), np.uint8)


def face(*, side: float = 10.0, score: float = 0.9, is_male: bool = True) -> Face:
    return Face(
        box_xyxy=np.array([5, 5, 5 + side, 5 + side], np.float32),
        score=score,
        landmarks_106=np.zeros((106, 2), np.float32),
        is_male=is_male,
        embedding=np.eye(512, dtype=np.float32)[0],
    )


def detection(left: float, score: float = 0.9, *, top: float = 0.0, side: float = 20.0) -> Detection:
    box_xyxy = np.array([left, top, left + side, top + side], np.float32)
    return Detection(box_xyxy=box_xyxy, score=score, points=REFERENCE_POINTS)


def write_empty_pack(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


ANTELOPE = ("scrfd_10g_bnkps.onnx", "2d106det.onnx", "genderage.onnx", "glintr100.onnx")
BUFFALO = ("det_10g.onnx", "2d106det.onnx", "genderage.onnx", "w600k_r50.onnx")


# ---- which face


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_largest_face_does_not_depend_on_the_order(order: Sequence[int]) -> None:
    three = [face(side=30, score=0.6), face(side=10, score=0.95), face(side=20, score=0.7)]
    shuffled = [three[index] for index in order]
    assert largest(shuffled) is three[0]


@pytest.mark.parametrize(
    ("found", "subject"),
    [
        ([], "A person"),
        ([face(is_male=True)], "A man"),
        ([face(is_male=False)], "A woman"),
        ([face(side=10, is_male=True), face(side=20, score=0.5, is_male=False)], "A woman"),
    ],
)
def test_the_subject_is_the_person_with_the_largest_face(found: list[Face], subject: str) -> None:
    assert subject_of(found) == subject


@given(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4).filter(lambda values: max(map(abs, values)) > 0.1))
def test_similarity_is_one_with_itself_minus_one_with_its_opposite_whatever_the_length(values: list[float]) -> None:
    a = np.array(values, np.float32)
    assert similarity(a, 3 * a) == pytest.approx(1)
    assert similarity(a, -a) == pytest.approx(-1)
    assert similarity(a, a[::-1]) == pytest.approx(similarity(a[::-1], a))


# ---- formulas


def test_alignment_leaves_the_reference_points_where_they_are() -> None:
    turn, shift = align(REFERENCE_POINTS)
    assert turn == pytest.approx(1)
    assert abs(shift) < 1e-9


@given(st.floats(0.1, 20), st.floats(-3, 3), st.floats(-500, 500), st.floats(-500, 500))
def test_alignment_undoes_any_scale_rotation_and_shift(scale: float, angle: float, x: float, y: float) -> None:
    points = scale * np.exp(1j * angle) * REFERENCE_POINTS + complex(x, y)
    turn, shift = align(points)
    np.testing.assert_allclose(turn * points + shift, REFERENCE_POINTS, atol=1e-6)


def test_alignment_is_the_best_of_all_similarity_transforms() -> None:
    random = np.random.default_rng(3)
    points = REFERENCE_POINTS + random.normal(scale=6, size=5) + 1j * random.normal(scale=6, size=5)

    def error(turn: complex, shift: complex) -> float:
        return float((abs(turn * points + shift - REFERENCE_POINTS) ** 2).sum())

    turn, shift = align(points)
    for change in (1e-3, -1e-3, 1e-3j, -1e-3j):
        assert error(turn, shift) < min(error(turn + change, shift), error(turn, shift + change))


def test_a_crop_is_one_and_a_half_times_the_longer_side_and_centred_on_the_box() -> None:
    turn, shift = box_to_crop(np.array([100, 40, 200, 120], np.float32), 192)
    corners = turn * np.array([75 + 5j, 225 + 155j]) + shift  # 150 x 150 about (150, 80)
    np.testing.assert_allclose(corners, [0, 192 + 192j], atol=1e-9)


def test_of_overlapping_boxes_the_surest_stays_and_the_rest_comes_best_first() -> None:
    beside, shifted, best = detection(100, 0.6), detection(3, 0.8), detection(0, 0.9)
    assert best_of_overlapping([beside, shifted, best]) == (best, beside)


@pytest.mark.parametrize(("left", "num_kept"), [(8.9, 1), (9.0, 2)])  # of 30 columns both have 12: two fifths are allowed
def test_boxes_may_overlap_by_two_fifths(left: float, num_kept: int) -> None:
    assert len(best_of_overlapping([detection(0), detection(left, 0.8)])) == num_kept


@pytest.mark.parametrize("seen_at", [*DETECTION_SIZES, None])
def test_detection_sizes_are_tried_in_order_until_one_finds_a_face(seen_at: int | None) -> None:
    tried = []

    def detect(image_HWC: object, side: int) -> tuple[Detection, ...]:
        assert image_HWC is PHOTO_HWC
        tried.append(side)
        return (detection(side),) if side == seen_at else ()

    found = detect_at_first_size(detect, PHOTO_HWC)
    sizes = (640, 512, 384, 256)
    assert tried == list(sizes if seen_at is None else sizes[: sizes.index(seen_at) + 1])
    assert [one.box_xyxy[0] for one in found] == ([] if seen_at is None else [seen_at])


# ---- the pack


@pytest.mark.parametrize("names", [ANTELOPE, BUFFALO])
@pytest.mark.parametrize("subfolder", [".", "antelopev2", "pack"])
def test_either_published_pack_is_taken_nested_or_not(tmp_path: Path, names: Sequence[str], subfolder: str) -> None:
    write_empty_pack(tmp_path / "pack" / subfolder, *names, "1k3d68.onnx")
    found = pack_files(tmp_path / "pack")
    assert list(found) == list(PACK_FILES)
    assert tuple(path.name for path in found.values()) == names
    assert all(path.is_file() for path in found.values())


@pytest.mark.parametrize("missing", ANTELOPE)
@pytest.mark.parametrize("subfolder", [".", "antelopev2"])
def test_a_missing_file_is_named_with_its_source_and_licence(tmp_path: Path, missing: str, subfolder: str) -> None:
    folder = write_empty_pack(tmp_path / "pack" / subfolder, *(name for name in ANTELOPE if name != missing))
    with pytest.raises(ValueError, match="non-commercial") as raised:
        load_face_analysis(tmp_path / "pack")
    assert str(folder / missing) in str(raised.value)
    assert "github.com/deepinsight/insightface" in str(raised.value)


def test_a_folder_that_does_not_exist_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scrfd_10g_bnkps\.onnx or det_10g\.onnx"):
        pack_files(tmp_path / "nowhere")


def test_looking_for_the_pack_imports_neither_torch_nor_onnxruntime() -> None:
    code = "import sys, ipt2v.models.faces, ipt2v.models.face_detailer, ipt2v.models.toy_faces\n"
    assert run_python(code + "print({'torch', 'onnxruntime', 'onnx', 'cv2'} & sys.modules.keys())").strip() == "set()"


# ---- on a toy pack


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ipt2v.models.toy_faces import toy_face_pack

    folder = tmp_path_factory.mktemp("packs") / "antelopev2"
    toy_face_pack(folder, seed=5)
    return folder


@pytest.fixture(scope="module")
def analyse(pack: Path) -> Analyse:
    return load_face_analysis(pack)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours, so that a shift of half a pixel is no other picture."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in random.uniform(-1.5, 1.5, (3, 3))]
    return (127 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(480, 832), (832, 480), (512, 512), (64, 48), (1000, 400)])
def test_the_toy_pack_sees_one_face_in_the_upper_middle_of_any_photo(analyse: Analyse, height: int, width: int) -> None:
    (found,) = analyse(photo(height, width))
    start, end = found.box_xyxy[:2], found.box_xyxy[2:]
    assert (start > 0).all()
    assert (end < (width, height)).all()
    assert (end - start > 0.3 * min(width, height)).all()
    x, y = (start + end) / 2 / (width, height)
    assert 0.35 < x < 0.65
    assert 0.3 < y < 0.55
    assert (np.abs(found.landmarks_106 - (start + end) / 2) < 1.5 * (end - start)).all()


@pytest.mark.slow
def test_a_face_has_the_promised_types(analyse: Analyse) -> None:
    (found,) = analyse(photo(60, 80))
    assert [(array.shape, array.dtype) for array in (found.box_xyxy, found.landmarks_106, found.embedding)] == [
        ((4,), np.float32),
        ((106, 2), np.float32),
        ((512,), np.float32),
    ]
    assert (type(found.score), type(found.is_male)) == (float, bool)
    assert np.linalg.norm(found.embedding) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_the_same_photo_gives_the_same_embedding_and_another_photo_another(analyse: Analyse) -> None:
    (first,), (again,), (other,) = (analyse(photo(90, 120, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.embedding, again.embedding)
    assert similarity(first.embedding, again.embedding) == pytest.approx(1)
    assert similarity(first.embedding, other.embedding) < 0.9


@pytest.mark.slow
def test_a_toy_pack_is_small_and_its_bytes_are_those_of_its_seed(pack: Path, tmp_path: Path) -> None:
    from ipt2v.models.toy_faces import toy_face_pack

    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    for seed in (5, 6):
        toy_face_pack(tmp_path / str(seed), seed)
    assert contents(tmp_path / "5") == contents(pack)
    assert contents(tmp_path / "6")["glintr100.onnx"] != contents(pack)["glintr100.onnx"]
    assert sorted(contents(pack)) == sorted(ANTELOPE)
    assert sum(map(len, contents(pack).values())) < 50_000


@pytest.mark.slow
def test_a_face_that_only_a_small_detector_input_shows_is_found(tmp_path: Path) -> None:
    from ipt2v.models.toy_faces import toy_face_pack

    toy_face_pack(tmp_path / "small", seen_at=(256,))
    toy_face_pack(tmp_path / "blind", seen_at=())
    assert len(load_face_analysis(tmp_path / "small")(photo(100, 100))) == 1
    assert load_face_analysis(tmp_path / "blind")(photo(100, 100)) == ()


@pytest.mark.slow
def test_analysis_opens_no_socket_and_prints_nothing(
    pack: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(load_face_analysis(pack)(photo(60, 80))) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_an_onnxruntime_without_cuda_says_so(pack: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ValueError, match="onnxruntime-gpu"):
        load_face_analysis(pack, device="cuda")


# ---- equal to insightface

_BUSY_DETECTOR = """
<ir_version: 8, opset_import: ["" : 17]>
detector (float[1,3,height,width] input) => (
    float[n8,1] score_8, float[n16,1] score_16, float[n32,1] score_32,
    float[n8,4] box_8, float[n16,4] box_16, float[n32,4] box_32,
    float[n8,10] points_8, float[n16,10] points_16, float[n32,10] points_32
)
{
    shape_1 = Constant <value_ints = [-1, 1]> ()
    shape_4 = Constant <value_ints = [-1, 4]> ()
    shape_10 = Constant <value_ints = [-1, 10]> ()
PER_STRIDE
}
"""
_BUSY_STRIDE = """
    mean_S = AveragePool <kernel_shape = [S, S], strides = [S, S]> (input)
    score_map_S = Conv (mean_S, score_weight, score_bias)
    box_map_S = Conv (mean_S, box_weight, box_bias)
    points_map_S = Conv (mean_S, points_weight)
    score_rows_S = Transpose <perm = [0, 2, 3, 1]> (score_map_S)
    box_rows_S = Transpose <perm = [0, 2, 3, 1]> (box_map_S)
    points_rows_S = Transpose <perm = [0, 2, 3, 1]> (points_map_S)
    score_flat_S = Reshape (score_rows_S, shape_1)
    score_S = Sigmoid (score_flat_S)
    box_flat_S = Reshape (box_rows_S, shape_4)
    box_S = Abs (box_flat_S)
    points_S = Reshape (points_rows_S, shape_10)
"""


@pytest.fixture(scope="module")
def busy_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy pack with another detector: one that finds many boxes at every stride, and where depends on the pixels."""
    import onnx

    from ipt2v.models.toy_faces import toy_face_pack

    folder = tmp_path_factory.mktemp("packs") / "busy"
    toy_face_pack(folder, seed=7)
    random = np.random.default_rng(1)
    text = "".join(
        _BUSY_STRIDE.replace("_S", f"_{stride}").replace("[S, S]", f"[{stride}, {stride}]") for stride in (8, 16, 32)
    )
    model = onnx.parser.parse_model(_BUSY_DETECTOR.replace("PER_STRIDE", text))
    weights = {
        "score_weight": random.normal(size=(2, 3, 1, 1)),
        "score_bias": np.full(2, -1.5),
        "box_weight": random.normal(size=(8, 3, 1, 1)),
        "box_bias": np.full(8, 2.0),
        "points_weight": random.normal(size=(20, 3, 1, 1)),
    }
    for name, values in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    (folder / "scrfd_10g_bnkps.onnx").write_bytes(model.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def analyse_by_insightface() -> Callable[[Path, np.ndarray], list[Any]]:
    reason = "the insightface package is what we compare with"
    with warnings.catch_warnings(action="ignore"):
        FaceAnalysis = pytest.importorskip("insightface.app", reason=reason, exc_type=ImportError).FaceAnalysis

    def get(pack: Path, photo_HWC: np.ndarray) -> list[Any]:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            analysis = FaceAnalysis(name=str(pack), providers=["CPUExecutionProvider"])
            analysis.prepare(ctx_id=-1, det_thresh=0.5, det_size=(640, 640))
            return analysis.get(np.ascontiguousarray(photo_HWC[:, :, ::-1]))

    return get


def assert_same_faces(ours: Sequence[Face], theirs: Sequence[Any]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.box_xyxy, other.bbox, atol=1e-3)
        assert mine.score == pytest.approx(other.det_score, abs=1e-5)
        np.testing.assert_allclose(mine.landmarks_106, other.landmark_2d_106, atol=0.02)
        assert mine.is_male == (other.gender == 1)
        assert similarity(mine.embedding, other.normed_embedding) > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(480, 832), (600, 400), (90, 70), (1400, 900)])
def test_a_face_is_that_of_the_insightface_package(pack: Path, analyse_by_insightface, height: int, width: int) -> None:
    photo_HWC = photo(height, width, seed=3)
    assert_same_faces(load_face_analysis(pack)(photo_HWC), analyse_by_insightface(pack, photo_HWC))


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(640, 640), (400, 640), (640, 361)])  # not resized, so that no score is a tie
def test_many_faces_are_those_of_the_insightface_package(
    busy_pack: Path, analyse_by_insightface, height: int, width: int
) -> None:
    photo_HWC = photo(height, width, seed=3)
    theirs = analyse_by_insightface(busy_pack, photo_HWC)
    assert len(theirs) > 20
    assert_same_faces(load_face_analysis(busy_pack)(photo_HWC), theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "resized"), [((832, 480), (640, 369)), ((70, 90), (497, 640)), ((900, 1400), (411, 640)), ((640, 640), (640, 640))]
)
def test_pixels_between_pixels_are_those_of_opencv(size: tuple[int, int], resized: tuple[int, int]) -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is what we compare with", exc_type=ImportError)
    noise_HWC = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    square_HWC = np.zeros((640, 640, 3))
    square_HWC[: resized[1], : resized[0]] = cv2.resize(noise_HWC, resized)
    blob, scale = faces._detector_input(noise_HWC, 640)
    assert scale == resized[1] / size[1]
    assert np.abs(blob[0].transpose(1, 2, 0) * 128 + 127.5 - square_HWC).max() <= 1  # OpenCV rounds twice

    crop_HWC = faces._crop(noise_HWC, 0.37 - 0.11j, 5 - 3j, 112)
    matrix = np.array([[0.37, 0.11, 5], [-0.11, 0.37, -3]])
    assert np.abs(crop_HWC - cv2.warpAffine(noise_HWC, matrix, (112, 112))).max() <= 1
