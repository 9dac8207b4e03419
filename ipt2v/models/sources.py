"""Where each folder of weights is published, and under which licence. Knows no network and no file system."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ipt2v.models.hyperlora.layout import CLIP_FOLDER, PROCESSOR_FOLDER, VARIANT_FOLDER


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A Hugging Face repository, and where below the folder of weights its files go."""

    name: str
    below: str = "."


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """A file at a plain URL: an archive of the folder's files, or the file itself."""

    url: str  # {file} is cutout.file
    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a folder of weights is published, and what reads it."""

    folder: str
    role: str
    url: str
    licence: str
    non_commercial: bool = False
    repositories: tuple[Repository, ...] = ()
    download: Download | None = None


def _hugging_face(folder: str, role: str, repository: str, licence: str) -> Source:
    url, repositories = f"huggingface.co/{repository}", (Repository(name=repository),)
    return Source(folder=folder, role=role, url=url, licence=licence, repositories=repositories)


SOURCES = (
    Source(
        folder="antelopev2",
        role="faces",
        url="github.com/deepinsight/insightface, model_zoo",
        licence="for non-commercial research only",
        non_commercial=True,
        download=Download(
            url="https://github.com/deepinsight/insightface/releases/download/v0.7/antelopev2.zip",
            size=360_662_982,
            sha256="8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
        ),
    ),
    _hugging_face("Qwen3-8B", "decouple", "Qwen/Qwen3-8B", "Apache-2.0"),
    Source(
        folder="HRNetV2-W48",
        role="cutout",
        url="github.com/hsfzxjy/models.storage, release HRNet-OCR",
        licence="MIT, trained on LIP, a data set for research",
        download=Download(url="https://github.com/hsfzxjy/models.storage/releases/download/HRNet-OCR/{file}"),
    ),
    Source(
        folder="HyperLoRA",
        role="hyperlora",
        url="huggingface.co/bytedance-research/HyperLoRA, and CLIP from huggingface.co/openai/clip-vit-large-patch14",
        licence="CC BY-NC 4.0: non-commercial",
        non_commercial=True,
        # ByteDance's README: its repository holds the LoRA's networks alone, and CLIP is put beside them from OpenAI's
        repositories=(
            Repository(name="bytedance-research/HyperLoRA", below=str(PurePosixPath(VARIANT_FOLDER).parent)),
            Repository(name="openai/clip-vit-large-patch14", below=CLIP_FOLDER),
            Repository(name="openai/clip-vit-large-patch14", below=PROCESSOR_FOLDER),
        ),
    ),
    _hugging_face("RealVisXL_V4.0", "first_frame", "SG161222/RealVisXL_V4.0", "OpenRAIL++-M"),
    _hugging_face("Wan2.1-VACE-14B-diffusers", "video", "Wan-AI/Wan2.1-VACE-14B-diffusers", "Apache-2.0"),
    _hugging_face("Wan2.1-VACE-1.3B-diffusers", "video", "Wan-AI/Wan2.1-VACE-1.3B-diffusers", "Apache-2.0"),
)


def source_of(folder: str) -> Source:
    """The source of a folder of weights. Raises ValueError if it is not known."""
    for source in SOURCES:
        if source.folder == folder:
            return source
    known = ", ".join(source.folder for source in SOURCES)
    raise ValueError(f"{folder!r} is no folder that we know a source of (known: {known}); put the checkpoint there yourself")


def where_from(folder: str, weights_dir: Path) -> str:
    """How to come by a folder of weights."""
    try:
        source = source_of(folder)
    except ValueError as error:
        return str(error)
    return (
        f"it comes from {source.url} ({source.licence}): `ipt2v weights fetch {folder} --weights {weights_dir}` where there is "
        f"network, or try out with `ipt2v weights toy {weights_dir}`"
    )
