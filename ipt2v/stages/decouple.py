"""Prompts -> their spatial and temporal halves: what the LLM is asked, and in which order. Knows no model, no files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ipt2v.config import DecoupleConfig
from ipt2v.prompts import Prompt, fill, spatial_prompt, temporal_prompt
from ipt2v.records import Answer

Ask = Callable[[Sequence[str]], list[Answer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoupled:
    """A prompt, split: phrases for the first frame, a sentence for the motion."""

    spatial: str
    temporal: str
    notes: tuple[str, ...]


def decouple(pairs: Sequence[tuple[str, str]], settings: DecoupleConfig, ask: Ask, *, spatial: bool = True) -> list[Decoupled]:
    """One Decoupled for each (prompt, subject). Equal pairs are asked once; `spatial` False leaves the spatial prompts empty.

    With prompts "raw" the test set's prompt animates as it is: the paper's ablation, over the same first frames.
    """
    distinct = list(dict.fromkeys(pairs))
    sources, temporal = distinct, [Prompt(text=prompt) for prompt, _ in distinct]
    if settings.prompts == "refined" or (spatial and settings.spatial_source == "polished"):
        polished = _ask(distinct, distinct, settings.temporal_template, temporal_prompt, ask)
        if settings.spatial_source == "polished":
            sources = [(prompt.text, subject) for prompt, (_, subject) in zip(polished, distinct, strict=True)]
        if settings.prompts == "refined":
            temporal = polished
    parsed = [Prompt(text="")] * len(distinct)
    if spatial:
        parsed = _ask(sources, distinct, settings.spatial_template, spatial_prompt, ask)
    halves = {
        pair: Decoupled(spatial=one.text, temporal=other.text, notes=tuple(half.note for half in (one, other) if half.note))
        for pair, one, other in zip(distinct, parsed, temporal, strict=True)
    }
    return [halves[pair] for pair in pairs]


def _ask(
    sources: Sequence[tuple[str, str]],
    pairs: Sequence[tuple[str, str]],
    template: str,
    make_prompt: Callable[..., Prompt],
    ask: Ask,
) -> list[Prompt]:
    """What `make_prompt` makes of the answer to each source; where it can make nothing, of the pair's own prompt."""
    answers = ask([fill(template, prompt, subject) for prompt, subject in sources])
    return [
        make_prompt(answer.text, finished=answer.finished, subject=subject, prompt=prompt)
        for answer, (prompt, subject) in zip(answers, pairs, strict=True)
    ]
