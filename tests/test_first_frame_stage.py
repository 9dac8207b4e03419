"""Array 1 makes of each item one record or one failure; what it makes of an item depends on that item and the config alone."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipt2v.config import DecoupleConfig, FirstFrameConfig, RunConfig, VideoConfig
from ipt2v.models.catalogue import folders
from ipt2v.models.faces import Face, load_face_analysis
from ipt2v.models.hrnet.cutout import keep_whole, load_cutter
from ipt2v.models.hyperlora.load import load_hyperlora
from ipt2v.models.hyperlora.network import IdentityLoRA
from ipt2v.models.hyperlora.slots import Slots
from ipt2v.models.sdxl import Painter, load_painter, unet_on_meta
from ipt2v.models.toy_faces import toy_face_pack
from ipt2v.models.umt5 import load_text_encoder
from ipt2v.parallel import Group
from ipt2v.records import Answer, Failure, FirstFrame, Item, Made, Photo, item_seed
from ipt2v.references import load_reference
from ipt2v.stages.first_frame import make, own_share
from ipt2v.stages.painting import PEOPLE_AT_ONCE, becoming, load_identities, paint_best
from ipt2v.stages.portraits import NO_FACE, NO_LOOK, coefficients_of, look_at, portray

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ALONE = Group(rank=0, world_size=1, num_nodes=1, device=CPU)
NEGATIVE = "色调艳丽, blurred"
CONFIG = RunConfig(
    name="tiny",
    seed=11,
    testset={"path": "unused"},
    decouple=DecoupleConfig(
        dtype="float32",
        temperature=1.0,
        max_new_tokens=400,
        spatial_template="Show {prompt}",
        temporal_template="{subject} moves: {prompt}",
    ),
    first_frame=FirstFrameConfig(
        dtype="float32",
        width=48,
        height=32,
        num_inference_steps=2,
        negative_prompt="dark",
        max_attempts=2,
        face_detailer={"guide_size": 32, "max_size": 32, "steps": 1},
    ),
    video=VideoConfig(width=48, height=32, num_frames=5, max_text_tokens=24, negative_prompt=NEGATIVE),  # bfloat16
)
PROMPTS = (
    "a woman walks on the beach",
    "an old man reads",
    "a woman walks on the beach",
    "a boy {subject} runs",
    "a girl sings",
)

Results = list[Made[FirstFrame] | Failure]


def ask_all(messages: Sequence[str], generate: Callable[[Sequence[str]], list[Answer]]) -> list[Answer]:
    """Remembers nothing."""
    return generate(messages)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Five items, of which items 1 and 4 have a photo that is cut off."""
    folder, made = tmp_path_factory.mktemp("photos"), []
    for index, prompt in enumerate(PROMPTS):
        path = folder / f"{index}.png"
        pixels_HWC = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels_HWC).save(path)
        if index in (1, 4):
            path.write_bytes(path.read_bytes()[:2000])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        item = Item(identity=f"person {index}", prompt_id="00", prompt=prompt, reference=str(path), reference_sha256=digest)
        made.append(item)
    return made


@pytest.fixture(scope="module")
def run(toy_weights: Path) -> Callable[[Sequence[Item]], Results]:
    return lambda items: list(make(items, CONFIG, toy_weights, ALONE, ask_all))


@pytest.fixture(scope="module")
def results(run: Callable[[Sequence[Item]], Results], items: list[Item]) -> Results:
    return run(items)


@pytest.fixture(scope="module")
def records(results: Results) -> dict[str, FirstFrame]:
    return {result.record.key: result.record for result in results if isinstance(result, Made)}


def same(one: FirstFrame, other: FirstFrame) -> bool:
    """Equal to the last bit; frozen records that hold arrays have no == of their own."""
    plain = ("key", "subject", "spatial_prompt", "temporal_prompt", "similarity", "attempts", "notes")
    texts = ((one.temporal, other.temporal), (one.negative, other.negative))
    return (
        all(getattr(one, name) == getattr(other, name) for name in plain)
        and np.array_equal(one.image_HWC, other.image_HWC)
        and all(a.text == b.text and np.array_equal(a.embedding_LD, b.embedding_LD) for a, b in texts)
    )


# ---- one result for each item


def test_every_item_gives_one_record_or_one_failure_in_the_items_order(results: Results, items: list[Item]) -> None:
    made = [result.record.key for result in results if isinstance(result, Made)]
    failed = [result.key for result in results if isinstance(result, Failure)]
    assert made == [items[index].key for index in (0, 2, 3)]
    assert failed == [items[index].key for index in (1, 4)]


def test_a_photo_that_does_not_decode_is_a_failure_with_its_reason(results: Results, items: list[Item]) -> None:
    failures = [result for result in results if isinstance(result, Failure)]
    for failure, item in zip(failures, (items[1], items[4]), strict=True):
        assert failure.stage == "first_frame"
        assert item.key in failure.reason and item.reference in failure.reason
        assert "cannot be decoded" in failure.reason


def test_if_no_photo_decodes_no_model_is_loaded(items: list[Item], tmp_path: Path) -> None:
    results = list(make([items[1], items[4]], CONFIG, tmp_path / "no weights here", ALONE, ask_all))
    assert [type(result) for result in results] == [Failure, Failure]


def test_of_no_items_nothing_is_made_and_no_model_is_loaded(tmp_path: Path) -> None:
    assert list(make([], CONFIG, tmp_path / "no weights here", ALONE, ask_all)) == []


def test_a_photo_that_has_changed_stops_the_run(items: list[Item], tmp_path: Path) -> None:
    changed = Item(identity="person", prompt_id="00", prompt="x", reference=items[0].reference, reference_sha256="0" * 64)
    with pytest.raises(ValueError, match="has changed"):
        list(make([changed], CONFIG, tmp_path / "no weights here", ALONE, ask_all))


# ---- what a record holds


def test_the_texts_of_a_record_belong_together(records: dict[str, FirstFrame], toy_weights: Path) -> None:
    embed = load_text_encoder(toy_weights / CONFIG.video.model, CONFIG.video, device=CPU)
    for record in records.values():
        assert record.temporal.text == record.temporal_prompt
        assert np.array_equal(record.temporal.embedding_LD, embed(record.temporal_prompt).embedding_LD)
        assert record.negative.text == NEGATIVE
        assert np.array_equal(record.negative.embedding_LD, embed(NEGATIVE).embedding_LD)
        assert record.temporal.embedding_LD.dtype == record.negative.embedding_LD.dtype == np.uint16


def test_the_picture_of_a_record_is_painted_and_its_faces_redrawn_from_its_prompt_seeds_and_photo(
    results: Results, items: list[Item], toy_weights: Path
) -> None:
    painter = load_painter(toy_weights / CONFIG.first_frame.model, CONFIG.first_frame, device=CPU)
    analyse = load_face_analysis(toy_weights / "antelopev2")
    hyperlora = load_hyperlora(
        toy_weights / "HyperLoRA", unet_on_meta(toy_weights / "RealVisXL_V4.0"), variant="fidelity", device=CPU
    )
    cut = load_cutter(toy_weights / "HRNetV2-W48" / "hrnet_lip_5583_torch04.pth", device=CPU)
    references = {item.key: load_reference(item) for item in items if items.index(item) in (0, 2, 3)}
    for made in (result for result in results if isinstance(result, Made)):
        record = made.record
        numbers = [item_seed(CONFIG.seed, record.key, f"paint {number}") for number in range(2)]
        assert [attempt.seed for attempt in record.attempts] == numbers[: len(record.attempts)]
        cutout_HWC = cut(references[record.key]).image_HWC
        assert np.array_equal(record.reference_HWC, cutout_HWC)
        assert not np.array_equal(cutout_HWC, references[record.key])
        look = look_at(cutout_HWC, analyse, CONFIG.hyperlora)
        assert look is not None
        painter.slots.set_identity(hyperlora.mix([coefficients_of([look], hyperlora)])[0], 0.85)
        prompt = f"fcsks fxhks fhyks, {record.spatial_prompt}"
        image_HWC = painter.paint(prompt, made.seed)
        boxes = [face.box_xyxy for face in analyse(image_HWC)]
        redraw_seed = item_seed(CONFIG.seed, record.key, f"redraw {numbers.index(made.seed)}")
        assert np.array_equal(record.image_HWC, painter.redraw(image_HWC, boxes, prompt, redraw_seed))
        assert len(boxes) == 1 and not np.array_equal(record.image_HWC, image_HWC)


def test_a_record_names_the_subject_of_its_photo_and_keeps_the_attempt_that_is_most_like_it(
    records: dict[str, FirstFrame],
) -> None:
    for record in records.values():
        assert record.subject in ("A man", "A woman")
        scores = [attempt.similarity for attempt in record.attempts]
        assert record.similarity == max(scores)
        assert len(scores) == (1 if scores[0] > 0.5 else 2)
        assert not any("no face" in note for note in record.notes)
        assert record.image_HWC.shape == (32, 48, 3)
        assert record.spatial_prompt and record.temporal_prompt and record.spatial_prompt != record.temporal_prompt


# ---- best of some attempts, with a painter and eyes of three lines


def face_of(value: float) -> Face:
    """A face whose cosine to face_of(1) is `value`."""
    embedding = np.zeros(512, dtype=np.float32)
    embedding[:2] = value, (1 - value**2) ** 0.5
    box_xyxy, landmarks_106 = np.array([0, 0, 20, 20], dtype=np.float32), np.zeros((106, 2), dtype=np.float32)
    return Face(box_xyxy=box_xyxy, score=0.9, landmarks_106=landmarks_106, is_male=True, embedding=embedding)


def attempts_at(likenesses: Sequence[float | None], *, photo_has_face: bool = True) -> tuple[int, list[float | None]]:
    """(number of the painting that is kept, what is noted of all) if paintings are so like the photo."""
    config = CONFIG.model_copy(update={"first_frame": FirstFrameConfig(max_attempts=3, face_detailer={"enabled": False})})
    numbers = iter(range(3))
    painter = Painter(
        paint=lambda prompt, seed: np.full((2, 2, 3), next(numbers), dtype=np.uint8),
        redraw=lambda *_: pytest.fail("redrawn although it is switched off"),
        slots=Slots(linears={}, slots={}),
    )

    def analyse(image_HWC: np.ndarray) -> tuple[Face, ...]:
        value = likenesses[int(image_HWC[0, 0, 0])]
        return () if value is None else (face_of(value),)

    people = (face_of(1.0),) if photo_has_face else ()
    picture = paint_best("id001/prompt1", "a man", people, config, painter, analyse)
    return int(picture.image_HWC[0, 0, 0]), [attempt.similarity for attempt in picture.attempts]


@pytest.mark.parametrize(
    ("likenesses", "kept", "num_attempts"),
    [
        ((0.6, 0.9, 0.9), 0, 1),  # enough at once
        ((0.2, 0.7, 0.9), 1, 2),
        ((0.2, 0.4, 0.3), 1, 3),
        ((0.499, 0.2, 0.1), 0, 3),
        ((None, -0.9, None), 1, 3),  # a face, however unlike, before none
        ((None, None, None), 0, 3),
        ((0.2, 0.2, 0.2), 0, 3),
    ],
)
def test_the_painting_most_like_the_photo_is_kept_the_first_that_is_enough_ends_it(
    likenesses: Sequence[float | None], kept: int, num_attempts: int
) -> None:
    number, noted = attempts_at(likenesses)
    assert number == kept
    assert [None if value is None else round(value, 3) for value in noted] == list(likenesses[:num_attempts])


def test_without_a_face_in_the_photo_the_first_painting_is_kept() -> None:
    assert attempts_at((0.1, 0.9, 0.9), photo_has_face=False) == (0, [None])


def test_equal_prompts_share_their_texts_and_not_their_pictures(records: dict[str, FirstFrame]) -> None:
    one, other = records["person 0/00"], records["person 2/00"]
    assert (one.spatial_prompt, one.temporal_prompt) == (other.spatial_prompt, other.temporal_prompt)
    assert not np.array_equal(one.image_HWC, other.image_HWC)
    assert records["person 3/00"].temporal_prompt != one.temporal_prompt


def test_seconds_are_counted_for_every_record(results: Results) -> None:
    assert all(result.seconds > 0 for result in results if isinstance(result, Made))


# ---- shares of several ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_ranks_share_the_people_not_their_items(items: list[Item], num_ranks: int) -> None:
    of_people = [replace(item, prompt_id=f"{number}") for item in items for number in range(4)]
    groups = [Group(rank=rank, world_size=num_ranks, num_nodes=1, device=CPU) for rank in range(num_ranks)]
    shares = [own_share(of_people, group) for group in groups]
    assert sorted(item.key for share in shares for item in share) == sorted(item.key for item in of_people)
    people = [{item.photos for item in share} for share in shares]
    assert sum(map(len, people)) == len(set().union(*people)) == len(items)
    assert max(map(len, people)) - min(map(len, people)) <= 1


# ---- depends on the item alone


@pytest.mark.parametrize("indices", [(3,), (4, 3, 0), (2, 0, 1, 3)], ids=str)
def test_a_record_does_not_depend_on_the_other_items_of_the_call(
    run: Callable[[Sequence[Item]], Results], records: dict[str, FirstFrame], items: list[Item], indices: tuple[int, ...]
) -> None:
    found = [result.record for result in run([items[index] for index in indices]) if isinstance(result, Made)]
    assert [record.key for record in found] == [items[index].key for index in indices if index not in (1, 4)]
    assert all(same(record, records[record.key]) for record in found)


def test_the_runs_seed_changes_prompts_and_pictures(
    records: dict[str, FirstFrame], items: list[Item], toy_weights: Path
) -> None:
    (made,) = make([items[0]], CONFIG.model_copy(update={"seed": 12}), toy_weights, ALONE, ask_all)
    assert isinstance(made, Made)
    before = records[items[0].key]
    assert made.record.temporal_prompt != before.temporal_prompt
    assert not np.array_equal(made.record.image_HWC, before.image_HWC)


def test_each_record_is_there_before_the_next_is_painted(items: list[Item], toy_weights: Path) -> None:
    results = make([items[0], items[2]], CONFIG, toy_weights, ALONE, ask_all)
    first = next(results)
    results.close()  # the job ends here
    assert isinstance(first, Made) and first.record.key == items[0].key


def test_the_photo_changes_the_picture_and_without_hyperlora_it_does_not(items: list[Item], toy_weights: Path) -> None:
    other = replace(items[0], reference=items[2].reference, reference_sha256=items[2].reference_sha256)
    both = replace(items[0], more_photos=(Photo(path=items[2].reference, sha256=items[2].reference_sha256),))

    def picture(item: Item, *, enabled: bool) -> np.ndarray:
        prompts = CONFIG.decouple.model_copy(update={"prompts": "raw", "spatial_template": "Show nothing"})
        first_frame = CONFIG.first_frame.model_copy(update={"max_attempts": 1})
        hyperlora = CONFIG.hyperlora.model_copy(update={"enabled": enabled})
        config = CONFIG.model_copy(update={"decouple": prompts, "first_frame": first_frame, "hyperlora": hyperlora})
        (made,) = make([item], config, toy_weights, ALONE, ask_all)
        assert isinstance(made, Made)
        return made.record.image_HWC

    one, another, of_both = (picture(item, enabled=True) for item in (items[0], other, both))
    assert not np.array_equal(one, another)
    assert not np.array_equal(one, of_both) and not np.array_equal(another, of_both)
    assert np.array_equal(picture(items[0], enabled=False), picture(other, enabled=False))


def test_people_beyond_one_block_have_their_own_loras(items: list[Item], toy_weights: Path) -> None:
    """More people than are mixed together, asked for in and out of order."""
    analyse = load_face_analysis(toy_weights / "antelopev2")
    portrait = portray([load_reference(items[0])], analyse, keep_whole, CONFIG.hyperlora)
    order = [items[0].photos * (count + 1) for count in range(PEOPLE_AT_ONCE + 2)]
    identity = load_identities(dict.fromkeys(order, portrait), CONFIG, toy_weights, CPU)
    first, last, again = (identity(order[index]) for index in (0, -1, 0))
    assert first is not None and last is not None and again is not None
    for path, (down_RI, up_OR) in first.factors.items():
        for other in (last, again):  # the same photo: the same person
            assert torch.equal(other.factors[path][0], down_RI) and torch.equal(other.factors[path][1], up_OR)
    assert identity(items[2].photos) is None


def test_a_persons_lora_is_mixed_once_for_all_of_the_persons_items(items: list[Item]) -> None:
    asked: list[tuple[Photo, ...]] = []
    painter = Painter(paint=pytest.fail, redraw=pytest.fail, slots=Slots(linears={}, slots={}))

    def identity(photos: tuple[Photo, ...]) -> IdentityLoRA | None:
        asked.append(photos)
        return IdentityLoRA(factors={}) if photos == items[0].photos else None

    become = becoming(painter, identity, CONFIG)
    said = [become(items[index].photos) for index in (0, 0, 0, 2, 2, 0)]
    assert asked == [items[index].photos for index in (0, 2, 0)]
    assert said == ["fcsks fxhks fhyks, "] * 3 + [""] * 2 + ["fcsks fxhks fhyks, "]


@pytest.mark.parametrize("prompts", ["raw", "refined"])
def test_reference_to_video_paints_nothing_and_loads_no_painter(
    items: list[Item], toy_weights: Path, tmp_path: Path, prompts: str, records: dict[str, FirstFrame]
) -> None:
    needed = ["antelopev2", "HRNetV2-W48", CONFIG.video.model] + ["Qwen3-8B"] * (prompts == "refined")
    for folder in needed:
        (tmp_path / folder).symlink_to(toy_weights / folder)
    video = CONFIG.video.model_copy(update={"condition": "reference"})
    decouple = CONFIG.decouple.model_copy(update={"prompts": prompts})
    config = CONFIG.model_copy(update={"video": video, "decouple": decouple})
    assert sorted(folders(config).values()) == sorted(needed)
    (made,) = make([items[0]], config, tmp_path, ALONE, ask_all)
    assert isinstance(made, Made)
    record, painted = made.record, records[items[0].key]
    assert (record.image_HWC, record.spatial_prompt, record.attempts, record.similarity) == (None, "", (), None)
    assert np.array_equal(record.reference_HWC, painted.reference_HWC)
    assert record.temporal_prompt == (painted.temporal_prompt if prompts == "refined" else items[0].prompt)
    assert set(record.notes) <= set(painted.notes)


def networks() -> dict[int, str]:
    """id -> class of every network that is in memory."""
    return {id(thing): type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, torch.nn.Module)}


def test_while_the_painter_works_every_other_model_is_gone(items: list[Item], toy_weights: Path) -> None:
    before = networks()
    results = make([items[0]], CONFIG, toy_weights, ALONE, ask_all)
    next(results)
    loaded = {name for key, name in networks().items() if key not in before}
    results.close()
    assert "UNet2DConditionModel" in loaded
    assert not loaded & {"Qwen3ForCausalLM", "UMT5EncoderModel", "HRNet", "Resampler", "CLIPVisionModelWithProjection"}


def test_a_photo_without_a_face_is_of_a_person_keeps_its_first_frame_and_is_noted(
    items: list[Item], toy_weights: Path, tmp_path: Path
) -> None:
    blind = tmp_path / "weights"
    blind.mkdir()
    for folder in toy_weights.iterdir():
        if folder.name != "antelopev2":
            (blind / folder.name).symlink_to(folder)
    toy_face_pack(blind / "antelopev2", seen_at=())
    (made,) = make([items[0]], CONFIG, blind, ALONE, ask_all)
    off = CONFIG.hyperlora.model_copy(update={"enabled": False})
    (plain,) = make([items[0]], CONFIG.model_copy(update={"hyperlora": off}), blind, ALONE, ask_all)
    assert isinstance(made, Made) and isinstance(plain, Made)
    assert np.array_equal(made.record.image_HWC, plain.record.image_HWC)  # from the prompt alone, without trigger words
    assert made.record.subject == "A person"
    assert made.record.notes[:2] == (NO_FACE, NO_LOOK)
    assert made.record.image_HWC.std() > 0
