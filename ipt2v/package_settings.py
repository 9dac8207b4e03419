"""What a leaderboard wants of a package: names, checks and their values, from YAML. Shipped ones are in package_rules/.

Decides, and reads no video: whether what is known of an MP4 fits. Knows no run folders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from ipt2v.config import RunConfig, Settings, load_settings, parse_settings
from ipt2v.mp4 import Mp4Facts
from ipt2v.records import Item

FOLDER = Path(__file__).parent / "package_rules"
DEFAULTS = {"evaljson": "ipvg2026-facial"}  # by layout of the test set; all others are as in 2025
DEFAULT = "ipvg2025-facial"
FPS_TOLERANCE = 0.005

Level = Literal["required", "warn", "off"]


class Check(Settings):
    """Whether something must be so."""

    rule: Level = "required"

    @field_validator("rule", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML 1.1 reads a bare `off` as false


class TextCheck(Check):
    """A text that must be found."""

    value: str


class NumberCheck(Check):
    """A number that must be found; none: the one that follows from the run's settings."""

    value: float | None = None


class BoundsCheck(Check):
    """A number must be within bounds."""

    at_least: float | None = None
    at_most: float | None = None


class Checks(Settings):
    """All that is looked at, by decoding every file to its end."""

    container: TextCheck = TextCheck(value="mp4")
    codec: TextCheck = TextCheck(value="h264")
    pixel_format: TextCheck = TextCheck(value="yuv420p")
    video_streams: NumberCheck = NumberCheck(value=1)
    audio_streams: NumberCheck = NumberCheck(value=0)
    other_streams: NumberCheck = NumberCheck(value=0)
    frames: NumberCheck = NumberCheck()
    fps: NumberCheck = NumberCheck()
    width: NumberCheck = NumberCheck()
    height: NumberCheck = NumberCheck()
    seconds: NumberCheck = NumberCheck()  # within one frame
    faststart: Check = Check()  # the index before the pictures, so that a browser plays before it has loaded
    decodes: Check = Check()
    # Mean luma of a video. Black is 16 in yuv420p of TV range; the darkest video of our tests has 100.
    luma: BoundsCheck = BoundsCheck(at_least=18, at_most=None)
    # How far, in levels of luma, blocks of 8x8 get from the middle frame in the latter half of a video. Still pictures of 81
    # frames have 0.04 at most (x264, crf 5..30), of 17 frames about 0.09; a mouth that alone moves, 0.1% of the picture, 0.12.
    motion: BoundsCheck = BoundsCheck(at_least=0.1, at_most=None)
    bytes_of_video: BoundsCheck = BoundsCheck(at_least=1, at_most=None)
    records: Check = Check()  # first frame and latents of this run are there, whole, with their checksums
    scores: Check = Check()  # if the run is scored: of the very bytes that are packed
    extra: Check = Check()  # no MP4 that is of no item


class PackageRules(Settings):
    """One kind of package."""

    name: str = ""
    formats: tuple[str, ...] = ()  # layouts of test sets that it is for; none: any
    archive: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.zip$")
    root: str | None = "submission"  # the folder inside the archive; null: none
    member: str  # with {identity}, {prompt_id} or {n}: the place in eval.json, or in natural order, from 1
    max_part_bytes: int | None = Field(None, ge=1_000)  # larger archives are split into several
    checks: Checks = Checks()

    @field_validator("member")
    @classmethod
    def _known_fields(cls, template: str) -> str:
        try:
            template.format(identity="id001", prompt_id="prompt1", n=1)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(f"{template!r}: known are {{identity}}, {{prompt_id}}, {{n}}; found {error}") from None
        return template


def shipped_rules() -> list[str]:
    """The names of those that come with ipt2v."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_rules(name: str | None, testset_format: str) -> PackageRules:
    """By name, or path of a YAML file; else those for the test set's layout. Raises ValueError if they do not fit it."""
    chosen = name or DEFAULTS.get(testset_format, DEFAULT)
    path = FOLDER / f"{chosen}.yaml" if chosen in shipped_rules() else Path(chosen)
    if not path.is_file():
        raise ValueError(f"--testset {chosen!r}: no such file; give a YAML file, or one of {', '.join(shipped_rules())}")
    rules = load_settings(PackageRules, path)
    if rules.formats and testset_format not in rules.formats:
        raise ValueError(
            f"--testset {chosen}: for test sets of layout {', '.join(rules.formats)}, but this run's is {testset_format}; "
            f"shipped: {', '.join(shipped_rules())}"
        )
    return parse_settings(PackageRules, rules.model_dump() | {"name": rules.name or path.stem}, where=str(path))


def member_name(rules: PackageRules, item: Item, number: int) -> str:
    """The name of an item's video in the archive. Raises ValueError if it would lead out of the archive's folder."""
    name = rules.member.format(identity=item.identity, prompt_id=item.prompt_id, n=number)
    whole = name if rules.root is None else f"{rules.root}/{name}"
    parts = whole.split("/")
    fault = next((part for part in parts if part in ("", ".", "..") or part != part.strip()), None)
    is_strange = any(not char.isprintable() or char == "\\" for char in whole)
    is_drive = whole[1:2] == ":"
    if fault is not None or is_strange or is_drive:
        raise ValueError(
            f"{item.key!r}: would be {whole!r} in the archive, which can lead out of its folder or cannot be a file name; "
            "rename the identity or the prompt in the test set, or number the videos: member: '{n}.mp4'"
        )
    return whole


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as the rules say."""

    level: Level
    text: str


def problems_of(facts: Mp4Facts, checks: Checks, config: RunConfig) -> Iterator[Problem]:
    """What of an MP4 is not as it must be; of one that does not open, nothing but that."""
    if not facts.num_frames:
        yield Problem("required", facts.error or "no video in it")
        return
    if facts.error:
        yield from _problem(checks.decodes, facts.error)
    yield from _texts(facts, checks)
    yield from _numbers(facts, checks, config)
    if not facts.faststart:
        yield from _problem(checks.faststart, "faststart: the index (moov) comes after the pictures (mdat), expected before")
    yield from _bounds("luma", checks.luma, facts.mean_luma, low="black", high="white")
    yield from _bounds("motion", checks.motion, facts.motion, low="frozen", high="flicker")
    yield from _bounds("bytes", checks.bytes_of_video, facts.num_bytes, low="too small", high="too large")


def _texts(facts: Mp4Facts, checks: Checks) -> Iterator[Problem]:
    rows = (
        ("container", checks.container, facts.container),
        ("codec", checks.codec, facts.codec),
        ("pixel_format", checks.pixel_format, facts.pixel_format),
    )
    for name, check, found in rows:
        if found != check.value:
            yield from _problem(check, f"{name}: found {found}, expected {check.value}")


def _numbers(facts: Mp4Facts, checks: Checks, config: RunConfig) -> Iterator[Problem]:
    video = config.video
    frames, fps = _value(checks.frames, video.num_frames), _value(checks.fps, video.fps)
    rows = (
        ("video_streams", checks.video_streams, facts.num_video_streams, 1, 0),
        ("audio_streams", checks.audio_streams, facts.num_audio_streams, 0, 0),
        ("other_streams", checks.other_streams, facts.num_other_streams, 0, 0),
        ("frames", checks.frames, facts.num_frames, frames, 0),
        ("fps", checks.fps, facts.fps, fps, FPS_TOLERANCE),
        ("width", checks.width, facts.width, video.width, 0),
        ("height", checks.height, facts.height, video.height, 0),
        ("seconds", checks.seconds, facts.seconds, frames / fps, 1 / fps),
    )
    for name, check, found, default, tolerance in rows:
        expected = _value(check, default)
        if abs(found - expected) > tolerance:
            yield from _problem(check, f"{name}: found {found:g}, expected {expected:g}")


def _value(check: NumberCheck, default: float) -> float:
    return default if check.value is None else check.value


def _bounds(name: str, check: BoundsCheck, found: float, *, low: str, high: str) -> Iterator[Problem]:
    if check.at_least is not None and found < check.at_least:
        yield from _problem(check, f"{name}: {low}: found {found:.4g}, expected at least {check.at_least:g}")
    if check.at_most is not None and found > check.at_most:
        yield from _problem(check, f"{name}: {high}: found {found:.4g}, expected at most {check.at_most:g}")


def _problem(check: Check, text: str) -> Iterator[Problem]:
    if check.rule != "off":
        yield Problem(check.rule, text)
