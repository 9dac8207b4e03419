"""CLIPScore sees the frames and pixels that ConsisID shows its CLIP, but for the order of the colours.

Known answers by hand; ConsisID itself is not run here. Legend: T frames, B of them, H W pixels, C=3 RGB, D width of a feature.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipt2v.metrics import clip
from ipt2v.metrics.clip_score import clip_processor_pixels, clip_score, clip_score_frames
from ipt2v.metrics.toy_quality import toy_clip
from ipt2v.metrics.undefined import Undefined

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TEXT = torch.tensor([[9.0, 0.0]])
MEAN, STD = (
    torch.tensor(rgb).view(3, 1, 1) for rgb in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)


def noise_frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_frames, height, width, 3), generator=generator, dtype=torch.uint8)


def undone(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """CLIP's normalised pixels back on 0..255."""
    return (pixels_BCHW * STD + MEAN) * 255


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (81, [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75]),
        (49, [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45]),
        (16, list(range(16))),
        (5, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]),
        (1, [0] * 16),
    ],
)
def test_sixteen_frames_are_seen(num_frames: int, expected: list[int]) -> None:
    assert clip_score_frames(num_frames) == expected
    seen: list[torch.Tensor] = []
    frames_THWC = torch.arange(num_frames, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 20, 30, 3)
    clip_score(frames_THWC, TEXT, lambda x: seen.append(x) or x.new_ones(len(x), 2), device=CPU)
    assert undone(seen[0])[:, 0, 0, 0].round().int().tolist() == expected


@given(st.integers(1, 5000))
def test_the_frames_are_those_of_consisids_float_arithmetic(num_frames: int) -> None:
    assert clip_score_frames(num_frames) == [int(i * num_frames / 16) for i in range(16)]


def test_the_score_is_a_hundred_times_the_mean_cosine() -> None:
    """Half of the frames point along the text, half have (3, 4) of it, at any length."""
    features_BD = torch.tensor([[5.0, 0.0], [0.3, 0.4]]).repeat(8, 1)
    assert clip_score(noise_frames(20, 20, 20), TEXT, lambda x: features_BD, device=CPU) == pytest.approx(80.0, abs=1e-4)


def test_the_score_may_be_below_zero() -> None:
    found = clip_score(noise_frames(3, 20, 20), TEXT, lambda x: x.new_tensor([-2.0, 0.0]).expand(16, 2), device=CPU)
    assert found == pytest.approx(-100.0, abs=1e-4)


def test_the_score_of_clip_is_that_of_its_two_towers() -> None:
    network = clip.build({key: tensor.float() for key, tensor in toy_clip(0).items()})
    ids_BL = torch.tensor([[524, 5, 7, 320, 525, *[0] * 72]])
    frames_THWC = noise_frames(16, 224, 224)
    with torch.inference_mode():
        images_BD, text_1D = (
            network.encode_image((frames_THWC.permute(0, 3, 1, 2) / 255 - MEAN) / STD),
            network.encode_text(ids_BL),
        )
        expected = 100 * torch.cosine_similarity(images_BD, text_1D).mean().item()
    assert clip_score(frames_THWC, text_1D, network.encode_image, device=CPU) == pytest.approx(expected, abs=1e-3)


# ---- pixels


@pytest.mark.parametrize(("height", "width"), [(480, 832), (720, 1280), (832, 480), (100, 179), (300, 227), (224, 224)])
def test_the_pixels_are_those_of_transformers(height: int, width: int) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    frames_THWC = noise_frames(2, height, width)
    expected = CLIPImageProcessorPil()(images=list(frames_THWC.numpy()), return_tensors="pt")["pixel_values"]
    found = clip_processor_pixels(frames_THWC)
    assert found.shape == (2, 3, 224, 224) and found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)


def test_red_stays_red() -> None:
    """ConsisID's code shows it as blue."""
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, 30, 40, 3)
    assert undone(clip_processor_pixels(red))[0, :, 5, 5].round().tolist() == [255.0, 0.0, 0.0]


def test_stripes_become_grey_with_antialias() -> None:
    """At a third of its size each new column would be one of three without it."""
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(336).view(1, 1, -1, 1).expand(1, 672, -1, 3)
    assert (undone(clip_processor_pixels(stripes))[..., 2:-2] - 127.5).abs().max() < 32


@pytest.mark.parametrize("portrait", [False, True])
def test_the_centre_is_cut_out_and_half_a_pixel_goes_up_and_left(portrait: bool) -> None:
    ramp = torch.arange(227, dtype=torch.uint8).view(1, 1, -1, 1).expand(1, 224, -1, 3)
    found = undone(clip_processor_pixels(ramp.transpose(1, 2) if portrait else ramp))[0, 0].round()
    corner = found[:, 0] if portrait else found[0]
    assert corner.tolist() == list(range(1, 225))  # (227 - 224) / 2 = 1.5, where quality.clip_pixels starts at 2


@pytest.mark.parametrize("size", [32, 56])
def test_another_side_is_possible(size: int) -> None:
    assert clip_processor_pixels(noise_frames(1, 50, 80), size=size).shape == (1, 3, size, size)


# ---- what has no score


def test_a_video_without_frames_has_no_score() -> None:
    none = torch.zeros(0, 20, 30, 3, dtype=torch.uint8)
    assert clip_score(none, TEXT, torch.mean, device=CPU) == Undefined(reason="no frames")


def test_an_answer_that_is_no_number_is_no_score() -> None:
    found = clip_score(noise_frames(3, 20, 20), TEXT, lambda x: x.new_full((len(x), 2), math.nan), device=CPU)
    assert found == Undefined(reason="the network gave no finite number for 16 of 16 inputs")


@pytest.mark.parametrize("wrong", [torch.zeros(2, 20, 30, 3), torch.zeros(2, 3, 20, 30, dtype=torch.uint8)])
def test_what_is_no_video_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[T,H,W,3\]"):
        clip_score(wrong, TEXT, torch.mean, device=CPU)
