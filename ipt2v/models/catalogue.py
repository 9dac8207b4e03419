"""Which folders of published weights a run reads, what is in them, where they come from. Opens no tensor, imports no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ipt2v.config import RunConfig
from ipt2v.models.faces import PACK_FILES, pack_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a folder of weights is published."""

    folder: str
    url: str
    licence: str
    fetch: str  # what a user does to have it at {path}


def _hugging_face(folder: str, repository: str, licence: str) -> Source:
    fetch = f"`hf download {repository} --local-dir {{path}}`"
    return Source(folder=folder, url=f"huggingface.co/{repository}", licence=licence, fetch=fetch)


SOURCES = (
    Source(
        folder="antelopev2",
        url="github.com/deepinsight/insightface, model_zoo",
        licence="for non-commercial research only",
        fetch="unpack antelopev2.zip to {path}",
    ),
    _hugging_face("Qwen3-8B", "Qwen/Qwen3-8B", "Apache-2.0"),
    _hugging_face("RealVisXL_V4.0", "SG161222/RealVisXL_V4.0", "OpenRAIL++-M"),
    _hugging_face("Wan2.1-VACE-14B-diffusers", "Wan-AI/Wan2.1-VACE-14B-diffusers", "Apache-2.0"),
    _hugging_face("Wan2.1-VACE-1.3B-diffusers", "Wan-AI/Wan2.1-VACE-1.3B-diffusers", "Apache-2.0"),
)

_DIFFUSION, _TRANSFORMERS = "diffusion_pytorch_model", "model"  # stems that the two libraries save tensors under
# role -> (files, (folder, stem) of tensors); every folder of tensors has a config.json too
_NEEDS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "decouple": (("tokenizer_config.json",), ((".", _TRANSFORMERS),)),
    "first_frame": (
        ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer_2/vocab.json"),
        (
            ("unet", _DIFFUSION),
            ("vae", _DIFFUSION),
            ("text_encoder", _TRANSFORMERS),
            ("text_encoder_2", _TRANSFORMERS),
        ),
    ),
    "video": (
        ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"),
        (("transformer", _DIFFUSION), ("vae", _DIFFUSION), ("text_encoder", _TRANSFORMERS)),
    ),
}


def folders(config: RunConfig) -> dict[str, str]:
    """role -> name of the weights folder that it reads."""
    return {
        "faces": config.faces.model,
        "decouple": config.decouple.model,
        "first_frame": config.first_frame.model,
        "video": config.video.model,
    }


def check_weights(weights_dir: Path, config: RunConfig) -> None:
    """Raise ValueError, naming the first missing file and where it comes from, unless every file to be loaded is there."""
    for role, folder in folders(config).items():
        missing = next((file for file in needed_files(role, weights_dir / folder) if not file.is_file()), None)
        if missing is not None:
            raise ValueError(f"{role}.model: weights file {missing} is missing; {_where_from(folder, weights_dir)}")


def fingerprints(weights_dir: Path, config: RunConfig) -> dict[str, str]:
    """Folder name -> fingerprint, for every folder that the run reads."""
    return {
        folder: fingerprint(needed_files(role, weights_dir / folder), weights_dir / folder)
        for role, folder in sorted(folders(config).items())
    }


def needed_files(role: str, folder: Path) -> list[Path]:
    """Every file that `role` loads from `folder`, shards of tensors included; some may not exist."""
    if role == "faces":
        return face_files(folder)
    files, tensors = _NEEDS[role]
    needed = [folder / name for name in files]
    for subfolder, stem in tensors:
        needed.append(folder / subfolder / "config.json")
        index = folder / subfolder / f"{stem}.safetensors.index.json"
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            needed += [index, *(folder / subfolder / name for name in sorted(names))]
        else:
            needed.append(folder / subfolder / f"{stem}.safetensors")
    return needed


def num_attention_heads(weights_dir: Path, config: RunConfig) -> int:
    """Heads of the video transformer, as its config.json has them."""
    path = weights_dir / config.video.model / "transformer" / "config.json"
    return int(json.loads(path.read_text(encoding="utf-8"))["num_attention_heads"])


EDGE_BYTES = 1 << 20


def fingerprint(files: list[Path], folder: Path) -> str:
    """32 hex digits over the files' names, sizes, first and last MiB: all of a small file, seconds for 35 GB of tensors."""
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(size - EDGE_BYTES, 0))
            digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()[:32]


def face_files(pack: Path) -> list[Path]:
    """The four ONNX files of a face pack: those that load_face_analysis takes, or the names of those that are missing."""
    folder = pack_folder(pack)
    found = ([folder / name for name in names if (folder / name).is_file()] for names in PACK_FILES.values())
    return [present[0] if present else folder / names[0] for present, names in zip(found, PACK_FILES.values(), strict=True)]


def _where_from(folder: str, weights_dir: Path) -> str:
    for source in SOURCES:
        if source.folder == folder:
            fetch = source.fetch.format(path=weights_dir / folder)
            return f"it comes from {source.url} ({source.licence}): {fetch}, or try out with `ipt2v weights toy {weights_dir}`"
    known = ", ".join(source.folder for source in SOURCES)
    return f"{folder!r} is no folder that we know a source of (known: {known}); put the checkpoint there yourself"
