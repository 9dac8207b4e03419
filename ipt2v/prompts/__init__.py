"""The two instruction templates for the LLM, as text files that a user can replace. stdlib only."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent


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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long for a name: a template's text, with {prompt} forgotten
        return False


def fill(template: str, prompt: str, subject: str) -> str:
    """The template with {subject} and {prompt} filled in."""
    # not str.format: a prompt is untrusted text and may hold braces; it goes in last, so nothing in it is filled in
    return template.replace("{subject}", subject).replace("{prompt}", prompt)
