"""Cuts the person out of a photo and puts it on white.

Knows no checkpoints' layout. Legend: H W pixels of the photo, h w cells of the network's output (4 pixels of its input each),
C=3 RGB, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from ipt2v.models.hrnet.checkpoint import load_network
from ipt2v.models.hrnet.network import HRNet

# number of classes -> those of a person. Order of the classes: lib/datasets of HRNet-Semantic-Segmentation, and mmseg
_PERSON_CLASSES = {
    19: (11, 12),  # Cityscapes: person, rider
    20: tuple(range(1, 20)),  # LIP: hair, face, arms, clothes, ...; all but the background
    21: (15,),  # PASCAL VOC
    59: (36,),  # PASCAL-Context
    60: (37,),  # PASCAL-Context with background
    150: (12,),  # ADE20K
    171: (0,),  # COCO-Stuff
}
# of RGB 0..1 over ImageNet: mean and std in lib/datasets/lip.py; mmseg's are the same times 255
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MIN_PERSON = 0.01  # of the picture; less is a false alarm rather than the subject of a photo
_FRINGE_CELLS = 2  # how far the soft border of a component reaches in the network's output
_SURELY_NOT = -20.0  # log-odds; e^-20 of 255 rounds to nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOut:
    """A person on white, or the photo as it was if nobody is in it."""

    image_HWC: NDArray[np.uint8]  # RGB
    alpha_HW: NDArray[np.float32]  # 0 is background, 1 is person; all 1 if nobody was found
    found: bool


Cut = Callable[[NDArray[np.uint8]], CutOut]


def keep_whole(image_HWC: NDArray[np.uint8]) -> CutOut:
    """The photo as it is, for runs without cut-outs."""
    return CutOut(image_HWC=image_HWC, alpha_HW=np.ones(image_HWC.shape[:2], np.float32), found=True)


def load_cutter(
    path: Path,
    *,
    device: torch.device,
    align_corners: bool = False,
    feather_pixels: float = 0.0,
    largest_component: bool = False,
    input_size: int = 473,
) -> Cut:
    """cut(image_HWC uint8 RGB) -> CutOut by the checkpoint at `path`, with a soft mask; see load_network and make_cutter."""
    network = load_network(path, align_corners=align_corners)
    return make_cutter(
        network, device=device, feather_pixels=feather_pixels, largest_component=largest_component, input_size=input_size
    )


def make_cutter(
    network: HRNet,
    *,
    device: torch.device,
    soft: bool = True,
    feather_pixels: float = 0.0,
    largest_component: bool = False,
    input_size: int = 473,
) -> Cut:
    """cut(image_HWC uint8 RGB) -> CutOut.

    soft: the mask is the probability, not the decision: hair and border pixels are mixtures, and a hard mask gives them a
    jagged rim that whatever paints from the cut-out may take for a part of the person.
    feather_pixels: standard deviation of the Gaussian that blurs the mask. largest_component: drops all other parts.
    input_size: the photo is squashed to this square, 473 for LIP, about 512 for others.
    Raises ValueError if it is not known which of the network's classes are a person.
    """
    person = _person_classes(network.num_classes)
    if feather_pixels < 0 or input_size < 32:
        found = f"feather_pixels {feather_pixels}, input_size {input_size}"
        raise ValueError(f"{found}: expected 0 or more and 32 or more (one cell of the coarsest branch); correct them")
    network = network.eval().to(device)

    @torch.inference_mode()
    def cut(image_HWC: NDArray[np.uint8]) -> CutOut:
        logits_Khw = network(_network_input(image_HWC, input_size).to(device))[0]
        score_hw = person_score(logits_Khw, person, soft=soft)
        if largest_component:
            score_hw = _without_bystanders(score_hw)
        alpha_HW = _alpha(score_hw, image_HWC.shape[:2], soft=soft, align_corners=network.align_corners)
        return on_white(image_HWC, feathered(alpha_HW, feather_pixels).cpu().numpy())

    return cut


def person_score(logits_Khw: torch.Tensor, person: Sequence[int], *, soft: bool) -> torch.Tensor:
    """Above 0 where a person is likelier than not.

    Soft: the log-odds of all person classes together, so its sigmoid is their softmax probability. Hard: what the best person
    class is ahead of the best other, so that above 0 the argmax is a person.
    """
    others = [index for index in range(len(logits_Khw)) if index not in person]
    if soft:
        return logits_Khw[list(person)].logsumexp(0) - logits_Khw[others].logsumexp(0)
    return logits_Khw[list(person)].amax(0) - logits_Khw[others].amax(0)


def _alpha(score_hw: torch.Tensor, size: tuple[int, ...], *, soft: bool, align_corners: bool) -> torch.Tensor:
    """The mask at the photo's size, 0..1 float32."""
    # the log-odds are interpolated, not the probability: where a cell is 17 pixels of the photo, a border that takes the
    # whole cell to fade would carry a halo of background
    score_HW = F.interpolate(score_hw[None, None], size=size, mode="bilinear", align_corners=align_corners)[0, 0]
    return score_HW.sigmoid() if soft else (score_HW > 0).float()


def feathered(alpha_HW: torch.Tensor, feather_pixels: float) -> torch.Tensor:
    """The mask blurred by a Gaussian of this standard deviation; outside the picture it goes on as at its border."""
    if feather_pixels == 0:
        return alpha_HW
    radius = math.ceil(3 * feather_pixels)  # 99.7 % of a Gaussian
    offsets = torch.arange(-radius, radius + 1, device=alpha_HW.device)
    kernel = torch.exp(-0.5 * (offsets / feather_pixels) ** 2)
    kernel = kernel / kernel.sum()
    blurred = F.pad(alpha_HW[None, None], (radius, radius, radius, radius), mode="replicate")
    blurred = F.conv2d(F.conv2d(blurred, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return blurred[0, 0].clamp(0, 1)


def on_white(image_HWC: NDArray[np.uint8], alpha_HW: NDArray[np.float32]) -> CutOut:
    """The photo on white; unchanged if less than 1 % of it is likelier a person than not: nothing would be left of it."""
    if (alpha_HW > 0.5).mean() < _MIN_PERSON:  # not the sum, which a faint doubt everywhere adds up to as well
        return CutOut(image_HWC=image_HWC, alpha_HW=np.ones_like(alpha_HW), found=False)
    # written so that alpha 1 gives the photo exactly, and alpha 0 white
    composite_HWC = 255 - alpha_HW[..., None] * (255 - image_HWC).astype(np.float32)
    return CutOut(image_HWC=np.rint(composite_HWC).astype(np.uint8), alpha_HW=alpha_HW, found=True)


def largest_part(mask_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest 8-connected part of the mask, of equal ones the topmost; nothing if the mask is empty."""
    stride = mask_HW.shape[1] + 1  # a column of background ends every row, so no run of pixels goes on in the next
    flat = np.pad(mask_HW, ((0, 0), (0, 1))).ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return np.zeros_like(mask_HW)
    # each run touches, by side or corner, a range of the runs in the row below
    first = np.searchsorted(ends, starts + stride, side="left")
    counts = np.searchsorted(starts, ends + stride, side="right") - first
    upper = np.repeat(np.arange(len(starts)), counts)
    lower = np.arange(counts.sum()) + np.repeat(first - (counts.cumsum() - counts), counts)
    labels = _joined(upper, lower, num_runs=len(starts))
    kept = labels == np.bincount(labels, weights=ends - starts).argmax()
    steps = np.zeros(len(flat), np.int8)
    steps[starts[kept]], steps[ends[kept]] = 1, -1
    return steps.cumsum(dtype=np.int8).astype(bool).reshape(-1, stride)[:, :-1]


def _joined(a: NDArray[np.int64], b: NDArray[np.int64], *, num_runs: int) -> NDArray[np.int64]:
    """Label of every run: the smallest index in its part. Union-find in whole arrays (Shiloach and Vishkin 1982)."""
    labels = np.arange(num_runs)
    while (labels[a] != labels[b]).any():
        np.minimum.at(labels, np.maximum(labels[a], labels[b]), np.minimum(labels[a], labels[b]))
        while (labels != labels[labels]).any():
            labels = labels[labels]
    return labels


def _without_bystanders(score_hw: torch.Tensor) -> torch.Tensor:
    """The score of the largest component and its fringe; surely no person everywhere else."""
    person_hw = score_hw > 0
    main_hw = torch.from_numpy(largest_part(person_hw.cpu().numpy())).to(score_hw.device)
    size = 2 * _FRINGE_CELLS + 1
    near_hw = F.max_pool2d(main_hw[None, None].float(), size, stride=1, padding=_FRINGE_CELLS)[0, 0] > 0
    return torch.where(near_hw & (main_hw | ~person_hw), score_hw, score_hw.clamp(max=_SURELY_NOT))


def _network_input(image_HWC: NDArray[np.uint8], input_size: int) -> torch.Tensor:
    """[1,3,input_size,input_size] float32, squashed and normalised as in training."""
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise ValueError(f"image: {image_HWC.dtype} {image_HWC.shape}, expected uint8 [H,W,3]; convert it to RGB")
    # Pillow's bilinear is OpenCV's, with which LIP was prepared, but for photos that shrink: those it also smooths
    square = Image.fromarray(image_HWC).resize((input_size, input_size), Image.Resampling.BILINEAR)
    pixels_CHW = torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1)
    return ((pixels_CHW - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1))[None]


def _person_classes(num_classes: int) -> tuple[int, ...]:
    if num_classes not in _PERSON_CLASSES:
        known = ", ".join(map(str, _PERSON_CLASSES))
        raise ValueError(f"HRNet of {num_classes} classes: unknown which are a person; known: {known}; name another checkpoint")
    return _PERSON_CLASSES[num_classes]
