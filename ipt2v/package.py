"""Finished videos -> the leaderboard's archive, with checksums beside it. Knows neither models nor schedulers."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ipt2v.atomic import replacing, write_text
from ipt2v.config import RunConfig
from ipt2v.mp4 import inspect_mp4
from ipt2v.run_dir import RunDir
from ipt2v.testsets import archive_template

ARCHIVE_NAME = "facial_results.zip"  # of the facial track, 2025 and 2026
ARCHIVE_ROOT = "submission"
EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's earliest; a fixed time makes equal videos equal archives


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What write_package wrote."""

    archive: Path
    num_videos: int
    missing: tuple[str, ...]  # keys without a video


def write_package(run: RunDir, *, allow_missing: bool = False) -> Package:
    """Check every delivered MP4 by decoding it, and zip them under the names that the leaderboard wants.

    Raises ValueError if a video is missing (unless allowed), or is not as the run's settings say.
    """
    config, items, template = run.config(), run.manifest(), archive_template(run.environment().testset_format)
    missing = tuple(item.key for item in items if not run.mp4_path(item.key).is_file())
    if missing and not allow_missing:
        raise ValueError(
            f"{run.root}: {len(missing)} of {len(items)} videos are missing ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); `ipt2v status {run.root}` says why; --allow-missing packs the others"
        )
    videos = {
        template.format(identity=item.identity, prompt_id=item.prompt_id): run.mp4_path(item.key)
        for item in items
        if item.key not in missing
    }
    if len(videos) != len(items) - len(missing):
        raise ValueError(f"{run.root}: two items would get the same name {template!r} in the archive; rename their prompt_id")
    for path in videos.values():
        check_video(path, config)
    archive = run.package_path / ARCHIVE_NAME
    with replacing(archive) as scratch:
        _write_zip(scratch, videos)
    checksums = {f"{ARCHIVE_ROOT}/{name}": path for name, path in sorted(videos.items())} | {ARCHIVE_NAME: archive}
    write_text(run.package_path / "sha256.txt", "".join(f"{_sha256(path)}  {name}\n" for name, path in checksums.items()))
    return Package(archive=archive, num_videos=len(videos), missing=missing)


def check_video(path: Path, config: RunConfig) -> None:
    """Raise ValueError, naming each difference, unless the MP4 decodes to what the settings ask for."""
    facts, video = inspect_mp4(path), config.video
    expected = {
        "num_frames": video.num_frames,
        "width": video.width,
        "height": video.height,
        "fps": float(video.fps),
        "codec": "h264",
        "pixel_format": "yuv420p",
        "num_streams": 1,
    }
    found = {name: getattr(facts, name) for name in expected}
    wrong = [f"{name}: found {found[name]}, expected {expected[name]}" for name in expected if found[name] != expected[name]]
    if wrong:
        raise ValueError(f"{path}: {'; '.join(wrong)}; delete it and submit again to make it anew")


def _write_zip(path: Path, videos: dict[str, Path]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # stored: H.264 does not deflate
        for name, video in sorted(videos.items()):
            entry = zipfile.ZipInfo(f"{ARCHIVE_ROOT}/{name}", EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, video.read_bytes())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
