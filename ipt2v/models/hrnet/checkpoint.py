"""A published HRNetV2 segmentation checkpoint -> the network; its size is read off the tensors. Knows no images.

Layouts, told apart by their keys but for the first two, which only the file name tells apart:
  *_torch04.pth  official, trained with InPlaceABN, whose gamma is |weight| + 1e-5
  *_torch11.pth  official, trained with torch's own batch norm
  OCR            official with object-contextual representations: aux_head is a plain head, the rest is not used
  mmseg          backbone.* and decode_head.* (FCNHead with one 1x1 convolution)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from ipt2v.models.hrnet.network import HRNet, HRNetSize
from ipt2v.models.strict_load import Tensors, axis_size, count, fill, load

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
    is_abn = gamma == "inplace_abn" or (gamma == "by_name" and "torch04" in path.name)

    def build(tensors: Tensors) -> HRNet:
        tensors = _official(tensors)
        if is_abn:
            for key in (key for key, tensor in tensors.items() if key.endswith(".weight") and tensor.ndim == 1):
                tensors[key] = tensors[key].abs() + _INPLACE_ABN_EPS
        with torch.device("meta"):
            network = HRNet(_read_size(tensors), align_corners=align_corners)
        fill(network, tensors)
        return network

    return load(path, build)


def _official(tensors: Tensors) -> Tensors:
    """The same tensors under the keys of the plain official network; an unknown key stays as it is, to be refused."""
    tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}  # of FullModel
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("loss.")}
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


def _read_size(tensors: Tensors) -> HRNetSize:
    return HRNetSize(
        stem_width=axis_size(tensors, "conv1.weight"),
        bottleneck_width=axis_size(tensors, "layer1.0.conv1.weight"),
        num_bottlenecks=count(tensors, "layer1."),
        widths=tuple(axis_size(tensors, f"stage4.0.branches.{branch}.0.conv1.weight") for branch in range(4)),
        num_modules=tuple(count(tensors, f"stage{stage}.") for stage in (2, 3, 4)),
        num_blocks=tuple(
            tuple(count(tensors, f"stage{stage}.0.branches.{branch}.") for branch in range(stage)) for stage in (2, 3, 4)
        ),
        num_classes=axis_size(tensors, "last_layer.3.weight"),
    )
