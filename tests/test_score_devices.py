"""No network of the scores mixes devices: on `meta`, which computes shapes alone, a tensor of the CPU would be refused.

What would otherwise show in a user's first GPU hour.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ipt2v.config import ScoreConfig
from ipt2v.metrics.amt import load_amt
from ipt2v.metrics.clip import load_clip
from ipt2v.metrics.curricular import embed_faces, load_curricular
from ipt2v.metrics.inception import load_inception
from ipt2v.metrics.musiq import load_musiq
from ipt2v.metrics.raft import load_raft
from ipt2v.metrics.toy_weights import write_toy_scores
from ipt2v.metrics.viclip import load_viclip
from ipt2v.models.score_weights import file_of

pytestmark = pytest.mark.slow
CPU, META = torch.device("cpu"), torch.device("meta")


def pixels(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


CALLS: dict[str, tuple[Callable[[Path], nn.Module], Callable[..., torch.Tensor]]] = {
    "raft": (lambda path: load_raft(path, device=CPU), lambda net: net(pixels(2, 3, 128, 160), pixels(2, 3, 128, 160))),
    "amt": (lambda path: load_amt(path, device=CPU), lambda net: net(pixels(2, 3, 128, 160), pixels(2, 3, 128, 160))),
    "musiq": (load_musiq, lambda net: net(pixels(2, 3, 128, 160))),
    "inception": (load_inception, lambda net: net(pixels(1, 3, 299, 299))),
    "curricular": (load_curricular, lambda net: embed_faces(net, pixels(1, 112, 112, 3, dtype=torch.uint8))),
    "clip_l": (load_clip, lambda net: net.encode_image(pixels(2, 3, 224, 224))),
    "clip_b": (load_clip, lambda net: net.encode_text(pixels(1, 77, dtype=torch.long))),
    "viclip": (load_viclip, lambda net: net.encode_video(pixels(1, 8, 3, 224, 224))),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_toy_scores(folder)
    return folder


def test_the_device_that_computes_nothing_refuses_tensors_of_another() -> None:
    with pytest.raises(RuntimeError, match="cpu"):
        pixels(3) + torch.ones(3)


@pytest.mark.parametrize("role", CALLS)
def test_a_network_stays_on_its_device(role: str, weights: Path) -> None:
    load, call = CALLS[role]
    network = load(file_of(role, weights, ScoreConfig())).to(META)
    with torch.no_grad():
        assert call(network).device == META
