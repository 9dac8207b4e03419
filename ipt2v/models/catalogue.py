"""Which folders of published weights a run and its scores read, what is in them, whether it is whole. Opens no tensor.

Imports no torch. Roles are named by the key that names their folder: `faces` for faces.model, and score.models.faces as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ipt2v.config import RunConfig
from ipt2v.models.faces import PACK_FILES, pack_folder
from ipt2v.models.hyperlora.layout import hyperlora_files
from ipt2v.models.published import published_files
from ipt2v.models.score_weights import SCORE_FILES, folder_of, roles_of
from ipt2v.models.sources import where_from
from ipt2v.models.toy import TOY_MARK
from ipt2v.models.weight_files import Expected, Tick, expected_files, problem_of, read_record

_DIFFUSION, _TRANSFORMERS = "diffusion_pytorch_model", "model"  # stems that the two libraries save tensors under
# role -> (files, (folder, stem) of tensors); every folder of tensors has a config.json too
_NEEDS: dict[str, tuple[tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    "decouple": (("tokenizer_config.json",), ((".", _TRANSFORMERS),)),
    "first_frame": (
        (
            *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
            *("tokenizer_2/vocab.json", "tokenizer_2/merges.txt"),
        ),
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
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")  # settings and tokenizers
_SCORE = "score.models."  # a score's role begins so where it stands beside the run's
_FACE_PACKS = ("faces", f"{_SCORE}faces")
_EMBEDDERS = ("text_encoder", "tokenizer")  # of the video model: array 1 embeds the prompts, array 2 finds that in its records


def folders(config: RunConfig) -> dict[str, str]:
    """role -> name of the weights folder that it reads, of what the run's pixels depend on; a rehearsal has none."""
    if config.rehearsal.enabled:
        return {}
    paints = config.starts_from_first_frame
    rows = (
        ("faces", config.faces.model, True),
        ("decouple", config.decouple.model, config.asks_llm),
        ("cutout", config.cutout.model, config.cutout.enabled),
        ("hyperlora", config.hyperlora.model, paints and config.hyperlora.enabled),
        ("first_frame", config.first_frame.model, paints),
        ("video", config.video.model, True),
    )
    return {role: folder for role, folder, is_needed in rows if is_needed}


def score_folders(config: RunConfig) -> dict[str, str]:
    """Field of score.models -> name of the weights folder, of those that the run's metrics need; a rehearsal has none."""
    if config.rehearsal.enabled:
        return {}
    return {role: folder_of(role, config.score) for role in roles_of(config.score.metrics)}


def all_folders(config: RunConfig) -> dict[str, str]:
    """role -> name of the weights folder that it reads, of the run and its scores; two may read the same."""
    return folders(config) | {f"{_SCORE}{role}": folder for role, folder in score_folders(config).items()}


def is_score(role: str) -> bool:
    return role.startswith(_SCORE)


def setting_of(role: str) -> str:
    """The key of the settings that names the role's folder."""
    return role if is_score(role) else f"{role}.model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong with a file of a folder of weights."""

    folder: str
    is_missing: bool  # rather than damaged
    text: str  # names roles and file


def check_weights(weights_dir: Path, config: RunConfig) -> None:
    """Raise ValueError, naming the first file that is missing or damaged and where it comes from, unless all seem whole.

    Cheap: sizes and headers, nothing is hashed.
    """
    if problems := find_problems(weights_dir, config):
        # one that is missing first: while a folder is being copied some of its files are not whole either
        first = next((problem for problem in problems if problem.is_missing), problems[0])
        more = f" ({len(problems) - 1} more: `ipt2v weights check` lists them)" if problems[1:] else ""
        raise ValueError(f"{first.text}; {where_from(first.folder, weights_dir)}{more}")


def find_problems(weights_dir: Path, config: RunConfig, tick: Tick | None = None) -> list[Problem]:
    """All that is wrong with the files that the run and its scores load; their recorded hashes too if there is a `tick`."""
    problems: list[Problem] = []
    readers: dict[Path, list[str]] = {}  # of each file; it is looked at once
    checks: list[tuple[str, Path, Expected | None]] = []
    for role, folder in all_folders(config).items():
        try:
            files = files_to_check(role, weights_dir / folder, config)
        except ValueError as error:  # a list of the folder's files is damaged, so they cannot be told
            problems.append(Problem(folder=folder, is_missing=False, text=f"{setting_of(role)}: {error}"))
            continue
        checks += [(folder, path, expected) for path, expected in files if path not in readers]
        for path, _ in files:
            readers.setdefault(path, []).append(setting_of(role))
    for folder, path, expected in checks:
        if problem := problem_of(path, expected, tick) or _text_problem(path, expected):
            text = f"{', '.join(readers[path])}: weights file {path} {problem}"
            problems.append(Problem(folder=folder, is_missing=not path.is_file(), text=text))
    return problems


def _text_problem(path: Path, expected: Expected | None) -> str | None:
    """What is wrong with the content of a file that is there, in words as problem_of's; of toys nothing more is looked at."""
    if not path.stat().st_size and (expected is None or expected.size is None):
        return "is empty"
    if path.name == "config.json":
        try:
            read_config(path)
        except ValueError as error:
            return str(error).removeprefix(f"weights file {path} ")
    return None


def read_config(path: Path) -> dict[str, Any]:
    """A config.json of weights. Raises ValueError, naming it, if it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        found = str(error)
    else:
        if isinstance(values, dict):
            return values
        found = f"a {type(values).__name__}"
    raise ValueError(f"weights file {path} is no JSON object ({found})")


def files_to_check(role: str, folder: Path, config: RunConfig) -> list[tuple[Path, Expected | None]]:
    """What `role` loads from `folder`, and what is known of each file; None of toys, which are like no published file."""
    needed = needed_files(role, folder, config)
    if is_toy(folder):
        return [(path, None) for path in needed]
    expected = expected_files(folder)
    top = top_folder(role, folder)
    fetched = [top / name for name in read_record(folder).files if loads(role, name, config)]
    return [(path, expected.get(path.relative_to(top).as_posix(), Expected())) for path in dict.fromkeys([*needed, *fetched])]


def top_folder(role: str, folder: Path) -> Path:
    """Where the files of a role's folder are: those of a face pack may be in a folder inside."""
    return pack_folder(folder) if role in _FACE_PACKS else folder


def is_toy(folder: Path) -> bool:
    return (folder / TOY_MARK).is_file()


def fingerprints(weights_dir: Path, config: RunConfig) -> dict[str, str]:
    """Folder name -> fingerprint, for every folder that the run's pixels depend on."""
    return {
        folder: fingerprint(needed_files(role, weights_dir / folder, config), weights_dir / folder)
        for role, folder in sorted(folders(config).items())
    }


def score_fingerprints(weights_dir: Path, config: RunConfig) -> dict[str, str]:
    """Folder name -> fingerprint, for every folder that the run's scores read."""
    files: dict[str, set[Path]] = {}
    for role, folder in score_folders(config).items():
        files.setdefault(folder, set()).update(needed_files(f"{_SCORE}{role}", weights_dir / folder, config))
    return {folder: fingerprint(list(paths), weights_dir / folder) for folder, paths in sorted(files.items())}


def needed_files(role: str, folder: Path, config: RunConfig) -> list[Path]:
    """Every file that `role` loads from `folder`, shards of tensors included; some may not exist."""
    if role in _FACE_PACKS:
        return face_files(folder)
    if is_score(role):
        return [folder / name for name in SCORE_FILES[role.removeprefix(_SCORE)]]
    if role == "cutout":
        return [folder / config.cutout.file]
    if role == "hyperlora":
        return [folder / name for name in hyperlora_files(config.hyperlora.variant)]
    files, tensors = _NEEDS[role]
    needed = [folder / name for name in files]
    for subfolder, stem in tensors:
        needed.append(folder / subfolder / "config.json")
        index = folder / subfolder / f"{stem}.safetensors.index.json"
        if index.is_file():
            needed += [index, *(folder / subfolder / name for name in _shards(index))]
        elif any(index.parent.glob(f"{stem}-*-of-*.safetensors")):
            needed.append(index)
        else:
            needed.append(folder / subfolder / f"{stem}.safetensors")
    return needed


def stage_files(stage: str, weights_dir: Path, config: RunConfig) -> list[str]:
    """Every file that a stage loads, as its path below `weights_dir`, and the settings and tokenizers beside it.

    Those, because the libraries take what they find: a copy of these files has to load as the original does. Raises ValueError
    if a file is not below `weights_dir` or an index of tensors is damaged, OSError if a folder is missing.
    """
    names: dict[str, None] = {}
    for role, name in all_folders(config).items():
        folder = weights_dir / name
        needed = [path for path in needed_files(role, folder, config) if _is_loaded_in(stage, role, path.relative_to(folder))]
        beside = [path for parent in dict.fromkeys(path.parent for path in needed) for path in sorted(parent.iterdir())]
        found = [
            path for path in beside if _may_be_loaded(role, path.relative_to(folder).as_posix(), config) and path.is_file()
        ]
        for path in (*needed, *found):
            below = path.relative_to(weights_dir)
            if ".." in below.parts:
                raise ValueError(f"{setting_of(role)}: weights file {path} is not below {weights_dir}")
            names[below.as_posix()] = None
    return list(names)


def _is_loaded_in(stage: str, role: str, path: Path) -> bool:
    """Whether it is this stage that loads a file of a role's folder."""
    if stage == "score" or is_score(role):
        return stage == "score" and is_score(role)
    return (stage == "first_frame") == (role != "video" or path.parts[0] in _EMBEDDERS)


def _may_be_loaded(role: str, path: str, config: RunConfig) -> bool:
    return loads(role, path, config) if role in _NEEDS else path.endswith(_TEXT_SUFFIXES)


def loads(role: str, path: str, config: RunConfig) -> bool:
    """Whether `role` loads the file of this path below its folder; repositories hold several forms of the same tensors."""
    name, folder = PurePosixPath(path).name, str(PurePosixPath(path).parent)
    if role in _FACE_PACKS:
        return folder == "." and name.endswith(".onnx")
    if is_score(role):
        return path in SCORE_FILES[role.removeprefix(_SCORE)]
    if role == "cutout":
        return path == config.cutout.file
    if role == "hyperlora":
        return path in hyperlora_files(config.hyperlora.variant)
    files, tensors = _NEEDS[role]
    for subfolder, stem in tensors:
        # not model.fp16.safetensors, pytorch_model.bin or a single file of the whole pipeline
        if folder == subfolder and re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.safetensors|{stem}\.safetensors\.index\.json", name):
            return True
    texts = {str(PurePosixPath(file).parent) for file in files} | {subfolder for subfolder, _ in tensors}
    return folder in texts and name.endswith(_TEXT_SUFFIXES) and not name.endswith(".index.json")


def _shards(index: Path) -> list[str]:
    """The files that an index of tensors names."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"is no index of tensors ({type(error).__name__}: {error}); delete it and fetch it again"
        raise ValueError(f"weights file {index} {problem}") from None


def transformer_sizes(weights_dir: Path, config: RunConfig) -> dict[str, Any]:
    """The config.json of the video transformer. Raises ValueError, naming it, if it is none."""
    path = weights_dir / config.video.model / "transformer" / "config.json"
    try:
        return read_config(path)
    except ValueError as error:
        raise ValueError(f"{error}; `ipt2v weights check` says where it comes from") from None


EDGE_BYTES = 1 << 20


def fingerprint(files: list[Path], folder: Path) -> str:
    """32 hex digits over the files' names, sizes, first and last MiB: all of a small file, seconds for 75 GB of tensors."""
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
    published = {file.path for file in published_files(pack.name)}
    found = []
    for names in PACK_FILES.values():
        present = next((name for name in names if (folder / name).is_file()), "")
        found.append(folder / (present or next((name for name in names if name in published), names[0])))
    return found
