"""Scores of faces: by a recogniser that a package ships (dlib's, CC0) on free photographs, and the steps of ConsisID's.

dlib's embeddings lie in a cone: two people have a cosine of 0.8 to 0.91, two pictures of one person 0.96 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from ipt2v.metrics.delivered import Delivered
from ipt2v.metrics.face_measures import FaceMeasures, bordered
from ipt2v.metrics.undefined import Undefined
from ipt2v.models.faces import Detection, Recogniser

pytestmark = pytest.mark.slow
SIDE = 256


def packaged(module: str, name: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = find_spec(module)
    assert spec is not None and spec.submodule_search_locations, module
    return Path(spec.submodule_search_locations[0]) / name


@pytest.fixture(scope="module")
def recogniser() -> Recogniser:
    """dlib's detector, its five landmarks and its ResNet behind the interface of insightface's pack."""
    import dlib

    detector = dlib.get_frontal_face_detector()
    models = "face_recognition_models"
    landmarks = dlib.shape_predictor(str(packaged(models, "models/shape_predictor_5_face_landmarks.dat")))
    network = dlib.face_recognition_model_v1(str(packaged(models, "models/dlib_face_recognition_resnet_model_v1.dat")))

    def detect(image_HWC: NDArray[np.uint8], side: int) -> tuple[Detection, ...]:
        boxes = [np.array([box.left(), box.top(), box.right(), box.bottom()], np.float32) for box in detector(image_HWC, 1)]
        return tuple(Detection(box_xyxy=box, score=1.0, points=np.zeros(5, complex)) for box in boxes)

    def embed(image_HWC: NDArray[np.uint8], found: Detection) -> NDArray[np.float32]:
        shape = landmarks(image_HWC, dlib.rectangle(*map(int, found.box_xyxy)))
        return np.array(network.compute_face_descriptor(image_HWC, shape), np.float32)

    return Recogniser(detect=detect, embed=embed)


def portrait(module: str, name: str, box: tuple[int, int, int, int]) -> Image.Image:
    return Image.open(packaged(module, name)).convert("RGB").crop(box).resize((SIDE, SIDE))


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    """Eileen Collins, by NASA; public domain."""
    return portrait("skimage", "data/astronaut.png", (120, 0, 320, 200))


@pytest.fixture(scope="module")
def admiral() -> Image.Image:
    """Grace Hopper, by the US Navy; public domain."""
    return portrait("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", (110, 20, 410, 320))


def video_of(person: Image.Image, reference: Image.Image) -> Delivered:
    """Four frames of a person: as photographed, mirrored, darker, turned a little."""
    frames = (person, ImageOps.mirror(person), ImageEnhance.Brightness(person).enhance(0.7), person.rotate(8))
    return delivered([np.array(frame) for frame in frames], np.array(reference))


def delivered(frames: list[NDArray[np.uint8]], reference_HWC: NDArray[np.uint8]) -> Delivered:
    frames_THWC = torch.from_numpy(np.stack(frames))
    return Delivered(frames_THWC=frames_THWC, fps=16, prompt="", reference_HWC=reference_HWC, first_frame_HWC=frames[0])


def only(recogniser: Recogniser, **networks: Callable[[torch.Tensor], torch.Tensor]) -> FaceMeasures:
    return FaceMeasures(recogniser=recogniser, **({"curricular": None, "inception": None} | networks))  # type: ignore[arg-type]


def test_two_people_are_less_alike_than_one_person(
    recogniser: Recogniser, astronaut: Image.Image, admiral: Image.Image
) -> None:
    measure = only(recogniser)
    for reference, other in ((astronaut, admiral), (admiral, astronaut)):
        same = measure(video_of(reference, reference), ["arc_sim", "face_rate", "face_arc"])
        different = measure(video_of(other, reference), ["arc_sim", "face_rate", "face_arc"])
        assert same["face_rate"] == different["face_rate"] == 1.0
        for metric in ("arc_sim", "face_arc"):
            assert same[metric] > 0.96
            assert 0.5 < different[metric] < 0.92


def test_a_video_without_a_face_has_no_likeness_rather_than_none_at_all(recogniser: Recogniser, astronaut: Image.Image) -> None:
    grey = np.full((SIDE, SIDE, 3), 90, np.uint8)
    values = only(recogniser)(delivered([grey] * 3, np.array(astronaut)), ["arc_sim", "face_rate", "drift", "face_arc"])
    assert isinstance(values["arc_sim"], Undefined) and isinstance(values["drift"], Undefined)
    assert (values["face_rate"], values["face_arc"]) == (0.0, 0.0)  # ConsisID's own form counts it as 0


def test_a_person_who_is_replaced_on_the_way_has_drifted(
    recogniser: Recogniser, astronaut: Image.Image, admiral: Image.Image
) -> None:
    frames = [np.array(astronaut)] * 2 + [np.array(admiral)] * 2
    values = only(recogniser)(delivered(frames, np.array(astronaut)), ["drift", "first_frame_arc_sim"])
    assert values["drift"] < -0.05
    assert values["first_frame_arc_sim"] == pytest.approx(1.0)


# --- ConsisID's steps ---------------------------------------------------------------------------------------------------


class Seen:
    """A recogniser that finds one face where the picture is brighter than grey, and remembers what it was asked."""

    def __init__(self, *, needs_border: bool = False) -> None:
        self.sides: list[int] = []
        self.needs_border = needs_border

    def detect(self, image_HWC: NDArray[np.uint8], side: int) -> tuple[Detection, ...]:
        self.sides.append(side)
        if self.needs_border and not (image_HWC[0] == 128).all():
            return ()
        # eyes, nose, mouth of the 112 px template, drawn twice as large at the corner of the picture
        points = np.array([38.2946 + 51.6963j, 73.5318 + 51.5014j, 56.0252 + 71.7366j, 41.5493 + 92.3655j, 70.7299 + 92.2041j])
        return (Detection(box_xyxy=np.array([0, 0, 9, 9], np.float32), score=1.0, points=2 * points),)

    def recogniser(self) -> Recogniser:
        return Recogniser(detect=self.detect, embed=lambda image_HWC, found: np.ones(3, np.float32))


def test_a_face_that_fills_the_picture_is_searched_for_again_inside_a_grey_border() -> None:
    seen, white = Seen(needs_border=True), np.full((80, 40, 3), 255, np.uint8)
    assert only(seen.recogniser())(delivered([white], white), ["face_arc"])["face_arc"] == pytest.approx(1.0)
    assert seen.sides == [320, 320] * 2  # the photo and the one frame, each without and with a border
    assert bordered(white).shape == (80 + 2 * 20, 40 + 2 * 10, 3)
    assert (bordered(white)[:20] == 128).all() and (bordered(white)[20:-20, 10:-10] == 255).all()


def test_the_networks_see_the_aligned_face() -> None:
    """CurricularFace half as large, each pixel the mean of four; Inception the whole crop."""
    picture = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    crops: dict[str, NDArray[np.uint8]] = {}

    def network(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def look(faces_BHWC: torch.Tensor) -> torch.Tensor:
            crops[name] = faces_BHWC[0].numpy()
            return torch.ones(1, 4)

        return look

    measure = only(Seen().recogniser(), curricular=network("curricular"), inception=network("inception"))
    values = measure(delivered([picture], picture), ["face_cur", "face_distance"])
    assert values == {"face_cur": pytest.approx(1.0), "face_distance": 0.0}
    assert np.array_equal(crops["inception"], picture)
    halves = picture.reshape(112, 2, 112, 2, 3).astype(float).mean((1, 3))
    assert np.array_equal(crops["curricular"], np.floor(halves + 0.5))
