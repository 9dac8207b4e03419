"""A published file of weights -> a network that holds exactly its tensors. Knows no particular network."""

from __future__ import annotations

import errno
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ipt2v.models.torchscript import is_torchscript, read_torchscript

Tensors = dict[str, torch.Tensor]
Network = TypeVar("Network", bound=nn.Module)

_BOOKKEEPING = ".num_batches_tracked"  # of a batch norm in training; evaluation never reads it


def load(path: Path, build: Callable[[Tensors], Network]) -> Network:
    """What `build` makes of the tensors of a file. Raises ValueError with the path in it, OSError if there is no file."""
    tensors = read_tensors(path)
    try:
        return build(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tensors(path: Path) -> Tensors:
    """The tensors of a file by their keys without DataParallel's `module.`, float32, on the CPU.

    Accepts a plain state dict, {"state_dict": ...}, {"model": ...}, safetensors and TorchScript archives. num_batches_tracked
    is left out. Raises ValueError if the file holds anything else, or cannot be read without running code from it, OSError if
    it is not there.
    """
    path = Path(path)
    try:
        content = _read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, KeyError, OSError) as error:
        # torch reports some torn files as an invalid argument
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = "download it again; if it holds more than tensors, save its state dict alone where you trust it"
        raise ValueError(f"{path}: cannot be read as tensors: {reason}; {advice}") from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content.get("model", content))
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected a state dict of tensors; name another file")
    tensors = {str(key).removeprefix("module."): value.float() for key, value in content.items()}
    return {key: value for key, value in tensors.items() if not key.endswith(_BOOKKEEPING)}


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if is_torchscript(path):
        return read_torchscript(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def count(tensors: Tensors, prefix: str) -> int:
    """How many numbered parts there are below a prefix; at least 1, so that the keys of a part left out are missed."""
    found = {match[1] for key in tensors if (match := re.match(re.escape(prefix) + r"(\d+)\.", key))}
    return max(1, len(found))


def heads(width: int) -> int:
    """Attention heads of a transformer: 64 channels each, in every checkpoint here. Raises ValueError if they do not fit."""
    if width % 64 or not width:
        raise ValueError(f"a transformer of width {width}, expected a multiple of 64; name another file")
    return width // 64


def axis_size(tensors: Tensors, key: str, axis: int = 0) -> int:
    """The length of one axis of a tensor. Raises ValueError if the tensor is missing or has fewer axes."""
    if key not in tensors or tensors[key].ndim <= axis:
        found = f"of shape {tuple(tensors[key].shape)}" if key in tensors else "missing"
        raise ValueError(f"key {key} is {found}, expected a tensor of at least {axis + 1} axes; name another file")
    return tensors[key].shape[axis]


def fill(network: nn.Module, tensors: Tensors) -> None:
    """Give a network on the meta device these tensors; then it is in evaluation mode and needs no gradients.

    Raises ValueError, naming the first keys, unless the keys and shapes are the network's own.
    """
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items() if not key.endswith(_BOOKKEEPING)}
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unknown": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{key} (found {found[key]}, expected {shape})" for key, shape in expected.items() if found.get(key, shape) != shape
        ],
    }
    texts = [f"{len(keys)} {fault}: {', '.join(keys[:3])}{', ...' * (len(keys) > 3)}" for fault, keys in faults.items() if keys]
    if texts:
        raise ValueError(f"is not the {type(network).__name__} it seems to be: keys {'; '.join(texts)}; name another file")
    network.load_state_dict(tensors, assign=True)  # torch itself sets num_batches_tracked
    network.eval().requires_grad_(False)
