"""The tensors of a TorchScript archive, read without running anything in it. Knows no network.

torch.load(weights_only=True) refuses such archives, and torch.jit.load would run the code they carry; OpenAI publishes CLIP so.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Held:
    """In place of a scripted module: its attributes, none of its code."""


class _TensorsOnly(pickle.Unpickler):
    """Knows how to rebuild tensors and lists; every other name is refused, those of scripted classes are held."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Held
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor_v2
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list  # typed lists of numbers
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

    def persistent_load(self, pid: Any) -> torch.storage.TypedStorage:
        _, dtype, key, _, _ = pid
        if key not in self.storages:
            # a copy that may be written to: bytes may not
            data = bytearray(self.archive.read(f"{self.root}data/{key}"))
            self.storages[key] = (
                torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)
            )
        return torch.storage.TypedStorage(wrap_storage=self.storages[key], dtype=dtype, _internal=True)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip with constants.pkl, which torch.save never writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a module of the archive holds, under the key it has in the module's state dict; on the CPU.

    Raises ValueError if the archive is damaged or holds a pickle that would do more than rebuild tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
            _collect(_TensorsOnly(archive, root).load(), "", tensors)
    except (zipfile.BadZipFile, pickle.UnpicklingError, StopIteration, LookupError, EOFError) as error:
        raise _unreadable(error) from error
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # what a damaged pickle may run into
        raise _unreadable(error) from error
    return tensors


def _unreadable(error: Exception) -> ValueError:
    return ValueError(f"cannot be read as a TorchScript archive: {error!r}; download it again")


def _collect(holder: object, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    for name, value in vars(holder).items() if isinstance(holder, _Held) else ():
        if isinstance(value, torch.Tensor):
            tensors[prefix + name] = value
        else:
            _collect(value, f"{prefix}{name}.", tensors)
