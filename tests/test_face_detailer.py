"""Claims about redrawing faces: the geometry of crops and masks, what a paste leaves alone, and the steps that SDXL takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipt2v.config import FaceDetailerConfig
from ipt2v.models.face_detailer import (
    Crop,
    ImageHWC,
    MaskHW,
    blurred,
    box_mask,
    boxes_of,
    crop_around,
    detail,
    enlarged_size,
    large_enough,
    load_inpainter,
    paste,
    steps_and_strength,
)
from ipt2v.models.faces import Face

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

SETTINGS = FaceDetailerConfig()
SMALL = FaceDetailerConfig(guide_size=64, max_size=64)
WHITE = 255


def picture(height: int = 120, width: int = 160) -> ImageHWC:
    return np.random.default_rng(0).integers(0, 200, (height, width, 3), np.uint8)


class Painter:
    """An inpaint that draws white, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[ImageHWC, MaskHW, int]] = []

    def __call__(self, crop_HWC: ImageHWC, mask_HW: MaskHW, seed: int) -> ImageHWC:
        self.asked.append((crop_HWC, mask_HW, seed))
        return np.full_like(crop_HWC, WHITE)


# ---- geometry


@pytest.mark.parametrize(
    ("size", "box", "guide", "region", "enlarged", "drawn"),
    [
        ((832, 480), (340, 60.7, 505.9, 281.3), 1024, (257, 0, 588, 441), (768, 1024), (768, 1024)),
        ((1024, 1024), (400, 200, 620, 490), 896, (290, 55, 730, 635), (679, 896), (672, 896)),
        # at the lower right edge the crop is moved inwards; a crop longer than the picture is all of it
        ((832, 480), (732, 400, 832, 480), 1024, (632, 320, 832, 480), (1024, 819), (1024, 816)),
        ((100, 300), (10, 100, 90, 200), 1024, (0, 50, 100, 250), (512, 1024), (512, 1024)),
        # a face larger than guide_size keeps its size
        ((2000, 2000), (500, 500, 1300, 1300), 512, (100, 100, 1700, 1700), (1600, 1600), (1600, 1600)),
    ],
)
def test_crop_and_enlarged_size_of_worked_examples(
    size: tuple[int, int], box: tuple[float, ...], guide: int, region: tuple[int, ...], enlarged: Any, drawn: Any
) -> None:
    settings = FaceDetailerConfig(guide_size=guide, max_size=guide)
    crop = crop_around(box, *size, settings)
    assert (crop.left, crop.top, crop.right, crop.bottom) == region
    shorter = min(box[2] - box[0], box[3] - box[1])
    assert enlarged_size(region[2] - region[0], region[3] - region[1], shorter, settings) == enlarged
    assert (crop.drawn_width, crop.drawn_height) == drawn


@given(
    st.tuples(st.integers(16, 900), st.integers(16, 900)),
    st.lists(st.floats(-50, 950), min_size=4, max_size=4),
    st.sampled_from([256, 512, 1024]),
)
def test_a_crop_lies_in_the_picture_around_its_box_and_is_drawn_at_a_legal_size(
    size: tuple[int, int], values: list[float], guide: int
) -> None:
    (x1, x2), (y1, y2) = sorted(values[:2]), sorted(values[2:])
    settings = FaceDetailerConfig(guide_size=guide, max_size=guide)
    for box in large_enough([(x1, y1, x2, y2)], *size, settings.drop_size):
        crop = crop_around(box, *size, settings)
        assert 0 <= crop.left <= box[0] + 1
        assert box[2] - 1 <= crop.right <= size[0]
        assert 0 <= crop.top <= box[1] + 1
        assert box[3] - 1 <= crop.bottom <= size[1]
        assert crop.drawn_width % 8 == crop.drawn_height % 8 == 0
        longer = max(crop.right - crop.left, crop.bottom - crop.top)
        assert 8 <= max(crop.drawn_width, crop.drawn_height) <= max(guide, longer)


def test_the_mask_is_the_box_grown_by_four_to_the_left_and_above_by_five_to_the_right_and_below() -> None:
    ys, xs = np.nonzero(box_mask((40.9, 30.9, 60.9, 70.9), 160, 120, dilation=10))
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (40 - 4, 30 - 4, 60 + 5, 70 + 5)
    assert len(xs) == (65 - 36 + 1) * (75 - 26 + 1)


@pytest.mark.parametrize(("dilation", "grown"), [(0, (0, 0)), (1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (10, (4, 5))])
def test_the_mask_grows_by_the_dilation_less_one(dilation: int, grown: tuple[int, int]) -> None:
    xs = np.nonzero(box_mask((40, 30, 60, 70), 160, 120, dilation))[1]
    assert (40 - xs.min(), xs.max() - 60) == grown


def test_the_mask_of_a_box_at_the_edge_ends_there() -> None:
    mask_HW = box_mask((0, 0, 160, 120), 160, 120, dilation=10)
    assert mask_HW.shape == (120, 160)
    assert mask_HW.all()


def test_a_box_with_a_side_of_ten_pixels_or_less_is_dropped_and_the_others_keep_their_order() -> None:
    boxes = [(50, 0, 80, 40), (0, 0, 10, 40), (0, 0, 40, 10), (0, 0, 10.1, 10.1), (10, 10, 30, 30)]
    assert large_enough(boxes, 160, 120, 10) == [boxes[0], boxes[3], boxes[4]]


def test_a_box_counts_as_far_as_it_lies_in_the_picture() -> None:
    boxes = [(-30, -5, 10, 40), (-30, -5, 20, 40), (150.5, 5, 200, 50)]
    assert large_enough(boxes, 160, 120, 10) == [(0, 0, 20, 40)]


def test_only_boxes_of_sure_faces_are_taken() -> None:
    def face(score: float) -> Face:
        zeros = np.zeros(4, np.float32)
        return Face(box_xyxy=zeros + score, score=score, landmarks_106=zeros, is_male=True, embedding=zeros)

    assert [box[0] for box in boxes_of([face(0.75), face(0.25), face(0.5)], SETTINGS)] == [0.75, 0.5]


# ---- paste


def test_the_feather_is_a_gaussian_of_eleven_pixels() -> None:
    mask_HW = np.zeros((40, 50), np.bool_)
    mask_HW[20, 25] = True
    opacity_HW = blurred(mask_HW, 5)
    assert np.count_nonzero(opacity_HW) == 11 * 11
    assert opacity_HW.sum() == pytest.approx(1)
    assert opacity_HW[20, 30] / opacity_HW[20, 25] == pytest.approx(np.exp(-(5**2) / (2 * 10**2)))
    np.testing.assert_allclose(opacity_HW[15:26, 20:31], opacity_HW[15:26, 20:31].T)


def test_the_feather_is_mirrored_at_the_edge() -> None:
    mask_HW = np.ones((3, 20), np.bool_)
    np.testing.assert_allclose(blurred(mask_HW, 5), 1)
    half_W = np.arange(20) < 10
    expected_W = np.convolve(np.pad(half_W, 5, "reflect"), kernel(), "valid")
    assert blurred(np.tile(half_W, (9, 1)), 5)[4] == pytest.approx(expected_W)


def kernel() -> np.ndarray:
    weights = np.exp(-(np.arange(-5, 6) ** 2) / 200)
    return weights / weights.sum()


def test_a_paste_changes_nothing_outside_the_feather_and_everything_inside() -> None:
    image_HWC, mask_HW = picture(), box_mask((60, 40, 100, 80), 160, 120, 10)
    crop = Crop(left=40, top=20, right=120, bottom=100, drawn_width=160, drawn_height=160)
    before_HWC = image_HWC.copy()
    pasted_HWC = paste(image_HWC, np.full((160, 160, 3), WHITE, np.uint8), mask_HW, crop, feather=5)
    assert np.array_equal(image_HWC, before_HWC)

    grown_HW, shrunk_HW = (np.zeros_like(mask_HW) for _ in range(2))
    grown_HW[36 - 5 : 85 + 5 + 1, 56 - 5 : 105 + 5 + 1] = True
    shrunk_HW[36 + 5 : 85 - 5 + 1, 56 + 5 : 105 - 5 + 1] = True
    assert np.array_equal(pasted_HWC[~grown_HW], image_HWC[~grown_HW])
    assert (pasted_HWC[shrunk_HW] == WHITE).all()
    edge_HW = grown_HW & ~shrunk_HW
    assert (pasted_HWC[edge_HW] >= image_HWC[edge_HW]).all()
    assert (pasted_HWC[edge_HW] < WHITE).any()


# ---- the whole picture


@pytest.mark.parametrize("boxes", [[], [(5, 5, 12, 12)], [(-50, 0, -10, 40)]])
def test_a_picture_without_a_large_enough_face_is_the_very_same_picture(boxes: list[tuple[float, ...]]) -> None:
    image_HWC, painter = picture(), Painter()
    assert detail(image_HWC, boxes, painter, seed=1, settings=SMALL) is image_HWC
    assert painter.asked == []


def test_faces_are_drawn_in_their_order_each_with_its_own_seed() -> None:
    image_HWC, painter = picture(), Painter()
    boxes = [(100, 60, 130, 100), (0, 0, 8, 8), (20, 20, 50, 60)]
    detailed_HWC = detail(image_HWC, boxes, painter, seed=40, settings=SMALL)
    assert [seed for *_, seed in painter.asked] == [40, 41]
    assert detailed_HWC.shape == image_HWC.shape
    assert detailed_HWC.dtype == np.uint8
    assert all((detailed_HWC[y, x] == WHITE).all() for x, y in ((115, 80), (35, 40)))
    assert np.array_equal(detailed_HWC[:10, 130:], image_HWC[:10, 130:])


def test_what_is_drawn_is_the_enlarged_crop_and_its_mask() -> None:
    painter = Painter()
    flat_HWC = np.full((120, 160, 3), 77, np.uint8)
    detail(flat_HWC, [np.array([60, 40, 80, 60], np.float32)], painter, seed=0, settings=SMALL)
    ((crop_HWC, mask_HW, _),) = painter.asked
    assert crop_HWC.shape == (64, 64, 3)
    assert (crop_HWC == 77).all()
    # the box is the middle 20 of 40 px; its mask takes 4 px before and 6 behind, the pixel at its end included
    ys, xs = np.nonzero(mask_HW)
    assert mask_HW.shape == (64, 64)
    for ends in ((xs.min(), xs.max() + 1), (ys.min(), ys.max() + 1)):
        np.testing.assert_allclose(ends, (6 * 1.6, 36 * 1.6), atol=1)


def test_a_later_face_sees_the_earlier_ones_redrawn() -> None:
    painter = Painter()
    boxes = [(40, 40, 70, 80), (75, 40, 105, 80)]
    detail(picture(), boxes, painter, seed=0, settings=SMALL)
    assert (painter.asked[1][0] == WHITE).any()


# ---- steps


@given(st.integers(1, 60), st.floats(0.05, 1))
def test_diffusers_takes_exactly_the_wanted_number_of_steps(steps: int, denoise: float) -> None:
    num_levels, strength = steps_and_strength(FaceDetailerConfig(steps=steps, denoise=denoise))
    assert min(int(num_levels * strength), num_levels) == steps  # diffusers 0.42, get_timesteps of the inpainting pipeline
    assert num_levels == int(steps / denoise)
    assert strength <= 1


def test_half_the_noise_is_half_of_twenty_levels() -> None:
    assert steps_and_strength(SETTINGS)[0] == 20


# ---- with SDXL

PROMPT, NEGATIVE = "a young woman on the beach, close-up", "blurry, dark"


@pytest.fixture(scope="module")
def pipeline(toy_weights: Path) -> StableDiffusionXLPipeline:
    from diffusers import StableDiffusionXLPipeline

    loaded = StableDiffusionXLPipeline.from_pretrained(toy_weights / "RealVisXL_V4.0", add_watermarker=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def inpainter(pipeline: StableDiffusionXLPipeline) -> Callable[..., Any]:
    return load_inpainter(pipeline, SMALL)


@pytest.fixture(scope="module")
def inpaint(pipeline: StableDiffusionXLPipeline, inpainter: Callable[..., Any]) -> Callable[..., ImageHWC]:
    from ipt2v.models.sdxl_text import embed_prompt

    return inpainter(embed_prompt(pipeline, PROMPT, NEGATIVE))


@pytest.fixture
def unet_calls(pipeline: StableDiffusionXLPipeline) -> Any:
    calls: list[tuple[int, dict[str, Any]]] = []
    hook = pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((int(args[1]), {"batch": len(args[0]), **kwargs})), with_kwargs=True
    )
    yield calls
    hook.remove()


def mask(height: int, width: int) -> MaskHW:
    return box_mask((width // 4, height // 4, width * 3 // 4, height * 3 // 4), width, height, 0)


@pytest.mark.slow
def test_a_face_takes_ten_steps_from_the_middle_of_twenty(inpaint, unet_calls: list[Any]) -> None:
    inpaint(picture(48, 64), mask(48, 64), 3)
    assert [timestep for timestep, _ in unet_calls] == [380, 285, 197, 123, 69, 35, 15, 6, 2, 0]
    assert {kwargs["batch"] for _, kwargs in unet_calls} == {2}  # with and without the prompt


@pytest.mark.slow
def test_the_noise_levels_are_the_later_half_of_karras(inpainter) -> None:
    scheduler = inspect.getclosurevars(inpainter).nonlocals["inpainting"].scheduler
    assert (scheduler.config.algorithm_type, scheduler.config.solver_order) == ("dpmsolver++", 2)
    scheduler.set_timesteps(20)
    # equation 5 of arXiv 2206.00364 with rho 7, over the noise levels that SDXL was trained with (scaled linear beta)
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    low, high = (((1 - alpha_bar[index]) / alpha_bar[index]) ** 0.5 for index in (0, -1))
    sigmas = (high ** (1 / 7) + np.linspace(0, 1, 20) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [*sigmas, 0], rtol=2e-5)
    assert sigmas[10] == pytest.approx(1.0908, abs=1e-4)


@pytest.mark.slow
def test_the_size_that_sdxl_is_told_is_that_of_the_enlarged_crop(inpaint, unet_calls: list[Any]) -> None:
    inpaint(picture(48, 64), mask(48, 64), 3)
    time_ids = unet_calls[0][1]["added_cond_kwargs"]["time_ids"]
    assert time_ids.tolist() == [[48, 64, 0, 0, 48, 64]] * 2


@pytest.mark.slow
def test_the_drawing_depends_on_crop_mask_seed_and_prompts_and_on_nothing_else(pipeline, inpainter, inpaint) -> None:
    import torch

    from ipt2v.models.sdxl_text import embed_prompt

    crop_HWC, mask_HW = picture(48, 64), mask(48, 64)
    drawn_HWC = inpaint(crop_HWC, mask_HW, 3)
    assert drawn_HWC.shape == crop_HWC.shape
    assert drawn_HWC.dtype == np.uint8
    others = [
        inpaint(crop_HWC[::-1].copy(), mask_HW, 3),
        inpaint(crop_HWC, np.ones_like(mask_HW), 3),
        inpaint(crop_HWC, mask_HW, 4),
        inpainter(embed_prompt(pipeline, "an old man", NEGATIVE))(crop_HWC, mask_HW, 3),
        inpainter(embed_prompt(pipeline, PROMPT, "red"))(crop_HWC, mask_HW, 3),
    ]
    assert not any(np.array_equal(other_HWC, drawn_HWC) for other_HWC in others)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        assert np.array_equal(inpaint(crop_HWC, mask_HW, 3), drawn_HWC)


@pytest.mark.slow
def test_redrawing_shares_the_weights_and_leaves_the_painter_as_it_was(pipeline, inpainter, inpaint) -> None:
    before, scheduler = {name: part.dtype for name, part in parts(pipeline)}, pipeline.scheduler
    inpaint(picture(48, 64), mask(48, 64), 2**63 - 1)
    inpainting = inspect.getclosurevars(inpainter).nonlocals["inpainting"]
    assert {name: part.dtype for name, part in parts(pipeline)} == before
    assert pipeline.scheduler is scheduler is not inpainting.scheduler
    assert all(getattr(inpainting, name) is part for name, part in parts(pipeline))


def parts(pipeline: StableDiffusionXLPipeline) -> list[tuple[str, Any]]:
    return [(name, getattr(pipeline, name)) for name in ("vae", "unet", "text_encoder", "text_encoder_2")]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(64, 64), (8, 16), (72, 40)])
def test_any_multiple_of_eight_can_be_drawn(inpaint, width: int, height: int) -> None:
    assert inpaint(picture(height, width), np.ones((height, width), np.bool_), 0).shape == (height, width, 3)


@pytest.mark.slow
def test_the_latents_outside_of_the_mask_are_those_of_the_crop(pipeline, inpaint) -> None:
    decoded: list[Any] = []
    hook = pipeline.vae.post_quant_conv.register_forward_pre_hook(lambda _, args: decoded.append(args[0]))
    crop_HWC, mask_HW = picture(48, 64), np.zeros((48, 64), np.bool_)
    mask_HW[16:32, 24:40] = True
    for one_HW in (mask_HW, np.zeros_like(mask_HW)):
        inpaint(crop_HWC, one_HW, 3)
    hook.remove()
    changed_HW = (decoded[0] != decoded[1]).any(dim=1)[0].numpy()
    assert np.array_equal(changed_HW, mask_HW[::8, ::8])


@pytest.mark.slow
def test_a_face_in_a_picture_is_redrawn_by_sdxl(inpaint, unet_calls: list[Any]) -> None:
    image_HWC = picture()
    settings = SMALL.model_copy(update={"feather": 3})
    detailed_HWC = detail(image_HWC, [(60, 40, 100, 80)], inpaint, seed=7, settings=settings)
    assert not np.array_equal(detailed_HWC[40:80, 60:100], image_HWC[40:80, 60:100])
    assert np.array_equal(detailed_HWC[:30], image_HWC[:30])
    assert len(unet_calls) == 10
