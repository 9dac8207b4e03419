"""A tiny random face model pack, with shapes of insightface's antelopev2 and buffalo_l, that sees one face in every picture.

Must not know who loads it. Writing takes the onnx package; loading does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_NUM_FEATURES = 12  # mean red, green and blue of a crop's four quarters: what the three models that look at crops see

# In units of half the face's width, from its centre: eyes, nose, corners of the mouth.
_POINTS = (-0.38, -0.3, 0.38, -0.3, 0.0, 0.1, -0.3, 0.55, 0.3, 0.55)
# The indices of 2d106det's landmarks around a face: the jaw from one temple to the other, then the brows back.
_JAW = (1, *range(9, 17), *range(2, 9), 0, *range(24, 17, -1), *range(32, 24, -1), 17)
_BROWS = (101, 105, 104, 103, 102, 50, 51, 49, 48, 43)

# The picture lies in the upper left of a black square. Its face is in the middle, a little above, and it is an anchor of stride
# 32 that reports it; the other anchors are silent. All sizes follow the shorter side of the picture.
_DETECTOR = """
<ir_version: 8, opset_import: ["" : 17]>
detector (float[1,3,height,width] input) => (
    float[n8,1] score_8, float[n16,1] score_16, float[n32,1] score_32,
    float[n8,4] box_8, float[n16,4] box_16, float[n32,4] box_32,
    float[n8,10] points_8, float[n16,10] points_16, float[n32,10] points_32
)
<float nearly_black = {-0.99}, float stride = {32.0}, float x_part = {0.5}, float y_part = {0.42}, float half_part = {0.16},
 float least_half = {16.0}, float two = {2.0}, float confidence = {0.875}, float[1,1] silent = {0.0},
 int64[1] stride_8 = {8}, int64[1] stride_16 = {16}, int64[1] stride_32 = {32}, int64[1] num_anchors = {2},
 int64[1] one = {1}, int64[1] four = {4}, int64[1] ten = {10}, int64 first = {0}, int64 step = {1}>
{
    size = Shape <start = 2, end = 4> (input)
    side = Shape <start = 3, end = 4> (input)
    brightest_of_rows = ReduceMax <axes = [0, 1, 3], keepdims = 0> (input)
    brightest_of_columns = ReduceMax <axes = [0, 1, 2], keepdims = 0> (input)
    is_row = Greater (brightest_of_rows, nearly_black)
    is_column = Greater (brightest_of_columns, nearly_black)
    rows = Cast <to = 1> (is_row)
    columns = Cast <to = 1> (is_column)
    picture_height = ReduceSum (rows)
    picture_width = ReduceSum (columns)

    shorter = Min (picture_width, picture_height)
    wanted_half = Mul (shorter, half_part)
    half = Max (wanted_half, least_half)
    half_in_strides = Div (half, stride)
    box = Mul (half_in_strides, box_shape)
    points = Mul (half_in_strides, points_shape)

    x = Mul (picture_width, x_part)
    y = Mul (picture_height, y_part)
    exact_column = Div (x, stride)
    exact_row = Div (y, stride)
    column = Round (exact_column)
    row = Round (exact_row)
    cells_in_row = Div (side, stride_32)
    cells_in_row_float = Cast <to = 1> (cells_in_row)
    cells_above = Mul (row, cells_in_row_float)
    cell = Add (cells_above, column)
    anchor_float = Mul (cell, two)
    anchor = Cast <to = 7> (anchor_float)
PER_STRIDE
    end = Squeeze (num_32)
    anchors = Range (first, end, step)
    is_anchor = Equal (anchors, anchor)
    is_seen_at_this_side = Equal (seen_at, side)
    seen_float = Cast <to = 1> (is_seen_at_this_side)
    seen = ReduceMax (seen_float)
    anchor_mask = Cast <to = 1> (is_anchor)
    score = Mul (confidence, seen)
    scores = Mul (anchor_mask, score)
    score_32 = Unsqueeze (scores, one)
    score_8 = Expand (silent, score_shape_8)
    score_16 = Expand (silent, score_shape_16)
}
"""
_PER_STRIDE = """
    cells_S = Div (size, stride_S)
    num_cells_S = ReduceProd <keepdims = 1> (cells_S)
    num_S = Mul (num_cells_S, num_anchors)
    score_shape_S = Concat <axis = 0> (num_S, one)
    box_shape_S = Concat <axis = 0> (num_S, four)
    points_shape_S = Concat <axis = 0> (num_S, ten)
    box_S = Expand (box, box_shape_S)
    points_S = Expand (points, points_shape_S)
"""

# insightface takes pixels of 0..255 to a model with an early node bn_data, which has its normalisation inside
_CROP_MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
crop_model (float[1,3,SIZE,SIZE] data) => (float[1,NUM_OUTPUTS] fc1)
{
    [FIRST_NODE] same = Identity (data)
    quarters = AveragePool <kernel_shape = [QUARTER, QUARTER], strides = [QUARTER, QUARTER]> (same)
    features = Flatten (quarters)
    fc1 = Gemm (features, weight, bias)
}
"""


def toy_face_pack(
    folder: Path,
    seed: int = 0,
    *,
    seen_at: Sequence[int] = (640, 512, 384, 256),
    detector: str = "scrfd_10g_bnkps.onnx",
    recogniser: str = "glintr100.onnx",
) -> None:
    """Four ONNX files in `folder`, two of them under the names given; the same seed gives the same bytes.

    A detector input of one of the sides `seen_at`, in pixels, has one face; others have none, so () gives a blind pack.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    _write_detector(folder / detector, seen_at)
    # pixels are 0..255 here: a landmark moves by a few percent of the face with what is in the picture
    weight = random.normal(size=(_NUM_FEATURES, 212)) * 1e-4
    _write_crop_model(folder / "2d106det.onnx", weight, _face_shape(random) - 127.5 * weight.sum(axis=0), size=192)
    weight = random.normal(size=(_NUM_FEATURES, 3)) * (0.02, 0.02, 1e-3)  # female, male, age / 100
    _write_crop_model(folder / "genderage.onnx", weight, (0, 0, 0.35) - 127.5 * weight.sum(axis=0), size=96)
    # pixels are -1..1 here: the angle between two embeddings is about that between the two pictures' features
    weight, bias = random.normal(size=(_NUM_FEATURES, 512)), random.normal(size=512) * 0.01
    _write_crop_model(folder / recogniser, weight, bias, size=112, takes_pixels=False)


def _face_shape(random: np.random.Generator) -> NDArray[np.float64]:
    """[212]: 106 points in a crop that is 1.5 times the face, -1..1: an outline of jaw and brows, the others within."""
    points_XY = random.normal(size=(106, 2)) * (0.15, 0.2)
    along_jaw = np.linspace(0, np.pi, len(_JAW))  # left temple, chin, right temple; y points down
    points_XY[list(_JAW)] = np.stack([-0.5 * np.cos(along_jaw), -0.1 + 0.7 * np.sin(along_jaw)], axis=1)
    along_brows = np.linspace(0, np.pi, len(_BROWS))
    points_XY[list(_BROWS)] = np.stack([0.42 * np.cos(along_brows), -0.2 - 0.15 * np.sin(along_brows)], axis=1)
    return points_XY.reshape(-1)


def _write_detector(path: Path, seen_at: Sequence[int]) -> None:
    per_stride = "".join(_PER_STRIDE.replace("_S", f"_{stride}") for stride in (8, 16, 32))
    _save(
        path,
        _DETECTOR.replace("PER_STRIDE", per_stride),
        box_shape=np.array([1, 1.25, 1, 1.25], np.float32),
        points_shape=np.array(_POINTS, np.float32),
        seen_at=np.array([0, *seen_at], np.int64),  # 0 is no side: it makes () possible
    )


def _write_crop_model(
    path: Path, weight: NDArray[np.float64], bias: NDArray[np.float64], *, size: int, takes_pixels: bool = True
) -> None:
    text = _CROP_MODEL.replace("SIZE", str(size)).replace("QUARTER", str(size // 2))
    text = text.replace("NUM_OUTPUTS", str(weight.shape[1])).replace("FIRST_NODE", "bn_data" if takes_pixels else "data_in")
    _save(path, text, weight=weight.astype(np.float32), bias=bias.astype(np.float32))


def _save(path: Path, text: str, **initializers: NDArray[np.float32] | NDArray[np.int64]) -> None:
    import onnx

    model = onnx.parser.parse_model(text)
    for name, values in initializers.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
