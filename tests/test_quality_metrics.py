"""IQ, AQ and OC see what VBench shows its networks, and make of the answers what VBench makes of them.

Known answers by hand; VBench itself is not run here.
Legend: T frames, B of them at a time, H W pixels, C=3 RGB, S side of a square, D width of a feature.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipt2v.metrics import clip, musiq, viclip
from ipt2v.metrics.aesthetic import AestheticHead
from ipt2v.metrics.aesthetic import build as build_head
from ipt2v.metrics.quality import (
    aesthetic_quality,
    clip_pixels,
    fitted,
    imaging_quality,
    middle_frames,
    overall_consistency,
)
from ipt2v.metrics.toy_quality import toy_clip, toy_head, toy_musiq, toy_viclip
from ipt2v.metrics.undefined import Undefined

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MEAN, STD = (
    torch.tensor(rgb).view(3, 1, 1) for rgb in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)


class Seen:
    """A network that remembers what it was shown and answers by a rule."""

    def __init__(self, answer) -> None:
        self.answer, self.inputs = answer, []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x.clone())
        return self.answer(x)


def noise_frames(num_frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, height, width, 3), generator=generator, dtype=torch.uint8)


def striped(columns: tuple[int, ...], height: int, width: int) -> torch.Tensor:
    """One frame [1,H,W,3] whose columns repeat these values."""
    row = torch.tensor(columns, dtype=torch.uint8).repeat(math.ceil(width / len(columns)))[:width]
    return row.view(1, 1, -1, 1).expand(1, height, width, 3)


def undone(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """CLIP's normalised pixels back on 0..255."""
    return (pixels_BCHW * STD + MEAN) * 255


def constant_text(dim: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([0]), dim).float()


# ---- IQ


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 832, (295, 512)),
        (720, 1280, (288, 512)),
        (1280, 720, (512, 288)),
        (512, 512, (512, 512)),
        (513, 100, (512, 99)),
        (300, 511, (300, 511)),  # a small one stays small
        (16, 561, (14, 511)),  # 512 / 561 * 561 is a little less than 512 in floats, and is cut
    ],
)
def test_iq_sees_a_longer_side_of_512(height: int, width: int, expected: tuple[int, int]) -> None:
    network = Seen(lambda x: x.new_full((len(x),), 70.0))
    assert imaging_quality(noise_frames(1, height, width), network, device=CPU) == pytest.approx(0.7)
    assert network.inputs[0].shape == (1, 3, *expected)
    assert network.inputs[0].min() >= 0
    assert network.inputs[0].max() <= 1


def test_iq_resizes_without_antialias_and_without_rounding() -> None:
    """2048 columns to 512: each new one lies half way between the second and the third of four, and sees no other."""
    for columns, expected in (((255, 0, 0, 255), 0.0), ((0, 255, 255, 0), 1.0), ((9, 100, 101, 7), 100.5 / 255)):
        network = Seen(lambda x: x.new_zeros(len(x)))
        imaging_quality(striped(columns, 16, 2048), network, device=CPU)
        assert network.inputs[0].shape == (1, 3, 4, 512)
        assert torch.allclose(network.inputs[0], torch.tensor(expected), atol=1e-6)


def test_iq_leaves_the_pixels_of_a_small_frame_as_they_are() -> None:
    frames_THWC = noise_frames(1, 50, 60)
    network = Seen(lambda x: x.new_zeros(len(x)))
    imaging_quality(frames_THWC, network, device=CPU)
    assert torch.equal(network.inputs[0], frames_THWC.permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_iq_counts_every_frame_once(batch_size: int) -> None:
    """Frames of brightness 0 10 20 30 40, scored by their brightness."""
    frames_THWC = (10 * torch.arange(5, dtype=torch.uint8)).view(-1, 1, 1, 1).expand(-1, 32, 48, 3)
    network = Seen(lambda x: 255 * x.mean((1, 2, 3)))
    found = imaging_quality(frames_THWC, network, device=CPU, batch_size=batch_size)
    assert found == pytest.approx(0.2, abs=1e-6)
    assert [len(x) for x in network.inputs] == [len(part) for part in torch.arange(5).split(batch_size)]


def test_iq_is_not_clamped() -> None:
    assert imaging_quality(noise_frames(2, 9, 9), lambda x: x.new_tensor([130.0, 120.0]), device=CPU) == pytest.approx(1.25)
    assert imaging_quality(noise_frames(2, 9, 9), lambda x: x.new_tensor([-3.0, 1.0]), device=CPU) == pytest.approx(-0.01)


def test_iq_of_musiq_is_the_mean_of_its_frames_and_batches_change_nothing() -> None:
    network = musiq.build(toy_musiq(0))
    frames_THWC = noise_frames(3, 70, 90)
    with torch.inference_mode():
        alone = [network(frame_HWC.permute(2, 0, 1)[None] / 255).item() for frame_HWC in frames_THWC]
    assert max(alone) - min(alone) > 1e-3
    assert all(20 < score < 80 for score in alone)  # of the toy
    for batch_size in (1, 2, 8):
        found = imaging_quality(frames_THWC, network, device=CPU, batch_size=batch_size)
        assert found == pytest.approx(sum(alone) / 300, abs=1e-5)


# ---- the two ways to CLIP


# of four columns the bicubic sample half way between the second and the third weighs -3/32 19/32 19/32 -3/32
PLANTED = [
    ((255, 0, 0, 255), -47.8125, 0.0),
    ((0, 255, 255, 0), 302.8125, 255.0),
    ((101, 100, 100, 101), 99.8125, 100.0),
    ((96, 98, 99, 98), 98.78125, 99.0),
    ((30, 30, 30, 30), 30.0, 30.0),
]


@pytest.mark.parametrize(("columns", "as_float", "as_uint8"), PLANTED)
def test_aq_sees_floats_and_oc_sees_uint8(columns: tuple[int, ...], as_float: float, as_uint8: float) -> None:
    frames_THWC = striped(columns, 896, 896)
    images, video = Seen(lambda x: x.new_ones(len(x), 4)), Seen(lambda x: x.new_ones(1, 4))
    aesthetic_quality(frames_THWC, images, lambda x: x[:, :1], device=CPU)
    overall_consistency(frames_THWC, constant_text(4), video, device=CPU)
    assert images.inputs[0].shape == (1, 3, 224, 224)
    assert video.inputs[0].shape == (1, 8, 3, 224, 224)
    assert torch.allclose(undone(images.inputs[0]), torch.tensor(as_float), atol=1e-3)
    assert torch.allclose(undone(video.inputs[0]), torch.tensor(as_uint8), atol=1e-3)


def test_the_two_ways_differ_by_little_but_do_differ() -> None:
    pixels_BCHW = noise_frames(1, 300, 260).permute(0, 3, 1, 2).float()
    as_float, as_uint8 = (clip_pixels(pixels_BCHW, as_uint8=flag) for flag in (False, True))
    assert 0 < (as_float - as_uint8).abs().max() < 1.5
    inside = (undone(as_float) > 0) & (undone(as_float) < 255)
    assert (undone(as_float) - undone(as_uint8))[inside].abs().max() < 0.5 + 1e-3
    assert torch.allclose(undone(as_uint8), undone(as_uint8).round(), atol=1e-3)


def test_a_checkerboard_of_single_pixels_becomes_grey_without_antialias() -> None:
    """At half its size each sample lies half way between white and black; at a third it lies on one pixel, and stays so."""
    board = ((torch.arange(672)[:, None] + torch.arange(672)) % 2).float().expand(1, 3, -1, -1) * 255
    halved = undone(clip_pixels(board[..., :448, :448], as_uint8=False))
    # but for the border, where the edge is repeated
    assert torch.allclose(halved[..., 1:-1, 1:-1], torch.tensor(127.5), atol=1e-3)
    third = undone(clip_pixels(board, as_uint8=False))
    assert torch.allclose(third, board[:, :, 1::3, 1::3], atol=1e-3)
    assert set(third.round().unique().tolist()) == {0.0, 255.0}


@pytest.mark.parametrize(("width", "left"), [(224, 0), (226, 1), (229, 2), (231, 4), (230, 3), (300, 38)])
@pytest.mark.parametrize("portrait", [False, True])
def test_the_centre_is_cut_out_and_halves_go_to_the_even_number(width: int, left: int, portrait: bool) -> None:
    pixels = torch.arange(width, dtype=torch.float32).mul(0.7).expand(1, 3, 224, width)
    expected = pixels[..., left : left + 224]
    if portrait:
        pixels, expected = pixels.transpose(2, 3), expected.transpose(2, 3)
    assert torch.allclose(undone(clip_pixels(pixels, as_uint8=False)), expected, atol=1e-3)


@pytest.mark.parametrize(("height", "width", "left"), [(480, 832, 82), (720, 1280, 87), (100, 179, 88)])
def test_the_longer_side_is_cut_to_an_integer(height: int, width: int, left: int) -> None:
    """480x832 becomes 224x388 (388.27), its middle at column 82; 720x1280 224x398; 100x179 grows to 224x400 (400.96)."""
    pixels = torch.arange(width, dtype=torch.float32).mul(0.1).expand(1, 3, height, width)
    resized = torch.nn.functional.interpolate(pixels, size=(224, int(224 * width / height)), mode="bicubic")
    found = undone(clip_pixels(pixels, as_uint8=False))
    assert found.shape == (1, 3, 224, 224)
    assert torch.allclose(found, resized[..., left : left + 224], atol=1e-3)


# ---- AQ


def test_aq_normalises_features_and_divides_by_ten() -> None:
    """Two frames whose features are (3, 4) and (0, 0.1): of length 1 (0.6, 0.8) and (0, 1)."""
    features_BD = torch.tensor([[3.0, 4.0], [0.0, 0.1]])
    found = aesthetic_quality(
        noise_frames(2, 20, 20), lambda x: features_BD, lambda x: x @ torch.tensor([[5.0], [2.0]]) + 1, device=CPU
    )
    assert found == pytest.approx(((3 + 1.6 + 1) + (2 + 1)) / 20)


def test_aq_of_half_precision_features_is_computed_in_float32() -> None:
    head = Seen(lambda x: x[:, :1])
    aesthetic_quality(noise_frames(2, 20, 20), lambda x: x.new_ones(2, 3).half(), head, device=CPU)
    assert head.inputs[0].dtype == torch.float32


def test_aq_of_clip_is_the_mean_of_its_frames_and_batches_change_nothing() -> None:
    network, head = clip.build({key: tensor.float() for key, tensor in toy_clip(0).items()}), build_head(toy_head(0))
    frames_THWC = noise_frames(3, 250, 230)
    by_hand = []
    with torch.inference_mode():
        for frame_HWC in frames_THWC:
            pixels = frame_HWC.permute(2, 0, 1)[None].float()
            pixels = torch.nn.functional.interpolate(pixels, size=(243, 224), mode="bicubic")[:, :, 10:234] / 255
            features = network.encode_image((pixels - MEAN) / STD)[0]
            by_hand.append((head.weight[0] @ features / features.norm() + head.bias[0]).item() / 10)
    assert max(by_hand) - min(by_hand) > 1e-4
    assert all(0.1 < score < 0.9 for score in by_hand)  # of the toy
    for batch_size in (1, 2, 32):
        found = aesthetic_quality(frames_THWC, network.encode_image, head, device=CPU, batch_size=batch_size)
        assert found == pytest.approx(sum(by_hand) / 3, abs=1e-5)


def test_aq_with_laions_head_of_features_along_one_axis_is_that_weight() -> None:
    head = AestheticHead(5, 1).requires_grad_(False)
    found = aesthetic_quality(noise_frames(1, 30, 30), lambda x: 7 * constant_text(5), head, device=CPU)
    assert found == pytest.approx((head.weight[0, 0] + head.bias[0]).item() / 10, abs=1e-6)


# ---- OC


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (81, [4, 14, 24, 34, 44, 54, 64, 75]),
        (49, [2, 8, 14, 20, 26, 32, 38, 45]),
        (16, [0, 2, 4, 6, 8, 10, 12, 14]),
        (9, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, [0, 1, 2, 2, 2, 2, 2, 2]),
        (1, [0] * 8),
    ],
)
def test_oc_sees_the_middle_frames(num_frames: int, expected: list[int]) -> None:
    assert middle_frames(num_frames) == expected
    frames_THWC = torch.arange(num_frames, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 20, 30, 3)
    network = Seen(lambda x: x.new_ones(1, 2))
    overall_consistency(frames_THWC, torch.ones(1, 2), network, device=CPU)
    assert undone(network.inputs[0][0])[:, 0, 0, 0].round().int().tolist() == expected


@given(st.integers(1, 2000))
def test_eight_frames_in_order_are_seen_of_any_video(num_frames: int) -> None:
    indices = middle_frames(num_frames)
    assert len(indices) == 8
    assert indices == sorted(indices)
    assert 0 <= indices[0] <= indices[-1] < num_frames
    assert len(set(indices)) == min(8, num_frames)


@pytest.mark.parametrize(("video", "expected"), [((5.0, 0.0), 1.0), ((0.0, 2.0), 0.0), ((-0.1, 0.0), -1.0), ((3.0, 4.0), 0.6)])
def test_oc_is_the_plain_cosine(video: tuple[float, float], expected: float) -> None:
    found = overall_consistency(
        noise_frames(4, 20, 20), torch.tensor([[9.0, 0.0]]), lambda x: torch.tensor([video]), device=CPU
    )
    assert found == pytest.approx(expected, abs=1e-6)


def test_oc_of_viclip_is_that_of_its_frames_and_text() -> None:
    network = viclip.build(toy_viclip(0)["model"])
    frames_THWC, ids_BL = noise_frames(8, 224, 224), torch.tensor([[524, 5, 7, 320, 525, *[0] * 27]])
    pixels = (frames_THWC.permute(0, 3, 1, 2) / 255 - MEAN) / STD
    with torch.inference_mode():
        video, text = network.encode_video(pixels[None]), network.encode_text(ids_BL)
        expected = torch.cosine_similarity(video, text).item()
    found = overall_consistency(frames_THWC, text, network.encode_video, device=CPU)
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(expected) < 0.99


# ---- what has no score


def test_a_video_without_frames_has_no_score() -> None:
    none = torch.zeros(0, 20, 30, 3, dtype=torch.uint8)
    never = Seen(lambda x: x)
    results = (
        imaging_quality(none, never, device=CPU),
        aesthetic_quality(none, never, never, device=CPU),
        overall_consistency(none, torch.ones(1, 2), never, device=CPU),
    )
    assert results == (Undefined(reason="no frames"),) * 3
    assert never.inputs == []


def test_an_answer_that_is_no_number_is_no_score() -> None:
    frames_THWC = noise_frames(3, 20, 20)
    iq = imaging_quality(frames_THWC, lambda x: x.new_tensor([1.0, math.nan, math.inf]), device=CPU)
    assert iq == Undefined(reason="the network gave no finite number for 2 of 3 inputs")
    oc = overall_consistency(frames_THWC, torch.ones(1, 2), lambda x: torch.full((1, 2), math.nan), device=CPU)
    assert oc == Undefined(reason="the network gave no finite number for 1 of 1 inputs")
    aq = aesthetic_quality(frames_THWC, lambda x: x.new_ones(3, 2), lambda x: x[:, :1] / 0, device=CPU)
    assert aq == Undefined(reason="the network gave no finite number for 3 of 3 inputs")


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(2, 20, 30, 3), torch.zeros(2, 3, 20, 30, dtype=torch.uint8), torch.zeros(20, 30, 3, dtype=torch.uint8)],
)
def test_what_is_no_video_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[T,H,W,3\]"):
        imaging_quality(wrong, torch.mean, device=CPU)
    with pytest.raises(ValueError, match=r"expected uint8 \[T,H,W,3\]"):
        aesthetic_quality(wrong, torch.mean, torch.mean, device=CPU)
    with pytest.raises(ValueError, match=r"expected uint8 \[T,H,W,3\]"):
        overall_consistency(wrong, torch.ones(1, 2), torch.mean, device=CPU)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 0: expected at least 1"):
        imaging_quality(noise_frames(1, 9, 9), torch.mean, device=CPU, batch_size=0)


def test_a_frame_that_fits_is_not_touched() -> None:
    pixels_BCHW = torch.rand(1, 3, 512, 40)
    assert fitted(pixels_BCHW) is pixels_BCHW
