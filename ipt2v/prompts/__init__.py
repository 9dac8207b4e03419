"""What the LLM is asked, and what is made of its answers. The two templates are text files that a user can replace.

The Temporal Prompt Polisher rewrites a prompt for the video model; the Spatial Semantic Parser lists what its start shows.
Cutting to the subject and closing with "close-up" are as in the paper's released code (rain152/IPVG, prompt_optimizer.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
CLOSE_UP = "close-up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt made of an answer; the note says why it is not the answer itself, or is to be doubted."""

    text: str
    note: str = ""


def read_template(name: str) -> str:
    """A packaged template by name, a user's by path, or `name` itself if it is a template's text.

    Raises ValueError if there is none of that name, or it has no {prompt}.
    """
    if "{prompt}" in name:
        return name
    path = FOLDER / f"{name}.txt" if re.fullmatch(r"\w+", name) else Path(name)
    if not _is_file(path):
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.txt")))
        raise ValueError(f"template {name!r}: no such file; give a path to a text file, or a packaged one: {known}")
    text = path.read_text(encoding="utf-8").strip()
    if "{prompt}" not in text:
        raise ValueError(f"template {path}: no {{prompt}} in it; mark the place of the test set's prompt so")
    return text


def fill(template: str, prompt: str, subject: str) -> str:
    """The template with {subject} and {prompt} filled in."""
    # not str.format: a prompt is untrusted text and may hold braces; it goes in last, so nothing in it is filled in
    return template.replace("{subject}", subject).replace("{prompt}", prompt)


def temporal_prompt(answer: str, *, finished: bool, subject: str, prompt: str) -> Prompt:
    """The polisher's answer from the subject on; the test set's prompt where the answer is empty or was cut off."""
    text = cut_to(subject, clean(answer))
    if fault := _fault(text, finished=finished):
        return Prompt(text=prompt, note=f"temporal prompt: {fault}, the test set's prompt is used")
    if not text.startswith(subject):
        return Prompt(text=text, note=f"temporal prompt: the answer does not name {subject!r}")
    return Prompt(text=text)


def spatial_prompt(answer: str, *, finished: bool, subject: str, prompt: str) -> Prompt:
    """The parser's phrases from the subject on, closed by "close-up"; the test set's prompt where there are none.

    The list may name no subject: the paper's own example does not.
    """
    text = cut_to(subject, clean(answer))
    fault = _fault(text, finished=finished)
    note = f"spatial prompt: {fault}, the test set's prompt is used" if fault else ""
    text = prompt if fault else text
    return Prompt(text=text if CLOSE_UP in text.lower() else f"{text.rstrip(' .,;')}, {CLOSE_UP}", note=note)


def clean(answer: str) -> str:
    """An answer in one line, without think blocks and without the role name that a chat template may leave in front."""
    answer = re.sub(r"<think>.*?(</think>|\Z)", "", answer, flags=re.DOTALL)  # \Z: cut off while thinking
    answer = re.sub(r"\A\s*assistant\b[:\s]*", "", answer.rpartition("</think>")[2])
    return " ".join(answer.split())


def cut_to(subject: str, text: str) -> str:
    """The text from the first occurrence of the subject on; all of it where there is none."""
    return text[max(text.find(subject), 0) :]


def _fault(text: str, *, finished: bool) -> str:
    if not text:
        return "the answer is empty"
    return "" if finished else "the answer was cut off at max_new_tokens"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long for a name: a template's text, with {prompt} forgotten
        return False
