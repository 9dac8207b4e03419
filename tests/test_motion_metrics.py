"""Dynamic degree and motion smoothness are VBench's formulas, whatever flow or interpolation they are given.

Legend: T frames, B pairs, H W pixels, C=3 RGB, 2 = x then y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ipt2v.metrics import amt, motion, raft
from ipt2v.metrics.motion import DynamicDegree, dynamic_degree, motion_smoothness, sampling_interval, verdict
from ipt2v.metrics.toy_motion import toy_amt, toy_raft
from ipt2v.metrics.undefined import Undefined

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
Pair = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def noise_HWC(height: int = 128, width: int = 136, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def clip(frames: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(frames))


def noise_clip(num_frames: int, height: int = 128, width: int = 136, seed: int = 0) -> torch.Tensor:
    return clip([noise_HWC(height, width, seed=1000 * seed + index) for index in range(num_frames)])


def shifted_clip(num_frames: int, pixels_per_frame: int, *, height: int = 128, width: int = 136, axis: int = 1) -> torch.Tensor:
    """Noise that moves round and round."""
    first = noise_HWC(height, width)
    return clip([np.roll(first, index * pixels_per_frame, axis) for index in range(num_frames)])


def found_shift(first_BCHW: torch.Tensor, second_BCHW: torch.Tensor) -> torch.Tensor:
    """The exact flow of noise that moves round and round, found by trying; sides that need no padding."""
    flow = torch.full((len(first_BCHW), 2, *first_BCHW.shape[-2:]), float("nan"))
    for index, (first, second) in enumerate(zip(first_BCHW, second_BCHW, strict=True)):
        for channel, axis in ((0, 2), (1, 1)):
            for pixels in range(-20, 21):
                if torch.equal(first.roll(pixels, axis), second):
                    flow[index] = 0
                    flow[index, channel] = pixels
    return flow


def even_flow(pixels: float) -> Pair:
    def flow(first_BCHW: torch.Tensor, second_BCHW: torch.Tensor) -> torch.Tensor:
        field = torch.zeros(len(first_BCHW), 2, *first_BCHW.shape[-2:])
        field[:, 1] = -pixels
        return field

    return flow


def degree(found: DynamicDegree | Undefined) -> DynamicDegree:
    assert isinstance(found, DynamicDegree), found
    return found


def blend(first_BCHW: torch.Tensor, second_BCHW: torch.Tensor) -> torch.Tensor:
    return (first_BCHW + second_BCHW) / 2


# ---- dynamic degree: which frames, how many, how far


@pytest.mark.parametrize(
    ("fps", "interval"),
    [(1, 1), (4, 1), (8, 1), (12, 2), (15, 2), (16, 2), (20, 2), (24, 3), (23.976, 3), (25, 3), (28, 4), (30, 4), (60, 8)],
)
def test_frames_are_taken_at_about_eight_a_second_and_halves_round_to_even(fps: float, interval: int) -> None:
    assert sampling_interval(fps) == interval


@pytest.mark.parametrize(
    ("num_frames", "fps", "size", "interval", "num_sampled", "threshold_pixels", "num_needed"),
    [
        (81, 16, (480, 832), 2, 41, 11.25, 10),
        (81, 16, (720, 1280), 2, 41, 16.875, 10),
        (49, 8, (480, 720), 1, 49, 11.25, 12),
        (129, 24, (720, 1280), 3, 43, 16.875, 11),
        (25, 30, (512, 512), 4, 7, 12.0, 2),
    ],
)
def test_the_usual_videos_have_these_thresholds(
    num_frames, fps, size, interval, num_sampled, threshold_pixels, num_needed
) -> None:
    height, width = size
    assert sampling_interval(fps) == interval
    assert len(range(0, num_frames, interval)) == num_sampled
    found = verdict([0.0] * (num_sampled - 1), height=height, width=width)
    assert (found.threshold_pixels, found.num_needed) == (threshold_pixels, num_needed)
    # the shorter side counts, whichever it is
    assert verdict([0.0], height=width, width=height).threshold_pixels == threshold_pixels


@pytest.mark.parametrize(
    ("num_sampled", "num_needed"), [(2, 0), (3, 1), (6, 2), (10, 2), (14, 4), (18, 4), (22, 6), (41, 10), (42, 10), (46, 12)]
)
def test_a_half_pair_rounds_to_even(num_sampled: int, num_needed: int) -> None:
    scores = [0.0] * (num_sampled - 1)
    assert verdict(scores, height=256, width=256).num_needed == num_needed
    for num_moving in range(num_sampled):
        found = verdict([6.1] * num_moving + scores[num_moving:], height=256, width=256)
        assert (found.num_moving_pairs, found.dynamic) == (num_moving, num_moving >= num_needed)


def test_a_pair_at_the_threshold_stands_still() -> None:
    assert not verdict([6.0] * 15, height=256, width=300).dynamic
    assert verdict([float(np.nextafter(6, 7))] * 15, height=256, width=300).dynamic


def test_it_does_not_matter_which_pairs_move() -> None:
    scores = [9.0, 0.0, 0.0, 9.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0]
    assert verdict(scores, height=256, width=256).dynamic
    assert not verdict([0.0, *scores[1:]], height=256, width=256).dynamic


@pytest.mark.parametrize("fps", [4, 8, 16, 30])
def test_a_static_clip_does_not_move(fps: float) -> None:
    found = degree(dynamic_degree(shifted_clip(24, 0), fps, found_shift, device=CPU))
    assert not found.dynamic
    assert (found.motion_pixels, found.num_moving_pairs) == (0.0, 0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("fps", "pixels_per_frame", "side", "dynamic"),
    [
        (8, 3, 128, False),  # threshold 3.0: as far as that is not farther
        (8, 4, 128, True),
        (8, -4, 128, True),
        (16, 1, 128, False),  # 2 pixels from one sampled frame to the next
        (16, 2, 128, True),
        (24, 1, 128, False),
        (24, 2, 256, False),  # threshold 6.0
        (24, 2, 248, True),  # threshold 5.8125
        (30, 1, 168, True),  # interval 4, threshold 3.9375
        (30, 1, 176, False),  # threshold 4.125
    ],
)
def test_a_shifted_clip_moves_from_where_the_formula_says(axis, fps, pixels_per_frame, side, dynamic) -> None:
    found = degree(
        dynamic_degree(shifted_clip(13, pixels_per_frame, height=side, width=side + 8, axis=axis), fps, found_shift, device=CPU)
    )
    pixels = abs(pixels_per_frame) * sampling_interval(fps)
    assert found.dynamic == dynamic == (pixels > 6 * side / 256)
    assert found.motion_pixels == pixels
    assert found.num_pairs == -(-13 // sampling_interval(fps)) - 1


@given(side=st.integers(121, 400), longer=st.integers(0, 40), over=st.sampled_from([-1e-3, 0.0, 1e-3]))
@settings(max_examples=15)
def test_an_even_flow_moves_a_clip_of_any_size_just_above_its_threshold(side: int, longer: int, over: float) -> None:
    pixels = float(np.float32(6 * side / 256 + over))
    found = degree(dynamic_degree(torch.zeros(5, side + longer, side, 3, dtype=torch.uint8), 8, even_flow(pixels), device=CPU))
    assert found.dynamic == (pixels > 6 * side / 256)
    assert found.motion_pixels == pixels


def test_the_fastest_twentieth_of_the_padded_pixels_counts() -> None:
    """123 rows are padded to 128: 5% of 128*136 pixels is 870, and 6 of 10 of them are as fast as they can be."""

    def flow(first_BCHW: torch.Tensor, second_BCHW: torch.Tensor) -> torch.Tensor:
        assert first_BCHW.shape == second_BCHW.shape == (2, 3, 128, 136)
        field = torch.zeros(2, 2, 128 * 136)
        field[:, 0, :522], field[:, 1, :522] = 30, -40
        field[:, 0, 522:2000] = -1
        return field.view(2, 2, 128, 136)

    found = degree(dynamic_degree(noise_clip(3, height=123), 8, flow, device=CPU))
    assert int(128 * 136 * 0.05) == 870
    assert found.motion_pixels == pytest.approx((522 * 50 + 348) / 870, abs=1e-6)
    assert found.threshold_pixels == 6 * 123 / 256


@given(st.integers(121, 150), st.integers(121, 150), st.sampled_from([8, 16]))
@settings(max_examples=30)
def test_padding_repeats_the_edge_and_puts_the_larger_half_last(height: int, width: int, multiple: int) -> None:
    frame = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    found = motion.padded(frame, multiple)
    rows, columns = -height % multiple, -width % multiple
    expected = np.pad(
        frame[0].numpy(), ((0, 0), (rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2)), mode="edge"
    )
    assert np.array_equal(found[0].numpy(), expected)
    assert torch.equal(motion.cropped(found, height, width), frame)


def test_the_flow_is_asked_for_neighbouring_sampled_frames_in_0_to_255() -> None:
    frames = noise_clip(9)
    seen = []

    def flow(first_BCHW: torch.Tensor, second_BCHW: torch.Tensor) -> torch.Tensor:
        seen.extend(zip(first_BCHW, second_BCHW, strict=True))
        return torch.zeros(len(first_BCHW), 2, 128, 136)

    dynamic_degree(frames, 16, flow, device=CPU, batch_size=3)
    wanted = [(frames[index], frames[index + 2]) for index in (0, 2, 4, 6)]
    assert len(seen) == len(wanted)
    for found, pair in zip(seen, wanted, strict=True):
        assert all(torch.equal(a.permute(1, 2, 0), b.float()) for a, b in zip(found, pair, strict=True))


def test_two_sampled_frames_are_dynamic_even_when_nothing_moves_as_in_vbench() -> None:
    assert degree(dynamic_degree(shifted_clip(2, 0), 8, found_shift, device=CPU)).dynamic


# ---- motion smoothness


@pytest.mark.parametrize("num_frames", [3, 4, 9])
def test_a_static_clip_is_perfectly_smooth(num_frames: int) -> None:
    frames = shifted_clip(num_frames, 0)
    assert motion_smoothness(frames, blend, device=CPU) == 1.0
    assert motion_smoothness(frames, lambda first, second: second, device=CPU) == 1.0


def test_every_grey_value_survives_division_and_truncation() -> None:
    greys = torch.arange(256, dtype=torch.uint8).repeat(128 * 128 * 3 // 256).view(1, 128, 128, 3).expand(3, -1, -1, -1)
    assert motion_smoothness(greys, lambda first, second: first, device=CPU) == 1.0


def test_the_error_is_the_mean_over_pixels_channels_and_pairs() -> None:
    frames = torch.full((7, 128, 128, 3), 100, dtype=torch.uint8)
    frames[1] += 6
    frames[3, :64] -= 4
    frames[5, :, :, 0] += 9
    expected = (255 - (6 + 2 + 3) / 3) / 255
    assert motion_smoothness(frames, blend, device=CPU) == pytest.approx(expected, abs=1e-12)


def test_a_prediction_is_truncated_and_not_rounded() -> None:
    frames = torch.full((3, 128, 128, 3), 100, dtype=torch.uint8)

    def almost_101(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.full_like(first, 100.99 / 255)

    assert motion_smoothness(frames, almost_101, device=CPU) == 1.0
    frames[1] = 101
    assert motion_smoothness(frames, almost_101, device=CPU) == (255 - 1) / 255


@pytest.mark.parametrize(("value", "grey"), [(-0.5, 0), (1.5, 255), (-0.001, 0), (0.999, 254), (1.0, 255)])
def test_a_prediction_beyond_the_range_is_clipped_first(value: float, grey: int) -> None:
    assert motion.truncated(torch.tensor([value])).tolist() == [grey]


def test_the_even_frames_predict_the_odd_ones_and_a_last_odd_one_is_left_out() -> None:
    frames = noise_clip(6)
    seen = []

    def interpolate(first_BCHW: torch.Tensor, second_BCHW: torch.Tensor) -> torch.Tensor:
        seen.extend(zip(first_BCHW, second_BCHW, strict=True))
        return first_BCHW

    score = motion_smoothness(frames, interpolate, device=CPU, batch_size=1)
    assert len(seen) == 2
    for (first, second), (a, b) in zip(seen, [(0, 2), (2, 4)], strict=True):
        crop = [motion.cropped(one[None], 128, 136)[0].permute(1, 2, 0) for one in (first, second)]
        assert torch.equal(crop[0], frames[a].float() / 255)
        assert torch.equal(crop[1], frames[b].float() / 255)
    errors = np.abs(frames[[0, 2]].numpy().astype(int) - frames[[1, 3]].numpy().astype(int))
    assert score == pytest.approx((255 - errors.mean()) / 255, abs=1e-12)
    frames[5] = 0
    assert motion_smoothness(frames, interpolate, device=CPU) == score


def test_frames_are_padded_to_sixteen_and_predictions_cut_back() -> None:
    frames = noise_clip(3, height=121, width=133)
    frames[2] = frames[0]

    def interpolate(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        assert first.shape == (1, 3, 128, 144)
        assert torch.equal(first, F.pad(first[:, :, 3:124, 5:138], (5, 6, 3, 4), mode="replicate"))
        return first

    frames[1] = frames[0]
    assert motion_smoothness(frames, interpolate, device=CPU) == 1.0


# ---- what cannot be scored


@pytest.mark.parametrize(("num_frames", "fps"), [(0, 8), (1, 8), (2, 16), (4, 30)])
def test_without_a_pair_of_sampled_frames_there_is_no_verdict(num_frames: int, fps: float) -> None:
    found = dynamic_degree(torch.zeros(num_frames, 128, 128, 3, dtype=torch.uint8), fps, found_shift, device=CPU)
    assert isinstance(found, Undefined)
    assert found.reason.startswith(f"{num_frames} frames at {fps} fps")


@pytest.mark.parametrize("num_frames", [0, 1, 2])
def test_without_a_frame_between_two_there_is_no_smoothness(num_frames: int) -> None:
    found = motion_smoothness(torch.zeros(num_frames, 128, 128, 3, dtype=torch.uint8), blend, device=CPU)
    assert found == Undefined(reason=f"{num_frames} frames: at least 3 needed")


@pytest.mark.parametrize(
    ("side", "dynamic_is_defined", "smoothness_is_defined"), [(112, 0, 0), (113, 0, 1), (120, 0, 1), (121, 1, 1)]
)
def test_frames_too_small_for_the_networks_have_no_scores(
    side: int, dynamic_is_defined: int, smoothness_is_defined: int
) -> None:
    frames = torch.zeros(5, side, 200, 3, dtype=torch.uint8)
    dynamic, smoothness = dynamic_degree(frames, 8, even_flow(1), device=CPU), motion_smoothness(frames, blend, device=CPU)
    assert isinstance(dynamic, DynamicDegree) == bool(dynamic_is_defined)
    assert isinstance(smoothness, float) == bool(smoothness_is_defined)
    if isinstance(dynamic, Undefined):
        assert dynamic.reason == f"200x{side} pixels: 121 needed on either side"
    if isinstance(smoothness, Undefined):
        assert smoothness.reason == f"200x{side} pixels: 113 needed on either side"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_score(value: float) -> None:
    frames = noise_clip(5)
    assert dynamic_degree(frames, 8, even_flow(value), device=CPU) == Undefined(reason="the flow is not finite")
    found = motion_smoothness(frames, lambda first, second: torch.full_like(first, value), device=CPU)
    assert found == Undefined(reason="the interpolated frame is not finite")


@pytest.mark.parametrize("shape", [(5, 128, 128), (5, 3, 128, 128), (5, 128, 128, 4)])
def test_frames_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    for score in (
        lambda frames: dynamic_degree(frames, 8, found_shift, device=CPU),
        lambda f: motion_smoothness(f, blend, device=CPU),
    ):
        with pytest.raises(ValueError, match=r"expected uint8 \[T,H,W,3\]"):
            score(torch.zeros(shape, dtype=torch.uint8))


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"frames are torch\.float32"):
        motion_smoothness(torch.zeros(5, 128, 128, 3), blend, device=CPU)
    with pytest.raises(ValueError, match="fps 0: expected a positive number"):
        dynamic_degree(noise_clip(3), 0, found_shift, device=CPU)
    with pytest.raises(ValueError, match="batch_size 0"):
        motion_smoothness(noise_clip(3), blend, device=CPU, batch_size=0)


# ---- with the networks


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> raft.RAFT:
    path: Path = tmp_path_factory.mktemp("raft") / "raft-things.pth"
    torch.save(toy_raft(1), path)
    return raft.load_raft(path, device=CPU)


@pytest.fixture(scope="module")
def interpolate(tmp_path_factory: pytest.TempPathFactory) -> amt.AMT:
    path: Path = tmp_path_factory.mktemp("amt") / "amt-s.pth"
    torch.save(toy_amt(1), path)
    return amt.load_amt(path, device=CPU)


def test_padding_suits_the_networks() -> None:
    assert (motion.FLOW_MULTIPLE, motion.INTERPOLATION_MULTIPLE) == (raft.STRIDE, amt.STRIDE)


@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_pairs_in_batches_score_as_they_do_one_by_one(flow: raft.RAFT, interpolate: amt.AMT, batch_size: int) -> None:
    frames = noise_clip(7, height=125, width=141)
    one, many = (degree(dynamic_degree(frames, 8, flow, device=CPU, batch_size=size)) for size in (1, batch_size))
    assert (one.dynamic, one.num_moving_pairs, one.num_pairs) == (many.dynamic, many.num_moving_pairs, many.num_pairs)
    assert many.motion_pixels == pytest.approx(one.motion_pixels, rel=1e-4)
    smooth, also = (motion_smoothness(frames, interpolate, device=CPU, batch_size=size) for size in (1, batch_size))
    assert also == pytest.approx(smooth, abs=1e-5)


def test_scores_are_the_same_each_time(flow: raft.RAFT, interpolate: amt.AMT) -> None:
    frames, other = noise_clip(5), noise_clip(5, seed=1)
    first = dynamic_degree(frames, 8, flow, device=CPU), motion_smoothness(frames, interpolate, device=CPU)
    dynamic_degree(other, 8, flow, device=CPU)
    assert (dynamic_degree(frames, 8, flow, device=CPU), motion_smoothness(frames, interpolate, device=CPU)) == first
    assert 0 < degree(first[0]).motion_pixels < 100
    assert isinstance(first[1], float)
    assert 0 < first[1] < 1


@pytest.mark.parametrize("size", [(121, 122), (128, 136)])
def test_the_smallest_frames_that_are_accepted_give_the_networks_numbers(flow, interpolate, size: tuple[int, int]) -> None:
    frames = noise_clip(3, *size)
    assert np.isfinite(degree(dynamic_degree(frames, 8, flow, device=CPU)).motion_pixels)
    assert isinstance(motion_smoothness(noise_clip(3, 113, 114), interpolate, device=CPU), float)
