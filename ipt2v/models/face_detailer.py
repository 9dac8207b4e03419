"""FaceDetailer: redraws each face of a picture, enlarged to the size that SDXL was trained at, and pastes it back.

The node of ComfyUI's Impact-Pack, written anew from its behaviour. Knows nothing of how faces are found; torch is imported only
by what runs SDXL. Legend: H height, W width, C=3 RGB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ipt2v.config import FaceDetailerConfig

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline

    from ipt2v.models.faces import Face
    from ipt2v.models.sdxl_text import PromptEmbeds

ImageHWC = NDArray[np.uint8]  # 0..255 RGB
MaskHW = NDArray[np.bool_]
Box = Sequence[float] | NDArray[np.float32]  # left, top, right, bottom in pixels
Inpaint = Callable[[ImageHWC, MaskHW, int], ImageHWC]  # (crop, where to draw, seed) -> crop of the same size
VAE_FACTOR = 8  # pixels of a side per latent: SDXL's VAE halves three times
FEATHER_SIGMA_PIXELS = 10.0  # whatever the kernel's size


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """A part of a picture, and the size that it is enlarged to for drawing."""

    left: int
    top: int
    right: int
    bottom: int
    drawn_width: int  # multiples of VAE_FACTOR
    drawn_height: int


def boxes_of(faces: Sequence[Face], settings: FaceDetailerConfig) -> list[NDArray[np.float32]]:
    """The boxes of the faces whose score is high enough, in the same order."""
    return [face.box_xyxy for face in faces if face.score >= settings.threshold]


def detail(
    image_HWC: ImageHWC,
    boxes: Sequence[Box],
    inpaint: Inpaint,
    *,
    seed: int,
    settings: FaceDetailerConfig,
) -> ImageHWC:
    """The picture with each box redrawn, in the order of the boxes; the same object if no box is large enough.

    The face number i, counted from 0 over the redrawn ones, is drawn with seed + i.
    """
    height, width = image_HWC.shape[:2]
    for index, box in enumerate(large_enough(boxes, width, height, settings.drop_size)):
        mask_HW = box_mask(box, width, height, settings.dilation)
        crop = crop_around(box, width, height, settings)
        new_HWC = inpaint(*_enlarged(image_HWC, mask_HW, crop), seed + index)
        image_HWC = paste(image_HWC, new_HWC, mask_HW, crop, feather=settings.feather)
    return image_HWC


def large_enough(boxes: Sequence[Box], width: int, height: int, drop_size: int) -> list[tuple[float, float, float, float]]:
    """The boxes, cut to the picture, whose sides are both larger than `drop_size`; in the same order."""
    kept = []
    for box in boxes:
        # the node's own detector gives boxes inside of the picture, SCRFD does not
        left, right = (min(max(float(x), 0.0), width) for x in (box[0], box[2]))
        top, bottom = (min(max(float(y), 0.0), height) for y in (box[1], box[3]))
        if right - left > drop_size and bottom - top > drop_size:
            kept.append((left, top, right, bottom))
    return kept


def box_mask(box: Box, width: int, height: int, dilation: int) -> MaskHW:
    """[H,W]: the pixels of the box and those that a square of `dilation` pixels reaches from there.

    With an even side the square has no middle pixel: OpenCV's dilate has its anchor at dilation // 2, so that the mask grows by
    dilation // 2 to the right and below, and by one less to the left and above.
    """
    after = dilation // 2
    before = max(dilation - 1 - after, 0)
    left, top, right, bottom = map(int, box)  # the pixels at both ends belong to the box
    mask_HW = np.zeros((height, width), np.bool_)
    mask_HW[max(top - before, 0) : bottom + after + 1, max(left - before, 0) : right + after + 1] = True
    return mask_HW


def crop_around(box: Box, width: int, height: int, settings: FaceDetailerConfig) -> Crop:
    """crop_factor times the box, moved into the picture and cut to it, and the size to draw it at."""
    box_left, box_top, box_right, box_bottom = map(float, box)
    left, right = _span(box_left, box_right, width, settings.crop_factor)
    top, bottom = _span(box_top, box_bottom, height, settings.crop_factor)
    shorter_side = min(box_right - box_left, box_bottom - box_top)
    drawn_width, drawn_height = enlarged_size(right - left, bottom - top, shorter_side, settings)
    return Crop(
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        drawn_width=_multiple_of_vae_factor(drawn_width),
        drawn_height=_multiple_of_vae_factor(drawn_height),
    )


def _span(start: float, end: float, limit: int, factor: float) -> tuple[int, int]:
    """Start and end of `factor` times start..end about its middle, moved into 0..limit, all of it if longer."""
    length = (end - start) * factor
    first = int((start + end) / 2 - length / 2)
    if length >= limit:
        return 0, limit
    if first + length > limit:
        return int(limit - length), limit
    first = max(first, 0)
    return first, int(first + length)


def enlarged_size(width: int, height: int, box_side: float, settings: FaceDetailerConfig) -> tuple[int, int]:
    """Width and height of a crop, enlarged so that the box's shorter side is guide_size, the crop at most max_size."""
    scale = settings.guide_size / box_side
    longer = max(int(width * scale), int(height * scale))
    if longer > settings.max_size:
        scale *= settings.max_size / longer
    if scale <= 1:  # never made smaller: a large face is drawn at its own size
        return width, height
    return int(width * scale), int(height * scale)


def _multiple_of_vae_factor(pixels: int) -> int:
    return max(pixels // VAE_FACTOR, 1) * VAE_FACTOR


def _enlarged(image_HWC: ImageHWC, mask_HW: MaskHW, crop: Crop) -> tuple[ImageHWC, MaskHW]:
    """Crop and mask at the drawn size. The node enlarges further and trims up to 7 px, which moves the face a little."""
    size = crop.drawn_width, crop.drawn_height
    part = np.s_[crop.top : crop.bottom, crop.left : crop.right]
    mask = Image.fromarray(mask_HW[part].astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return _resized(image_HWC[part], size), np.asarray(mask) >= 128


def paste(image_HWC: ImageHWC, new_HWC: ImageHWC, mask_HW: MaskHW, crop: Crop, *, feather: int) -> ImageHWC:
    """The picture with the redrawn crop in place of what is masked; the mask's edge is soft by `feather` pixels."""
    part = np.s_[crop.top : crop.bottom, crop.left : crop.right]
    new_HWC = _resized(new_HWC, (crop.right - crop.left, crop.bottom - crop.top))
    opacity_HW1 = blurred(mask_HW[part], feather)[..., None]
    pasted_HWC = image_HWC.copy()
    pasted_HWC[part] = np.rint((1 - opacity_HW1) * image_HWC[part] + opacity_HW1 * new_HWC)
    return pasted_HWC


def blurred(mask_HW: MaskHW, feather: int) -> NDArray[np.float64]:
    """[H,W], 0..1: the mask under a Gaussian of 2 * feather + 1 pixels, mirrored at the edges."""
    offsets = np.arange(-feather, feather + 1)
    kernel = np.exp(-(offsets**2) / (2 * FEATHER_SIGMA_PIXELS**2))
    kernel /= kernel.sum()
    blurred_HW = mask_HW.astype(np.float64)
    for axis in (0, 1):
        padding = [(feather, feather) if axis == other else (0, 0) for other in (0, 1)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(blurred_HW, padding, "reflect"), len(kernel), axis)
        blurred_HW = windows @ kernel
    return blurred_HW.clip(0, 1)  # the last bits of a sum may exceed 1


def _resized(image_HWC: ImageHWC, size: tuple[int, int]) -> ImageHWC:
    """`size` is (width, height)."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(image_HWC)).resize(size, Image.Resampling.LANCZOS))


# ---------------------------------------------------------------------------------------------------- SDXL


def load_inpainter(pipeline: StableDiffusionXLPipeline, settings: FaceDetailerConfig) -> Callable[[PromptEmbeds], Inpaint]:
    """inpainter(prompt_embeds) -> inpaint(crop, mask, seed), by the weights of a text-to-image pipeline, which it shares."""
    import torch
    from diffusers import StableDiffusionXLInpaintPipeline

    from ipt2v.models.sdxl_sampler import dpmpp_2m_karras

    # not from_pipe: it would cast the shared weights to float32 (diffusers 0.42)
    inpainting = StableDiffusionXLInpaintPipeline(
        **pipeline.components,
        force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt,
        add_watermarker=False,
    )
    inpainting.set_progress_bar_config(disable=True)
    inpainting.scheduler = dpmpp_2m_karras(pipeline)  # of its own: a scheduler counts the steps of one picture

    def inpainter(text: PromptEmbeds) -> Inpaint:
        @torch.inference_mode()
        def inpaint(crop_HWC: ImageHWC, mask_HW: MaskHW, seed: int) -> ImageHWC:
            return _inpaint(inpainting, text, crop_HWC, mask_HW, seed=seed, settings=settings)

        return inpaint

    return inpainter


def _inpaint(
    pipeline: StableDiffusionXLInpaintPipeline,
    text: PromptEmbeds,
    crop_HWC: ImageHWC,
    mask_HW: MaskHW,
    *,
    seed: int,
    settings: FaceDetailerConfig,
) -> ImageHWC:
    import torch

    height, width = mask_HW.shape
    num_inference_steps, strength = steps_and_strength(settings)
    images = pipeline(
        prompt_embeds=text.prompt_embeds,
        negative_prompt_embeds=text.negative_prompt_embeds,
        pooled_prompt_embeds=text.pooled_prompt_embeds,
        negative_pooled_prompt_embeds=text.negative_pooled_prompt_embeds,
        image=Image.fromarray(crop_HWC),
        mask_image=Image.fromarray(mask_HW.astype(np.uint8) * 255),
        width=width,
        height=height,
        num_inference_steps=num_inference_steps,
        strength=strength,
        guidance_scale=settings.cfg,
        generator=torch.Generator().manual_seed(seed),  # on the CPU, so that the device does not change the picture's noise
        output_type="np",
    ).images
    return (images[0] * 255).round().astype(np.uint8)


def steps_and_strength(settings: FaceDetailerConfig) -> tuple[int, float]:
    """Number of noise levels, and the part of them that makes diffusers go through exactly the last `steps` ones."""
    num_levels = math.floor(settings.steps / settings.denoise)
    # diffusers takes int(num_levels * strength) steps: half a step more keeps the last bits of the product from losing one
    return num_levels, min((settings.steps + 0.5) / num_levels, 1.0)
