"""Who is in the photos, with eyes and scissors of a few lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from ipt2v.config import HyperLoRAConfig
from ipt2v.models.face_conditioning import arcface_crop, clip_crop
from ipt2v.models.faces import Face
from ipt2v.models.hrnet.cutout import CutOut
from ipt2v.models.hyperlora.load import HyperLoRA
from ipt2v.stages.portraits import NO_FACE, NO_FACE_IN_CUTOUT, NO_LOOK, NO_PERSON, Portrait, coefficients_of, portray

pytestmark = pytest.mark.slow

SETTINGS = HyperLoRAConfig()


def face(image_HWC: np.ndarray, *, side: float = 20, score: float = 0.9, place: int = 0) -> Face:
    """A face whose embedding tells the size of the picture that it was seen in."""
    embedding = np.zeros(512, np.float32)
    embedding[image_HWC.shape[0] % 512] = 1
    grid = np.stack(np.meshgrid(np.linspace(0, side, 11), np.linspace(0, side, 10)), axis=-1).reshape(-1, 2)[:106]
    landmarks_106 = (grid + place).astype(np.float32)
    box_xyxy = np.array([place, place, place + side, place + side], np.float32)
    return Face(box_xyxy=box_xyxy, score=score, landmarks_106=landmarks_106, is_male=True, embedding=embedding)


def photo(shade: int, size: int = 64) -> np.ndarray:
    return np.full((size, size, 3), shade, np.uint8)


def see_one(image_HWC: np.ndarray) -> tuple[Face, ...]:
    return (face(image_HWC, place=20),)


def see_none(image_HWC: np.ndarray) -> tuple[Face, ...]:
    return ()


def see_dark(image_HWC: np.ndarray) -> tuple[Face, ...]:
    """Faces in dark pictures only."""
    return see_one(image_HWC) if image_HWC.mean() < 100 else ()


def cut_to(shade: int, *, found: bool = True) -> Callable[[np.ndarray], CutOut]:
    def cut(image_HWC: np.ndarray) -> CutOut:
        cut_HWC = np.full_like(image_HWC, shade)
        return CutOut(image_HWC=cut_HWC, alpha_HW=np.ones(image_HWC.shape[:2], np.float32), found=found)

    return cut


def test_hyperlora_looks_at_the_cut_out_once_for_each_photo_and_the_record_gets_the_first() -> None:
    portrait = portray([photo(10), photo(20, 80)], see_one, cut_to(200), SETTINGS)
    assert portrait.notes == ()
    assert np.array_equal(portrait.cutout_HWC, photo(200))
    assert len(portrait.faces) == 1
    for look, size in zip(portrait.looks, (64, 80), strict=True):
        cut_HWC = photo(200, size)
        landmarks = see_one(cut_HWC)[0].landmarks_106
        assert np.array_equal(look.crop_HWC, clip_crop(cut_HWC, landmarks, remove_background=True))
        # the embedding is that of the face found anew in the wider crop
        assert look.embedding[arcface_crop(cut_HWC, landmarks).shape[0]] == 1


def test_with_the_background_kept_clip_sees_it() -> None:
    settings = HyperLoRAConfig(remove_background=False)
    (look,) = portray([photo(10)], see_one, cut_to(200), settings).looks
    assert (look.crop_HWC == 200).mean() > 0.5
    (look,) = portray([photo(10)], see_one, cut_to(200), SETTINGS).looks
    assert (look.crop_HWC == 127).mean() > 0.2


def test_a_face_that_the_wider_crop_hides_keeps_its_first_embedding() -> None:
    def see_whole_photos(image_HWC: np.ndarray) -> tuple[Face, ...]:
        return see_one(image_HWC) if image_HWC.shape[0] == 64 else ()

    (look,) = portray([photo(10)], see_whole_photos, cut_to(200), SETTINGS).looks
    assert look.embedding[64] == 1


def test_of_several_faces_the_largest_is_looked_at_not_the_surest() -> None:
    def see_two(image_HWC: np.ndarray) -> tuple[Face, ...]:
        return face(image_HWC, side=10, score=0.99), face(image_HWC, side=30, score=0.6, place=25)

    (look,) = portray([photo(10)], see_two, cut_to(200), SETTINGS).looks
    landmarks = see_two(photo(10))[1].landmarks_106
    assert np.array_equal(look.crop_HWC, clip_crop(photo(200), landmarks, remove_background=True))


@pytest.mark.parametrize(
    ("portrait", "num_looks", "notes"),
    [
        (lambda: portray([photo(10)], see_none, cut_to(200), SETTINGS), 0, (NO_FACE, NO_LOOK)),
        (lambda: portray([photo(10)], see_none, cut_to(200), HyperLoRAConfig(enabled=False)), 0, (NO_FACE,)),
        (lambda: portray([photo(10)], see_one, cut_to(200), HyperLoRAConfig(enabled=False)), 0, ()),
        (lambda: portray([photo(10)], see_dark, cut_to(200), SETTINGS), 1, (NO_FACE_IN_CUTOUT,)),
        (lambda: portray([photo(10)] * 2, see_dark, cut_to(200), SETTINGS), 2, (NO_FACE_IN_CUTOUT,)),
        (lambda: portray([photo(200), photo(10)], see_dark, cut_to(200), SETTINGS), 1, (NO_FACE, NO_FACE_IN_CUTOUT)),
        (lambda: portray([photo(200), photo(10)], see_dark, cut_to(50), SETTINGS), 2, (NO_FACE,)),
        (lambda: portray([photo(10)], see_one, cut_to(10, found=False), SETTINGS), 1, (NO_PERSON,)),
    ],
)
def test_what_is_not_found_is_noted_and_replaced(
    portrait: Callable[[], Portrait], num_looks: int, notes: Sequence[str]
) -> None:
    made = portrait()
    assert (len(made.looks), made.notes) == (num_looks, notes)


def test_the_coefficients_are_of_all_looks_together() -> None:
    portrait = portray([photo(10), photo(20, 80)], see_one, cut_to(200), SETTINGS)
    seen: list[torch.Tensor] = []

    def look(pixels_NCHW: torch.Tensor, embeddings_NE: torch.Tensor) -> torch.Tensor:
        seen.extend((pixels_NCHW, embeddings_NE))
        return torch.ones(8, 4)

    hyperlora = HyperLoRA(preprocess=lambda crops: torch.zeros(len(crops), 3, 224, 224), look=look, mix=pytest.fail)
    assert coefficients_of(portrait.looks, hyperlora).shape == (8, 4)
    assert seen[0].shape == (2, 3, 224, 224)
    assert np.array_equal(seen[1].numpy(), np.stack([one.embedding for one in portrait.looks]))
