"""LAION's first aesthetic predictor: one linear layer on CLIP's image features. Knows neither CLIP nor a video.

It is the v1 head, sa_0_4_vit_l_14_linear.pth of LAION-AI/aesthetic-predictor (MIT); not the MLP that is named "improved".
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ipt2v.models.strict_load import Tensors, axis_size, fill, load


class AestheticHead(nn.Linear):
    """Features [B,D] of length 1 -> [B,1], nominally 0..10, higher is prettier."""


def load_head(path: Path) -> AestheticHead:
    """The head of a file, float32, on the CPU, in evaluation mode; it suits a CLIP whose image features have its in_features.

    Raises ValueError if the file cannot be read or holds anything but one linear layer of one output; OSError if there is
    none.
    """
    return load(path, build)


def build(tensors: Tensors) -> AestheticHead:
    """The head that holds exactly these tensors. Raises ValueError, naming the keys that do not fit."""
    with torch.device("meta"):
        head = AestheticHead(axis_size(tensors, "weight", 1), 1)
    fill(head, tensors)
    return head
