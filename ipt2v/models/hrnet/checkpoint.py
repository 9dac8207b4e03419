"""A published HRNetV2 segmentation checkpoint -> the network; its size is read off the tensors. Knows no images.

Layouts, told apart by their keys but for the first two, which only the file name tells apart:
  *_torch04.pth  official, trained with InPlaceABN, whose gamma is |weight| + 1e-5
  *_torch11.pth  official, trained with torch's own batch norm
  OCR            official with object-contextual representations: aux_head is a plain head, the rest is not used
  mmseg          backbone.* and decode_head.* (FCNHead with one 1x1 convolution)
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ipt2v.models.hrnet.network import HRNet, HRNetSize

Tensors = dict[str, torch.Tensor]
# by_name: "inplace_abn" if the file's name has torch04 in it (a conversion must keep it), else "as_is"
Gamma = Literal["by_name", "as_is", "inplace_abn"]

_INPLACE_ABN_EPS = 1e-5  # added to |weight| in sync_bn/inplace_abn/src of HRNet-Semantic-Segmentation, branch pytorch-v0.4
_OCR_ONLY = ("conv3x3_ocr.", "ocr_gather_head.", "ocr_distri_head.", "cls_head.")
_OCR_RENAMED = {"aux_head.": "last_layer."}
_MMSEG_RENAMED = {
    "backbone.": "",
    "decode_head.convs.0.conv.": "last_layer.0.",
    "decode_head.convs.0.bn.": "last_layer.1.",
    "decode_head.conv_seg.": "last_layer.3.",
}


def load_network(path: Path, *, align_corners: bool = False, gamma: Gamma = "by_name") -> HRNet:
    """The network of a .pth or .safetensors file, float32, on the CPU, in evaluation mode.

    `align_corners` is of all upsampling inside, as in training: False for LIP and mmseg, True for many an OCR file.
    Raises ValueError if the file cannot be read or is not, key by key and shape by shape, an HRNetV2.
    """
    path = Path(path)
    tensors = _official(_read(path))
    if gamma == "inplace_abn" or (gamma == "by_name" and "torch04" in path.name):
        for key in (key for key, tensor in tensors.items() if key.endswith(".weight") and tensor.ndim == 1):
            tensors[key] = tensors[key].abs() + _INPLACE_ABN_EPS
    size = _read_size(tensors, path)
    with torch.device("meta"):
        network = HRNet(size, align_corners=align_corners)
    _check(tensors, network, path)
    network.load_state_dict(tensors, assign=True)  # torch itself sets num_batches_tracked
    return network.eval().requires_grad_(False)


def _read(path: Path) -> Tensors:
    """The tensors of a file, whatever wraps them. weights_only: a pickle may otherwise run any code."""
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        advice = "download it again, or convert it to .safetensors if it is old"
        raise ValueError(f"{path}: cannot be read as tensors: {str(error).splitlines()[0]}; {advice}") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected a state dict of tensors; name another file")
    return {str(key): value.float() for key, value in content.items()}


def _official(tensors: Tensors) -> Tensors:
    """The same tensors under the keys of the plain official network; an unknown key stays as it is, to be refused."""
    # FullModel, saved from inside DataParallel or not
    tensors = {key.removeprefix("module.").removeprefix("model."): tensor for key, tensor in tensors.items()}
    # torch04 files have no num_batches_tracked, and evaluation does not read it
    tensors = {k: v for k, v in tensors.items() if not k.startswith("loss.") and not k.endswith(".num_batches_tracked")}
    if any(key.startswith("aux_head.") for key in tensors):
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(_OCR_ONLY)}
        return {_renamed(key, _OCR_RENAMED): tensor for key, tensor in tensors.items()}
    if any(key.startswith("backbone.") for key in tensors):
        tensors = {_renamed(key, _MMSEG_RENAMED): tensor for key, tensor in tensors.items()}
        # mmseg leaves out the bias of a convolution before a batch norm
        if (weight := tensors.get("last_layer.0.weight")) is not None and weight.ndim:
            tensors.setdefault("last_layer.0.bias", torch.zeros(weight.shape[0]))
    return tensors


def _renamed(key: str, prefixes: Mapping[str, str]) -> str:
    for prefix, new in prefixes.items():
        if key.startswith(prefix):
            return new + key.removeprefix(prefix)
    return key


def _read_size(tensors: Tensors, path: Path) -> HRNetSize:
    def num_outputs(key: str) -> int:
        if key not in tensors or tensors[key].ndim != 4:
            raise ValueError(f"{path}: key {key} is missing or no convolution, so this is no HRNetV2; name another file")
        return tensors[key].shape[0]

    def count(prefix: str) -> int:
        # at least 1: where a part is missing altogether, its keys are to be missed
        return max(1, len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}))

    return HRNetSize(
        stem_width=num_outputs("conv1.weight"),
        bottleneck_width=num_outputs("layer1.0.conv1.weight"),
        num_bottlenecks=count("layer1."),
        widths=tuple(num_outputs(f"stage4.0.branches.{branch}.0.conv1.weight") for branch in range(4)),
        num_modules=tuple(count(f"stage{stage}.") for stage in (2, 3, 4)),
        num_blocks=tuple(tuple(count(f"stage{stage}.0.branches.{branch}.") for branch in range(stage)) for stage in (2, 3, 4)),
        num_classes=num_outputs("last_layer.3.weight"),
    )


def _check(tensors: Tensors, network: HRNet, path: Path) -> None:
    expected = {k: tuple(v.shape) for k, v in network.state_dict().items() if not k.endswith(".num_batches_tracked")}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    shapes = [
        f"{key} (found {found[key]}, expected {shape})" for key, shape in expected.items() if found.get(key, shape) != shape
    ]
    faults = {"missing": sorted(expected.keys() - found.keys()), "unknown": sorted(found.keys() - expected.keys())}
    faults["of another shape"] = shapes
    texts = [f"{len(keys)} {fault}: {', '.join(keys[:3])}{', ...' * (len(keys) > 3)}" for fault, keys in faults.items() if keys]
    if texts:
        raise ValueError(f"{path}: is not the HRNetV2 it seems to be: keys {'; '.join(texts)}; name another file")
