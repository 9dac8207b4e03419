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
    sha256: str | None = None  # or how it begins; of a file that published.py has, it stands there


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a folder of weights is published, and what reads it."""

    folder: str
    role: str
    url: str
    licence: str
    non_commercial: bool = False
    repositories: tuple[Repository, ...] = ()
    downloads: tuple[Download, ...] = ()


def _hugging_face(folder: str, role: str, repository: str, licence: str, *, non_commercial: bool = False) -> Source:
    return Source(
        folder=folder,
        role=role,
        url=f"huggingface.co/{repository}",
        licence=licence,
        non_commercial=non_commercial,
        repositories=(Repository(name=repository),),
    )


_INSIGHTFACE = "https://github.com/deepinsight/insightface/releases/download/v0.7"
_OPENAI = "https://openaipublic.azureedge.net/clip/models"  # the folder there is the file's sha256
_MERGES = Download(url="https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz")

_OF_RUNS = (
    Source(
        folder="antelopev2",
        role="faces",
        url="github.com/deepinsight/insightface, model_zoo",
        licence="for non-commercial research only",
        non_commercial=True,
        downloads=(
            Download(
                url=f"{_INSIGHTFACE}/antelopev2.zip",
                size=360_662_982,
                sha256="8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
            ),
        ),
    ),
    _hugging_face("Qwen3-8B", "decouple", "Qwen/Qwen3-8B", "Apache-2.0"),
    Source(
        folder="HRNetV2-W48",
        role="cutout",
        url="github.com/hsfzxjy/models.storage, release HRNet-OCR",
        licence="MIT, trained on LIP, a data set for research",
        downloads=(Download(url="https://github.com/hsfzxjy/models.storage/releases/download/HRNet-OCR/{file}"),),
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
_OF_SCORES = (
    Source(
        folder="buffalo_l",
        role="score.models.faces",
        url="github.com/deepinsight/insightface, model_zoo",
        licence="for non-commercial research only",
        non_commercial=True,
        downloads=(
            Download(
                url=f"{_INSIGHTFACE}/buffalo_l.zip",
                size=288_621_354,
                sha256="80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f",
            ),
        ),
    ),
    Source(
        folder="CurricularFace",
        role="score.models.curricular",
        url="huggingface.co/BestWishYsh/ConsisID-preview, face_encoder",
        licence="not stated; trained on InsightFace's Glint360K, for non-commercial research",
        non_commercial=True,
        downloads=(
            Download(
                url="https://huggingface.co/BestWishYsh/ConsisID-preview/resolve/main/face_encoder/"
                "glint360k_curricular_face_r101_backbone.bin"
            ),
        ),
    ),
    Source(
        folder="Inception-v3",
        role="score.models.inception",
        url="download.pytorch.org, torchvision's IMAGENET1K_V1",
        licence="BSD-3-Clause",
        downloads=(Download(url="https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth", sha256="0cc3c7bd"),),
    ),
    Source(
        folder="ViCLIP",
        role="score.models.viclip",
        url="huggingface.co/OpenGVLab/VBench_Used_Models, and CLIP's merges from github.com/openai/CLIP",
        licence="MIT",
        repositories=(Repository(name="OpenGVLab/VBench_Used_Models"),),
        downloads=(_MERGES,),
    ),
    Source(
        folder="CLIP-ViT-L-14",
        role="score.models.clip_l",
        url="github.com/openai/CLIP, clip/clip.py",
        licence="MIT",
        downloads=(Download(url=f"{_OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt"),),
    ),
    Source(
        folder="CLIP-ViT-B-32",
        role="score.models.clip_b",
        url="github.com/openai/CLIP, clip/clip.py",
        licence="MIT",
        downloads=(
            Download(url=f"{_OPENAI}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt"),
            _MERGES,
        ),
    ),
    Source(
        folder="LAION-aesthetic",
        role="score.models.aesthetic",
        url="github.com/LAION-AI/aesthetic-predictor",
        licence="MIT",
        downloads=(Download(url="https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth"),),
    ),
    _hugging_face(
        "MUSIQ-SPAQ",
        "score.models.musiq",
        "chaofengc/IQA-PyTorch-Weights",
        "Apache-2.0 at Google's, ported by pyiqa, whose own licence is non-commercial",
        non_commercial=True,
    ),
    _hugging_face(
        "AMT-S",
        "score.models.amt",
        "lalala125/AMT",
        "CC BY-NC-SA 4.0, its code CC BY-NC 4.0: non-commercial",
        non_commercial=True,
    ),
    Source(
        folder="RAFT-things",
        role="score.models.raft",
        url="github.com/sczhou/ProPainter, release v0.1.0, a copy of github.com/princeton-vl/RAFT's",
        licence="BSD-3-Clause",
        downloads=(Download(url="https://github.com/sczhou/ProPainter/releases/download/v0.1.0/raft-things.pth"),),
    ),
)
SOURCES = _OF_RUNS + _OF_SCORES


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
