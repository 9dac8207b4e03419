"""What becomes of an answer of the LLM, of every shape, and what the LLM is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ipt2v.config import DecoupleConfig
from ipt2v.prompts import clean, cut_to, fill, read_template, spatial_prompt, temporal_prompt
from ipt2v.records import Answer
from ipt2v.stages.decouple import decouple

RAW = "The runner sped past her rivals."
MAN, WOMAN = "A man", "A woman"

TEMPORAL = [  # answer, prompt made of it
    ("A man sprints past his rivals.", "A man sprints past his rivals."),
    ("assistant\nA man sprints past his rivals.", "A man sprints past his rivals."),
    ("Assistant: A man sprints past his rivals.", "A man sprints past his rivals."),
    ("<think>\n\n</think>\n\nA man sprints.", "A man sprints."),
    ("<think>He or she?</think>A man sprints.", "A man sprints."),
    ("assistant\n<think>\n</think>\nA man sprints.", "A man sprints."),
    ("so, A woman or A man?</think> A man sprints.", "A man sprints."),
    ("Improved prompt: A man sprints.", "A man sprints."),
    ("Here it is:\n\nA man,\nin light gear, sprints. A man wins.", "A man, in light gear, sprints. A man wins."),
    ('"A man sprints."', 'A man sprints."'),
    ("A man sprints\tpast  his rivals.\n", "A man sprints past his rivals."),
]
TEMPORAL_NOTED = [  # answer, whether it ended by itself, prompt, what the note says
    ("", True, RAW, "the answer is empty"),
    (" \n ", True, RAW, "the answer is empty"),
    ("<think>only thoughts</think>", True, RAW, "the answer is empty"),
    ("<think>never ends", False, RAW, "the answer is empty"),
    ("assistant", True, RAW, "the answer is empty"),
    ("A man sprints past his rivals, then he", False, RAW, "cut off at max_new_tokens"),
    ("A man A man A man A man", False, RAW, "cut off at max_new_tokens"),
    ("A runner sprints.", True, "A runner sprints.", "does not name 'A man'"),
    ("a man sprints.", True, "a man sprints.", "does not name 'A man'"),
]
SPATIAL = [
    ("a man, light gear, track, close-up", "a man, light gear, track, close-up"),
    ("a man, light gear, track", "a man, light gear, track, close-up"),
    ("a man, light gear, track.", "a man, light gear, track, close-up"),
    ("A man, light gear, Close-up", "A man, light gear, Close-up"),
    ("Here you are: A man, light gear, track", "A man, light gear, track, close-up"),
    ("assistant\nReal photography, a man, track", "Real photography, a man, track, close-up"),
    ("<think>\n\n</think>\n\na man,\ntrack,", "a man, track, close-up"),
]
SPATIAL_NOTED = [
    ("", True, "The runner sped past her rivals, close-up", "the answer is empty"),
    ("</think>", True, "The runner sped past her rivals, close-up", "the answer is empty"),
    ("a man, a track, a track, a tr", False, "The runner sped past her rivals, close-up", "cut off at max_new_tokens"),
]


@pytest.mark.parametrize(("answer", "prompt"), TEMPORAL)
def test_a_polished_prompt_starts_with_the_subject(answer: str, prompt: str) -> None:
    made = temporal_prompt(answer, finished=True, subject=MAN, prompt=RAW)
    assert (made.text, made.note) == (prompt, "")


@pytest.mark.parametrize(("answer", "finished", "prompt", "note"), TEMPORAL_NOTED)
def test_an_answer_that_cannot_be_polished_from_is_noted(answer: str, finished: bool, prompt: str, note: str) -> None:
    made = temporal_prompt(answer, finished=finished, subject=MAN, prompt=RAW)
    assert made.text == prompt
    assert made.note.startswith("temporal prompt: ") and note in made.note


@pytest.mark.parametrize(("answer", "prompt"), SPATIAL)
def test_parsed_phrases_close_with_close_up_once(answer: str, prompt: str) -> None:
    made = spatial_prompt(answer, finished=True, subject=MAN, prompt=RAW)
    assert (made.text, made.note) == (prompt, "")


@pytest.mark.parametrize(("answer", "finished", "prompt", "note"), SPATIAL_NOTED)
def test_phrases_that_cannot_be_used_are_noted(answer: str, finished: bool, prompt: str, note: str) -> None:
    made = spatial_prompt(answer, finished=finished, subject=MAN, prompt=RAW)
    assert made.text == prompt
    assert made.note.startswith("spatial prompt: ") and note in made.note


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        ("<think>one</think>a <think>two</think>woman", "a woman"),
        ("<think>one<think>two</think>three</think>a woman", "a woman"),
        ("one</think>two</think>a woman", "a woman"),
        ("the assistant: a woman", "the assistant: a woman"),
        ("assistants sing", "assistants sing"),
        ("色调\n艳丽, 1 < 2 > 0", "色调 艳丽, 1 < 2 > 0"),
    ],
)
def test_a_clean_answer_has_no_thoughts_no_role_and_one_line(answer: str, cleaned: str) -> None:
    assert clean(answer) == cleaned


def test_a_text_without_the_subject_is_not_cut() -> None:
    assert cut_to(WOMAN, "A man runs") == "A man runs"


# ---- what is asked, in which order


class Llm:
    """Answers each message by a sentence that starts with the subject; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, messages: Sequence[str]) -> list[Answer]:
        self.asked += messages
        return [Answer(text=f"A man <{message}>", finished=True) for message in messages]


def settings(**changes: str) -> DecoupleConfig:
    return DecoupleConfig(spatial_template="show: {prompt}", temporal_template="{subject} moves: {prompt}", **changes)


def test_the_parser_reads_the_raw_prompt_as_in_the_paper() -> None:
    (made,) = decouple([(RAW, MAN)], settings(), Llm())
    assert made.spatial == f"A man <show: {RAW}>, close-up"
    assert made.temporal == f"A man <A man moves: {RAW}>"


def test_the_parser_reads_the_polished_prompt_as_in_the_released_code() -> None:
    (made,) = decouple([(RAW, MAN)], settings(spatial_source="polished"), Llm())
    assert made.spatial == f"A man <show: A man <A man moves: {RAW}>>, close-up"


def test_raw_prompts_animate_over_the_same_first_frames() -> None:
    for source in ("raw", "polished"):
        (refined,) = decouple([(RAW, MAN)], settings(spatial_source=source), Llm())
        (raw,) = decouple([(RAW, MAN)], settings(spatial_source=source, prompts="raw"), Llm())
        assert raw.temporal == RAW
        assert raw.spatial == refined.spatial


def test_raw_prompts_over_raw_phrases_never_ask_the_polisher() -> None:
    llm = Llm()
    decouple([(RAW, MAN)], settings(prompts="raw"), llm)
    assert llm.asked == [f"show: {RAW}"]


def test_equal_pairs_are_asked_once_and_get_equal_prompts() -> None:
    llm = Llm()
    first, second, third = decouple([(RAW, MAN), (RAW, WOMAN), (RAW, MAN)], settings(), llm)
    assert first == third != second
    assert len(llm.asked) == 4


def test_notes_of_both_halves_are_kept() -> None:
    (made,) = decouple([(RAW, MAN)], settings(), lambda messages: [Answer(text="", finished=True) for _ in messages])
    assert [note.partition(":")[0] for note in made.notes] == ["spatial prompt", "temporal prompt"]


# ---- templates


@pytest.mark.parametrize("name", ["spatial", "temporal"])
def test_a_packaged_template_is_read_by_name_and_its_text_stands_for_itself(name: str) -> None:
    text = read_template(name)
    assert "{prompt}" in text and text == text.strip()
    assert read_template(text) == text


def test_the_templates_say_what_the_two_prompts_are() -> None:
    assert "{subject}" in read_template("temporal")
    assert "close-up" in read_template("spatial")


def test_a_template_is_read_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "my template.txt"
    path.write_text("\n色 {prompt}!\n", encoding="utf-8")
    assert read_template(str(path)) == "色 {prompt}!"


@pytest.mark.parametrize("name", ["spatail", "/no/such/file.txt", "", ".", "write it well, please " * 20])
def test_a_template_that_is_not_there_is_answered_with_those_that_are(name: str) -> None:
    with pytest.raises(ValueError, match="no such file; give a path to a text file, or a packaged one: spatial, temporal"):
        read_template(name)


def test_a_template_without_a_place_for_the_prompt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("describe {promt}")
    with pytest.raises(ValueError, match=r"t\.txt: no \{prompt\} in it; mark the place"):
        read_template(str(path))


def test_nothing_inside_a_prompt_is_filled_in() -> None:
    prompt = "{subject} {0} {prompt} {{}} %s \\1"
    assert fill("{subject}: {prompt} / {prompt}", prompt, "A man") == f"A man: {prompt} / {prompt}"
