"""What the tensors of a file say about its network, and files that wrap them otherwise than strict_load expects.

Knows no particular network.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ipt2v.metrics.strict_load import Tensors
from ipt2v.metrics.torchscript import is_torchscript, read_torchscript

Network = TypeVar("Network", bound=nn.Module)


def count(tensors: Tensors, prefix: str) -> int:
    """How many numbered parts there are below a prefix; at least 1, so that the keys of a part left out are missed."""
    found = {match[1] for key in tensors if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))}
    return max(1, len(found))


def heads(width: int) -> int:
    """Attention heads of a transformer: 64 channels each, in every checkpoint here. Raises ValueError if they do not fit."""
    if width % 64 or not width:
        raise ValueError(f"a transformer of width {width}, expected a multiple of 64; name another file")
    return width // 64


def load_wrapped(path: Path, build: Callable[[Tensors], Network]) -> Network:
    """What `build` makes of the tensors of a file, of {"model": ...} in it, of safetensors or of a TorchScript archive.

    Float32, on the CPU, by their keys without DataParallel's `module.`. Raises ValueError with the path in it, OSError if
    there is no file; no code from the file is run.
    """
    path = Path(path)
    try:
        return build({key.removeprefix("module."): value.float() for key, value in _read(path).items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"cannot be read as tensors: {error}; download it again") from error
    if is_torchscript(path):
        return read_torchscript(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot be read as tensors: {reason}; download it again") from error
    content = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"holds {type(content).__name__}, expected a state dict of tensors; name another file")
    return {str(key): value for key, value in content.items()}
